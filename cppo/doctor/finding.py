"""What a section of the doctor finds, and what it works with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cppo.device import Backend
from cppo.processes import Processes

Verdict = Literal["passed", "failed", "not run", "info"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. `detail` says what else a person wants to know of it."""

    name: str
    verdict: Verdict
    measured: float | None = None
    limit: float | None = None
    unit: str = ""
    detail: str = ""

    @property
    def badness(self) -> float:
        """How near it came to its limit; infinite where it failed."""
        if self.verdict == "failed":
            return math.inf
        if self.measured is None or not self.limit:
            return 0.0
        return self.measured / self.limit


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a section may use: the backend, and this process among those that examine it."""

    backend: Backend
    processes: Processes

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def synchronize(self) -> None:
        """Waits for what the device still has to do."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


Section = Callable[[Examination], Iterator[Finding]]


def at_most(
    name: str, measured: float, limit: float, *, unit: str = "", detail: str = ""
) -> Finding:
    """Passed where the measured value is within its limit; a NaN is not."""
    return Finding(
        name=name,
        verdict="passed" if measured <= limit else "failed",
        measured=measured,
        limit=limit,
        unit=unit,
        detail=detail,
    )


def holds(name: str, condition: bool, detail: str = "") -> Finding:
    """Passed where a condition holds."""
    return Finding(name=name, verdict="passed" if condition else "failed", detail=detail)


def not_run(name: str, why: str) -> Finding:
    return Finding(name=name, verdict="not run", detail=why)


def relative_error(measured: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth, in float64."""
    truth = truth.detach().cpu().double()  # there, since not every device has float64
    return float((measured.detach().cpu().double() - truth).norm() / truth.norm())


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
