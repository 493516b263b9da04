"""The runs of a study: its settings checked, and cut into one TrainConfig a variant and seed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cppo.builtin import GRIDS, entry
from cppo.config import EvaluationConfig, MeasureConfig, StudyConfig, TrainConfig, check
from cppo.methods import build
from cppo.settings import flatten, nearest, read

START = "start"  # the run that does not train: what all others begin with
OWN = ("output", "seed", "evaluation", "checkpoint_every", "samples_every")
EQUAL = ("model", "data", "dataset", "steps", "rollout.prompts", "rollout.responses")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int
    config: TrainConfig
    measure: MeasureConfig

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    def settings(self) -> dict[str, Any]:
        """All that its figures depend on, the method's own defaults among it."""
        settings = dataclasses.asdict(self.config)
        method = build(self.config.method, self.config.method_options)
        settings["method_options"] = dataclasses.asdict(method)
        if self.config.model == "builtin":  # a warm start that was made otherwise is another policy
            settings["model"] = entry(self.config.dataset.difficulty).name
        return settings | {"measure": dataclasses.asdict(self.measure)}


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is to be run, in this order: every variant's first seed before any one's second."""

    config: StudyConfig
    runs: tuple[Run, ...]

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def variants(self) -> list[str]:
        return list(self.config.variants)

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return self.config.baseline or self.variants[0]

    def only(self, names: Sequence[str] | None) -> list[Run]:
        """The runs of these variants, and the start."""
        for name in names or ():
            if name not in self.variants:
                raise ValueError(
                    f"only: variant {name!r} is not known{nearest(name, self.variants)}"
                )
        return [run for run in self.runs if not names or run.variant in (START, *names)]


def plan(config: StudyConfig) -> Study:
    """Raises ValueError for whatever is wrong with any of the runs."""
    if not config.variants:
        raise ValueError("a study needs variants: give --config, as configs/study-methods.yaml")
    _check_names(config)
    if config.baseline and config.baseline not in config.variants:
        known = nearest(config.baseline, list(config.variants))
        raise ValueError(f"baseline: variant {config.baseline!r} is not known{known}")
    _check_keys(config.base, OWN, "base", "a study sets it itself (see measure and seeds)")
    start = replace(_train_config(config.base, config.measure, "base"), steps=0)
    made: dict[str, TrainConfig] = {}
    for name, changes in config.variants.items():
        where = f"variants: {name}"
        _check_keys(changes, OWN, where, "a study sets it itself (see measure and seeds)")
        _check_keys(changes, EQUAL, where, "it is the same for all variants, and belongs in base")
        made[name] = _train_config(_joined(config.base, changes), config.measure, where)
    runs = [Run(variant=START, seed=config.seeds[0], config=start, measure=config.measure)]
    for seed in config.seeds:
        for name, settings in made.items():
            seeded = replace(settings, seed=seed)
            runs.append(Run(variant=name, seed=seed, config=seeded, measure=config.measure))
    return Study(config=config, runs=tuple(runs))


def _check_names(config: StudyConfig) -> None:
    for name in config.variants:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name) or name == START:
            raise ValueError(
                f"variants: {name!r} cannot be a variant's name: use letters, digits and _ . + -, "
                f"in quotes where it would be a number, and not {START!r}"
            )
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise ValueError(f"seeds is {config.seeds}; it must be different numbers from 0 on")


def _check_keys(given: Mapping[str, Any], refused: Sequence[str], where: str, why: str) -> None:
    for name, _ in flatten(given):
        if any(name == key or name.startswith(f"{key}.") for key in refused):
            raise ValueError(f"{where}: {name} cannot be set there: {why}")


def _joined(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The base with a variant's changes, setting by setting, options of the method too."""
    first, second = dict(flatten(base)), dict(flatten(changes))
    options = {**(first.get("method_options") or {}), **(second.get("method_options") or {})}
    return {**first, **second, "method_options": options}


def _train_config(settings: Mapping[str, Any], measure: MeasureConfig, where: str) -> TrainConfig:
    config: TrainConfig = read(TrainConfig, settings, where)
    curve = EvaluationConfig(
        items=measure.curve_items,
        items_during=measure.curve_items,
        every=measure.every,
        k=measure.k,
    )
    config = replace(config, evaluation=curve, checkpoint_every=0, samples_every=0)
    try:
        check(config)
        build(config.method, config.method_options)
        if config.data != "builtin":
            raise ValueError(
                f"data is {config.data!r}; a study is of the built-in task, whose reference "
                "solutions tell what the detector ought to find"
            )
        if config.dataset.difficulty not in GRIDS:
            raise ValueError(
                f"dataset.difficulty is {config.dataset.difficulty}; it must be one of "
                f"{', '.join(map(str, GRIDS))}"
            )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return config
