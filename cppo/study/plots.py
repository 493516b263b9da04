"""A study's plots, each one file; colours that most people can tell apart (Okabe and Ito)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo.study.statistics import Mean
from cppo.study.summary import Summary, Variant

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"
WIDTH_INCHES = 8.3
COLUMNS = 4
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "svg.hashsalt": "cppo",  # the same study makes the same file
}
VIEWS = {  # quantity -> what it is called, marker, colour
    "accuracy": ("as they are", "o", BLUE),
    "preserved": ("preserving view", "s", GREEN),
    "removed": ("removing view", "v", ORANGE),
    "black": ("black picture", "X", RED),
}
PHASES = {"rollout": BLUE, "views": ORANGE, "update": GREEN}


def draw(summary: Summary, folder: Path) -> None:
    """Writes all of `PLOTS` into a folder."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        for file, paint in PLOTS.items():
            figure = Figure(layout="constrained")
            paint(figure, summary)
            figure.savefig(folder / file, metadata={"Date": None})


def _accuracies(figure: Any, summary: Summary) -> None:
    """Each variant's mean with its interval, its seeds as small dots beneath."""
    axes = _rows(figure, summary)
    for row, variant in enumerate(summary.variants):
        seeds = [100 * value for value in variant.values["accuracy"].values()]
        axes.plot(seeds, [row + 0.27] * len(seeds), "o", color=GREY, markersize=2.5, clip_on=False)
        _dot(axes, variant.means["accuracy"], row, "o", BLUE)
        value = 100 * variant.means["accuracy"].value
        axes.annotate(
            f"{value:.1f}",
            (value, row),
            (4, 4),
            textcoords="offset points",
            fontsize=8,
        )
        if variant.name == summary.baseline:
            _line(axes, value, variant.name)
    axes.set_xlabel(f"avg@{summary.measure['k']} on held-out items, %")


def _accuracy_curves(figure: Any, summary: Summary) -> None:
    _curves(figure, summary, "accuracy", 100, f"avg@{summary.measure['k']}, %")


def _detector_curves(figure: Any, summary: Summary) -> None:
    _curves(figure, summary, "roc_auc", 1, "ROC AUC")


def _curves(figure: Any, summary: Summary, quantity: str, scale: float, label: str) -> None:
    """A panel a variant: mean and 95 % band in colour, before the baseline's in grey."""
    baseline = next((v for v in summary.variants if v.name == summary.baseline), None)
    shown = [v for v in summary.variants if v is not baseline] or list(summary.variants)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure.set_size_inches(WIDTH_INCHES * max(columns, 2) / COLUMNS, 1.9 * rows + 0.4)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for number, axes in enumerate(panels):
        if number >= len(shown):
            axes.set_visible(False)
            continue
        if baseline and baseline is not shown[number]:
            _band(axes, baseline, quantity, scale, GREY)
        _band(axes, shown[number], quantity, scale, BLUE)
        axes.set_title(shown[number].name, color=BLUE, loc="left", fontweight="bold")
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        if number == 0 and baseline and baseline is not shown[0]:
            axes.set_title(f"{baseline.name} in grey", color=GREY, loc="right", fontsize=8)
        if number + columns >= len(shown):
            axes.tick_params(labelbottom=True)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel(label, fontsize=9)


def _views(figure: Any, summary: Summary) -> None:
    axes = _rows(figure, summary)
    for place, (quantity, (name, marker, colour)) in enumerate(VIEWS.items()):
        for row, variant in enumerate(summary.variants):
            label = name if row == 0 else None
            height = row + 0.16 * (place - 1.5)
            _dot(axes, variant.means[quantity], height, marker, colour, label=label)
    _line(axes, 100 * summary.chance, "chance")
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    axes.set_xlabel(f"avg@{summary.measure['k']} on held-out items, %")
    figure.legend(loc="outside upper center", ncols=len(VIEWS), frameon=False)


def _costs(figure: Any, summary: Summary) -> None:
    """Seconds, and tokens through the language model; the totals as multiples of the baseline's."""
    figure.set_size_inches(WIDTH_INCHES, _height(summary))
    left, right = figure.subplots(1, 2, sharey=True)
    _stacks(left, summary, {phase: f"{phase}_seconds" for phase in PHASES}, 1)
    left.set_xlabel("seconds a step")
    tokens = {phase: f"{phase}_tokens" for phase in ("rollout", "update")}
    _stacks(right, summary, tokens, 1e-3)
    right.set_xlabel("thousand tokens a step, through the language model")
    _names(left, summary)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )


def _stacks(axes: Any, summary: Summary, quantities: Mapping[str, str], scale: float) -> None:
    totals: dict[str, float] = {}
    for row, variant in enumerate(summary.variants):
        start = 0.0
        for phase, quantity in quantities.items():
            width = scale * variant.means[quantity].value
            label = phase if row == 0 else None
            axes.barh(row, width, left=start, height=0.6, color=PHASES[phase], label=label)
            start += width
        totals[variant.name] = start
    unit = totals.get(summary.baseline)
    for row, total in enumerate(totals.values()):
        text = f" {total / unit:.2f} x" if unit else f" {total:.1f}"
        axes.annotate(text, (total, row), va="center", fontsize=8)
    axes.set_xlim(0, 1.18 * max(totals.values()))


# --- pieces ------------------------------------------------------------------------------------


def _rows(figure: Any, summary: Summary) -> Any:
    """Axes with a row a variant, the first on top."""
    figure.set_size_inches(WIDTH_INCHES, _height(summary))
    axes = figure.subplots()
    _names(axes, summary)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _height(summary: Summary) -> float:
    return 0.36 * len(summary.variants) + 1.0


def _names(axes: Any, summary: Summary) -> None:
    axes.set_yticks(range(len(summary.variants)), [variant.name for variant in summary.variants])
    axes.set_ylim(len(summary.variants) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _dot(
    axes: Any, mean: Mean, row: float, marker: str, colour: str, *, label: str | None = None
) -> None:
    spread = None if mean.half_width is None else [100 * mean.half_width]
    axes.errorbar(
        [100 * mean.value],
        [row],
        xerr=spread,
        fmt=marker,
        color=colour,
        markersize=5,
        elinewidth=1.6,
        label=label,
    )


def _line(axes: Any, value: float, text: str) -> None:
    """A value that all rows are to be seen against, named above them."""
    axes.axvline(value, color=GREY, linestyle=":", linewidth=1.2)
    above = axes.get_xaxis_transform()
    axes.annotate(text, (value, 1.0), xycoords=above, ha="center", va="bottom", color=GREY)


def _band(axes: Any, variant: Variant, quantity: str, scale: float, colour: str) -> None:
    steps: Sequence[int] = list(variant.curve)
    means = [variant.curve[step][quantity] for step in steps]
    axes.plot(steps, [scale * mean.value for mean in means], color=colour, linewidth=1.5)
    known = [(step, mean, mean.half_width) for step, mean in zip(steps, means, strict=True)]
    band = [(step, mean.value, width) for step, mean, width in known if width is not None]
    axes.fill_between(
        [step for step, _, _ in band],
        [scale * (value - width) for _, value, width in band],
        [scale * (value + width) for _, value, width in band],
        color=colour,
        alpha=0.2,
        linewidth=0,
    )


PLOTS: Mapping[str, Callable[[Any, Summary], None]] = {
    "accuracy.svg": _accuracies,
    "accuracy-curves.svg": _accuracy_curves,
    "views.svg": _views,
    "detector-curves.svg": _detector_curves,
    "cost.svg": _costs,
}
