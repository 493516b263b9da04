"""A study as people read it: tables for the console, and the same as a page of Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cppo.settings import flatten
from cppo.study.plan import START
from cppo.study.statistics import Difference, Mean
from cppo.study.summary import Summary, Variant

LEVEL = 0.05
PHASES = ("rollout", "views", "update")
VIEWS = ("accuracy", "preserved", "removed", "black")
Row = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """`notes` are sentences below it; `plots`, by file, what they show."""

    title: str
    header: Row
    rows: Sequence[Row]
    notes: Sequence[str]
    plots: dict[str, str]


def tables(summary: Summary) -> list[Table]:
    return [_accuracy(summary), _views(summary), _detector(summary), _cost(summary)]


def page(summary: Summary) -> str:
    """The study in Markdown; its plots are looked for beside it."""
    parts = ["# A controlled study", *introduction(summary)]
    for table in [_changes(summary), *tables(summary)]:
        lines = [table.header, tuple("---" for _ in table.header), *table.rows]
        parts.append(f"## {table.title}")
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
        parts += table.notes
        parts += [f"![{text}]({file})" for file, text in table.plots.items()]
    return "\n\n".join(parts) + "\n"


def introduction(summary: Summary) -> list[str]:
    """What was done, and what its figures say and do not say; a paragraph each."""
    settings, measure = summary.settings, summary.measure
    rollout = settings["rollout"]
    facts = "; ".join(f"{name}: {', '.join(v)}" for name, v in summary.environment.items())
    paragraphs = [
        f"{len(summary.variants)} variants on the built-in task (difficulty "
        f"{settings['dataset']['difficulty']}), with prompts in the same order and the same number "
        f"of steps: {settings['steps']} steps of {rollout['prompts']} prompts with "
        f"{rollout['responses']} responses each, at a learning rate of "
        f"{settings['optimizer']['learning_rate']:g} unless a variant says otherwise. Methods that "
        "resample draw more prompts for a step, and learn from more of them. Seeds: "
        f"{', '.join(map(str, summary.seeds))}. Measured at the end on {measure['items']} held-out "
        f"items, {measure['k']} responses each, at temperature 1.",
        "Brackets hold 95 % Student-t intervals over seeds. Differences are paired by seed: the "
        "same seed takes prompts in the same order, and all runs are measured on the same items, "
        "views and random numbers. p-values are two-sided, of a t-test on these differences; "
        "Holm's method adjusts them for the number of variants. Seeds vary the order of the data "
        "and the sampling, and neither the warm start nor the items: all runs begin with the same "
        "policy (start) and are measured on the same pictures, so that no interval tells how "
        "another policy would fare, or the same one on other items.",
    ]
    if any(len(variant.seeds) < 2 for variant in summary.variants):
        paragraphs.append("A single seed has no interval: none is shown with it.")
    if summary.missing:
        paragraphs.append(f"Not finished: {'; '.join(summary.missing)}.")
    return [*paragraphs, f"Run with {facts}."]


def _changes(summary: Summary) -> Table:
    """What tells the variants apart."""
    rows = [("all", _settings(summary.base))]
    rows += [(variant.name, _settings(variant.changes)) for variant in summary.variants]
    note = "All else is as `cppo train` and the method have it by default."
    return Table(
        title="Variants",
        header=("variant", "settings of its own"),
        rows=rows,
        notes=[note],
        plots={},
    )


def _settings(changes: Mapping[str, Any]) -> str:
    written = []
    for name, value in flatten(changes):
        options = value if isinstance(value, Mapping) else {"": value}
        for option, given in options.items():
            text = given if isinstance(given, str) else json.dumps(given)
            written.append(f"`{f'{name}.{option}'.strip('.')}={text}`")
    return ", ".join(written)


def _accuracy(summary: Summary) -> Table:
    k, baseline = summary.measure["k"], summary.baseline
    rows = [
        (
            variant.name,
            str(len(variant.seeds)),
            _percent(variant.means["accuracy"]),
            *_compared(variant, "accuracy", _points),
        )
        for variant in summary.variants
    ]
    if summary.start:
        rows.insert(0, (START, "", f"{100 * summary.start['accuracy']:.1f} %", "", "", ""))
    files = {
        "accuracy.svg": f"avg@{k} of each variant with its interval; small dots are seeds",
        "accuracy-curves.svg": f"avg@{k} over the training, with 95 % bands",
    }
    return Table(
        title="Accuracy",
        header=("variant", "seeds", f"avg@{k}", f"against {baseline}, points", "p", "p (Holm)"),
        rows=rows,
        notes=[_verdict(summary)],
        plots=files,
    )


def _verdict(summary: Summary) -> str:
    compared = [v for v in summary.variants if "accuracy" in v.differences]
    tested = [v for v in compared if v.differences["accuracy"].p_holm is not None]
    if not tested:
        return "Nothing can be said of differences in accuracy: that takes two seeds or more."
    apart = [v for v in tested if (v.differences["accuracy"].p_holm or 0) < LEVEL]
    if not apart:
        return (
            f"After Holm's adjustment, no variant's accuracy differs from that of "
            f"{summary.baseline} at the 5 % level."
        )
    named = ", ".join(f"{v.name} ({100 * v.differences['accuracy'].value:+.1f})" for v in apart)
    rest = "; the others cannot be told apart from it" if len(apart) < len(tested) else ""
    return (
        f"After Holm's adjustment, these differ in accuracy from {summary.baseline} at the 5 % "
        f"level, in points: {named}{rest}."
    )


def _views(summary: Summary) -> Table:
    rows = []
    for variant in summary.variants:
        cells = [_percent(variant.means["accuracy"])]
        for view in ("preserved", "removed"):
            difference, _, adjusted = _compared(variant, view, _points)
            cells += [_percent(variant.means[view]), difference, adjusted]
        rows.append((variant.name, *cells, _percent(variant.means["black"])))
    if start := summary.start:
        known = {name: f"{100 * start[name]:.1f} %" for name in VIEWS}
        blank = ("", "")
        rows.insert(
            0,
            (
                *(START, known["accuracy"], known["preserved"], *blank, known["removed"], *blank),
                known["black"],
            ),
        )
    against = (f"against {summary.baseline}, points", "p (Holm)")
    return Table(
        title="What the picture is needed for",
        header=(
            *("variant", "as they are", "preserving view", *against, "removing view", *against),
            "black picture",
        ),
        rows=rows,
        notes=[
            "avg@k on the same items, whose pictures are shown under CPPO's published preserving "
            "views (robust: as high as on the pictures as they are), under its removing views, "
            "which leave a part of the picture, and black all over. The best guess at an answer "
            f"without its picture is right in {100 * summary.chance:.1f} % of the cases: a policy "
            "that relies on the picture falls to that, or below, once all of it is gone."
        ],
        plots={"views.svg": "accuracy on views of the pictures, with the chance of guessing"},
    )


def _detector(summary: Summary) -> Table:
    rows = [
        (
            variant.name,
            _plain(variant.means["roc_auc"]),
            *_compared(variant, "roc_auc", _signed),
            _plain(variant.means["roc_auc_absolute"]),
        )
        for variant in summary.variants
    ]
    if summary.start:
        start = (f"{summary.start[name]:.3f}" for name in ("roc_auc", "roc_auc_absolute"))
        rows.insert(0, (START, next(start), "", "", "", next(start)))
    against = f"against {summary.baseline}"
    return Table(
        title="The detector",
        header=("variant", "ROC AUC", against, "p", "p (Holm)", "ROC AUC, absolute rule"),
        rows=rows,
        notes=[
            f"Of the rise in entropy, relative or absolute, on {summary.measure['puzzles']} "
            "held-out reference solutions under CPPO's removing views: how well it tells tokens "
            "that only the picture gives from all others, whatever the variant trained with."
        ],
        plots={"detector-curves.svg": "ROC AUC of the detector over the training"},
    )


def _cost(summary: Summary) -> Table:
    base = next((v for v in summary.variants if v.name == summary.baseline), None)

    def multiple(variant: Variant, quantity: str) -> str:
        if base is None or not base.means[quantity].value:
            return ""
        return f"{variant.means[quantity].value / base.means[quantity].value:.2f}"

    multiples = ("step_seconds", "update_tokens", "update_pictures", "rollout_tokens")
    rows = []
    for variant in summary.variants:
        seconds = {phase: variant.means[f"{phase}_seconds"].value for phase in PHASES}
        rows.append(
            (
                variant.name,
                f"{seconds['rollout']:.2f}",
                f"{seconds['views'] + seconds['update']:.2f}",
                *(multiple(variant, name) for name in multiples),
                f"{variant.means['rollout_pictures'].value:.1f}",
                f"{variant.means['kept_groups'].value:.1f}",
                f"{variant.means['peak_memory_gib'].value:.2f}",
            )
        )
    notes = [
        f"Means over steps and seeds; x: times what a step of {summary.baseline} takes. Counted "
        "are tokens that pass the language model and pictures that pass the vision tower, in the "
        "update with those of all views and of the reference policy, whether a gradient comes back "
        "through them or not: a pass without costs about a third of one with it. Groups teach "
        "whose rewards differ. GiB: the process's peak memory."
    ]
    if base is not None:
        means = {name: base.means[name].value for name in multiples}
        notes.append(
            f"{base.name}: {means['step_seconds']:.2f} s a step; {means['update_tokens']:,.0f} "
            f"tokens and {means['update_pictures']:,.1f} pictures in the update, "
            f"{means['rollout_tokens']:,.0f} tokens in the rollout."
        )
    return Table(
        title="Cost of a step",
        header=(
            *("variant", "rollout, s", "update, s", "both, x", "update tokens, x"),
            *(
                "update pictures, x",
                "rollout tokens, x",
                "rollout pictures",
                "groups that teach",
                "GiB",
            ),
        ),
        rows=rows,
        notes=notes,
        plots={"cost.svg": "seconds and tokens of a step, as multiples of the baseline's"},
    )


# --- how figures are written --------------------------------------------------------------------


def _written(
    value: float, half_width: float | None, scale: float, write: Callable[[float], str], unit: str
) -> str:
    text = f"{write(scale * value)}{unit}"
    if half_width is None:
        return text
    low, high = (scale * (value + sign * half_width) for sign in (-1, 1))
    return f"{text} [{write(low)}, {write(high)}]"


def _percent(mean: Mean) -> str:
    return _written(mean.value, mean.half_width, 100, "{:.1f}".format, " %")


def _plain(mean: Mean) -> str:
    return _written(mean.value, mean.half_width, 1, "{:.3f}".format, "")


def _points(difference: Difference) -> str:
    return _written(difference.value, difference.half_width, 100, "{:+.1f}".format, "")


def _signed(difference: Difference) -> str:
    return _written(difference.value, difference.half_width, 1, "{:+.3f}".format, "")


def _compared(variant: Variant, quantity: str, write: Callable[[Difference], str]) -> Row:
    """The difference to the baseline, its p-value, and that adjusted; blank where there is none."""
    difference = variant.differences.get(quantity)
    if difference is None:
        return "", "", ""
    return write(difference), _p(difference.p), _p(difference.p_holm)


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
