"""Schedules: how the weight of a term falls over the training."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def anneal(weight: float, schedule: Schedule, progress: float) -> float:
    """`weight` where `progress`, the share of the training that is done, is 0; 0 where it is 1.

    "linear" falls evenly; "cosine" along half a wave, slowly at both ends; "constant" stays.
    """
    if schedule == "linear":
        return weight * (1 - progress)
    if schedule == "cosine":
        return weight * (1 + math.cos(math.pi * progress)) / 2
    return weight
