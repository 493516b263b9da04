"""A study in numbers, from its finished runs' files alone: what tables and plots are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from cppo.study.plan import START, Study
from cppo.study.results import Key, Record
from cppo.study.statistics import Difference, Mean, holm, mean_of, paired


def _per_step(*names: str) -> Callable[[Record], float | None]:
    """The mean over the steps of the sum of these; None where there was no step."""

    def read(record: Record) -> float | None:
        steps: Mapping[str, Sequence[float]] = record["steps"]
        return sum(fmean(steps[name]) for name in names) if steps else None

    return read


def _peak(record: Record) -> float | None:
    return max(record["steps"].get("peak_memory_gib", ()), default=None)


QUANTITIES: Mapping[str, Callable[[Record], float | None]] = {
    "accuracy": lambda record: float(record["answers"]["as_it_is"]),
    "preserved": lambda record: float(record["answers"]["preserved"]),
    "removed": lambda record: float(record["answers"]["removed"]),
    "black": lambda record: float(record["answers"]["black"]),
    "roc_auc": lambda record: float(record["curve"][-1]["relative"]),
    "roc_auc_absolute": lambda record: float(record["curve"][-1]["absolute"]),
    "rollout_seconds": _per_step("rollout_seconds"),
    "views_seconds": _per_step("views_seconds"),
    "update_seconds": _per_step("update_seconds"),
    "step_seconds": _per_step("rollout_seconds", "views_seconds", "update_seconds"),
    "rollout_tokens": _per_step("rollout_tokens"),
    "rollout_pictures": _per_step("rollout_pictures"),
    "update_tokens": _per_step("update_tokens"),
    "update_pictures": _per_step("update_pictures"),
    "kept_groups": _per_step("kept_groups"),
    "peak_memory_gib": _peak,
    "run_seconds": lambda record: float(record["seconds"]),
}
COMPARED = ("accuracy", "preserved", "removed", "roc_auc")  # with the baseline's, seed by seed
CURVES: Mapping[str, str] = {"accuracy": "accuracy", "roc_auc": "relative"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One variant over its seeds: quantities by name, curves by step and then by name."""

    name: str
    changes: Mapping[str, Any]  # against the base
    values: Mapping[str, Mapping[int, float]]  # by seed
    means: Mapping[str, Mean]
    differences: Mapping[str, Difference]
    curve: Mapping[int, Mapping[str, Mean]]

    @property
    def seeds(self) -> list[int]:
        return list(self.values["accuracy"])


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A study as far as it is done.

    `start`, by quantity: the policy that all runs began with; empty where it is not measured.
    `chance`: of guessing an answer.
    """

    baseline: str
    seeds: Sequence[int]
    base: Mapping[str, Any]
    measure: Mapping[str, Any]
    chance: float
    start: Mapping[str, float]
    variants: Sequence[Variant]
    missing: Sequence[str]  # runs, by name
    settings: Mapping[str, Any]  # of the base, defaults included
    environment: Mapping[str, Sequence[str]]  # facts, each with all values that the runs had

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def summarise(study: Study, records: Mapping[Key, Record]) -> Summary | None:
    """Of the runs that are there; None where no variant has any."""
    by_variant = {
        name: {seed: record for (variant, seed), record in records.items() if variant == name}
        for name in study.variants
    }
    values = {name: _values(own) for name, own in by_variant.items() if own}
    if not values:
        return None
    differences = _compare(values, study.baseline)
    variants = [
        Variant(
            name=name,
            changes=study.config.variants[name],
            values=own,
            means={n: mean_of(list(by_seed.values())) for n, by_seed in own.items()},
            differences=differences.get(name, {}),
            curve=_curve(list(by_variant[name].values())),
        )
        for name, own in values.items()
    ]
    some = next(iter(records.values()))
    start = records.get((START, study.config.seeds[0]))
    return Summary(
        baseline=study.baseline,
        seeds=study.config.seeds,
        base=study.config.base,
        measure=asdict(study.config.measure),
        chance=some["answers"]["chance"],
        start={n: v for n, read in QUANTITIES.items() if start and (v := read(start)) is not None},
        variants=variants,
        missing=[run.name for run in study.runs if (run.variant, run.seed) not in records],
        settings=study.runs[0].settings() | {"steps": study.runs[-1].config.steps},
        environment=_environment(list(records.values())),
    )


def _values(records: Mapping[int, Record]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for name, read in QUANTITIES.items():
        for seed, record in records.items():
            if (value := read(record)) is not None:
                found.setdefault(name, {})[seed] = value
    return found


def _compare(
    values: Mapping[str, Mapping[str, Mapping[int, float]]], baseline: str
) -> dict[str, dict[str, Difference]]:
    """Variant -> quantity -> its difference to the baseline; p-values adjusted over variants."""
    found: dict[str, dict[str, Difference]] = {}
    for quantity in COMPARED if baseline in values else ():
        pairs = {
            name: paired(own[quantity], values[baseline][quantity])
            for name, own in values.items()
            if name != baseline
        }
        known = {name: difference for name, difference in pairs.items() if difference}
        adjusted = holm({n: d.p for n, d in known.items() if d.p is not None})
        for name, difference in known.items():
            found.setdefault(name, {})[quantity] = replace(difference, p_holm=adjusted.get(name))
    return found


def _curve(records: Sequence[Record]) -> dict[int, dict[str, Mean]]:
    points: dict[int, list[Mapping[str, float]]] = {}
    for record in records:
        for point in record["curve"]:
            points.setdefault(int(point["step"]), []).append(point)
    return {
        step: {name: mean_of([point[key] for point in found]) for name, key in CURVES.items()}
        for step, found in points.items()
    }


def _environment(records: Sequence[Record]) -> dict[str, list[str]]:
    facts: dict[str, list[str]] = {}
    for record in records:
        for name, value in {**record["environment"], "runs side by side": record["jobs"]}.items():
            facts.setdefault(name, [])
            if str(value) not in facts[name]:
                facts[name].append(str(value))
    return facts
