"""How things are measured: in turn, several times; and the memory they need for a while."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from cppo.device import Backend


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: `subject` over `peer`, a ratio for each repeat."""

    what: str
    subject: str
    peer: str
    ratios: list[float]
    subject_values: list[float]
    peer_values: list[float]
    unit: str
    target: float | None = None

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def compare(
    what: str,
    subjects: Mapping[str, Callable[[], object]],
    *,
    peer: str,
    repeats: int,
    targets: Mapping[str, float] | None = None,
) -> list[Row]:
    """Runs all in turn, `repeats` times after one to warm up; each against the peer, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 1):
        for name, run in subjects.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            if repeat:
                times[name].append(time.perf_counter() - started)
    return [
        Row(
            what=what,
            subject=name,
            peer=peer,
            ratios=[a / b for a, b in zip(values, times[peer], strict=True)],
            subject_values=values,
            peer_values=times[peer],
            unit="s",
            target=(targets or {}).get(name),
        )
        for name, values in times.items()
        if name != peer
    ]


def extra_bytes(backend: Backend, run: Callable[[], object]) -> int:
    """The most memory held during a run above what was held before it; what it returns stays."""
    run()  # what is allocated once and for all
    backend.memory.release()
    backend.memory.reset_peak()
    before = backend.memory.peak_bytes()
    run()
    synchronize()
    return backend.memory.peak_bytes() - before


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
