"""The run folder: everything a run leaves behind for a person, or for the next run, to read.

config.yaml     the settings, defaults included
metrics.jsonl   one line a step
evaluation.jsonl  one line an evaluation, with intervals
samples.jsonl   sample rollouts with per-token scores
skipped.jsonl   rows of the data that could not be used, and why
summary.json    the outcome
tensorboard/    the metrics again
checkpoints/    to resume from
model/          the final model, for `from_pretrained`
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

log = logging.getLogger(__name__)


def claim(method: str, model: str) -> Path:
    """A new folder under runs/, made at once, so that no run of the same second has it too."""
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{method}-{Path(model).name}"
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("numbers do not end")


class RunFolder:
    """Writes into a run's folder. With `active` False (other processes than the first), nothing.

    The folder is locked until `close`, or until its process ends; ValueError where another run
    holds it.
    """

    def __init__(self, path: Path, *, active: bool = True) -> None:
        self.path, self._active = path, active
        self._board: Any = None
        self._purged_from: int | None = None  # in TensorBoard's log
        self._lock: TextIO | None = None
        if active:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def skipped(self) -> Path:
        return self.path / "skipped.jsonl"

    def write_config(self, settings: Mapping[str, Any]) -> None:
        if self._active:
            self._replace("config.yaml", yaml.safe_dump(_plain(settings), sort_keys=False))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        if self._active:
            (self.path / "summary.json").write_text(json.dumps(_plain(summary), indent=1) + "\n")

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._append("metrics.jsonl", {"step": step, **metrics})
        self._plot(step, metrics)

    def log_evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        self._append("evaluation.jsonl", {"step": step, **results})
        estimates = {**results, **results.get("kinds", {})}
        values = {
            f"eval/{n}": r.get("value") for n, r in estimates.items() if isinstance(r, Mapping)
        }
        self._plot(step, {name: v for name, v in values.items() if isinstance(v, float)})

    def log_samples(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            self._append("samples.jsonl", record)

    def rewind(self, step: int) -> None:
        """Drops what a run that is being resumed at `step` will log again: all later steps, and the
        evaluation after the last one."""
        if not self._active:
            return
        self._purged_from = step + 1
        for name in ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl"):
            path = self.path / name
            if path.exists():
                # Not splitlines: responses may hold line separators that JSON leaves as they are.
                lines = path.read_text(encoding="utf-8").split("\n")
                kept = [line for line in lines if _stays(line, step)]
                self._replace(name, "".join(f"{line}\n" for line in kept))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._lock is not None:
            self._lock.close()

    def _replace(self, name: str, text: str) -> None:
        """Writes the file whole or, where the process dies, leaves it as it was."""
        scratch = self.path / f"{name}.new"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(self.path / name)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if self._active:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(record), ensure_ascii=False) + "\n")

    def _plot(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._active:
            return
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(self.path / "tensorboard"), purge_step=self._purged_from
            )
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)


def _locked(folder: Path) -> TextIO:
    """A file that holds the folder until it is closed."""
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ValueError(
            f"another run is at work in {folder}: wait until it has ended, or give another --output"
        ) from error
    except OSError as error:  # some file systems know no locks
        log.warning("%s is not locked, keep other runs away from it: %s", folder, error)
    return lock


def _stays(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
        return bool(record["step"] <= step and record.get("name") != "after")
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # a line cut short when the process died


def _plain(value: Any) -> Any:
    """Only what JSON and YAML have: records as mappings, non-finite numbers as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
