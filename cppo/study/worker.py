"""The process of one run: trains, measures on the way and at the end, and writes one small file.

What is asked of it (see `request`) is one JSON value on its standard input.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cppo.config import MeasureConfig, TrainConfig
from cppo.console import set_up_logging
from cppo.doctor.environment import describe
from cppo.settings import build
from cppo.study.measure import measure_answers, measure_perception
from cppo.study.meter import Meter
from cppo.study.plan import Run
from cppo.study.results import write
from cppo.trainer import Trainer

KEPT = (  # of a step's metrics, beside what the meter counts
    "accuracy",
    "reward",
    "response_tokens",
    "kept_groups",
    "grad_norm",
    "rollout_seconds",
    "views_seconds",
    "update_seconds",
    "peak_memory_gib",
)
FACTS = (
    *("cppo", "code", "python", "processor", "device", "threads", "attention in groups"),
    *("torch", "transformers"),
)


def request(run: Run, *, folder: Path, result: Path, jobs: int) -> dict[str, Any]:
    """What a worker is asked for, as plain values."""
    return {
        "variant": run.variant,
        "seed": run.seed,
        "config": dataclasses.asdict(run.config),
        "measure": dataclasses.asdict(run.measure),
        "settings": run.settings(),
        "folder": str(folder),
        "result": str(result),
        "jobs": jobs,
        "parent": os.getpid(),
    }


def work(asked: Mapping[str, Any]) -> int:
    """One run; returns the exit status: 0 where its file is written."""
    started = time.monotonic()
    config: TrainConfig = build(TrainConfig, asked["config"])
    measure: MeasureConfig = build(MeasureConfig, asked["measure"])
    steps: dict[str, list[float | None]] = {}
    perception: dict[int, dict[str, float]] = {}

    def after_step(step: int, metrics: Mapping[str, float]) -> None:
        if os.getppid() != asked["parent"]:
            raise SystemExit("the study that this run belongs to is gone")
        for name, value in {**{n: metrics.get(n) for n in KEPT}, **meter.end_step()}.items():
            steps.setdefault(name, []).append(_rounded(value))
        if step % measure.every == 0 or step == config.steps:
            perception[step] = measure_perception(trainer, measure)

    folder = Path(asked["folder"])
    trainer = Trainer(config, folder, after_step=after_step)
    meter = Meter(trainer)
    try:
        facts = describe(trainer.backend)
        perception[0] = measure_perception(trainer, measure)
        summary = trainer.train()
        if not summary["finished"]:
            return 128 + int(summary["stopped_by"])
        record = {
            **{name: asked[name] for name in ("variant", "seed", "settings", "jobs")},
            "curve": _curve(folder, perception, f"avg@{measure.k}"),
            "answers": measure_answers(trainer, measure),
            "steps": steps,
            "seconds": time.monotonic() - started,
            "environment": {name: facts[name] for name in FACTS if name in facts},
        }
    finally:
        trainer.close()
    write(Path(asked["result"]), record)
    return 0


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)


def _curve(
    folder: Path, perception: Mapping[int, Mapping[str, float]], metric: str
) -> list[dict[str, float]]:
    """The trainer's own evaluations, and beside each what the detector's ROC AUC was."""
    lines = (folder / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    accuracy = {record["step"]: record[metric]["value"] for record in map(json.loads, lines)}
    return [
        {"step": step, "accuracy": accuracy[step], **scores} for step, scores in perception.items()
    ]


if __name__ == "__main__":
    set_up_logging()
    sys.exit(work(json.load(sys.stdin)))
