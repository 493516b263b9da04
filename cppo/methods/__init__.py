"""Methods: what each algorithm computes from the statistics of scored tokens, one file each.

A method says which other views of the images it needs (`views`) and whether its reward asks the
policy again without them (`second_look`), turns rewards into advantages, decides without gradient
which tokens count how much (`plan`) and gives the terms of the loss (`terms`). It knows no model,
no data and no device.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from cppo.methods.cppo import CPPO, CPPO_AREAL
from cppo.methods.dapo import DAPO
from cppo.methods.dr_grpo import DR_GRPO
from cppo.methods.dvrp import DVRP
from cppo.methods.grpo import GRPO
from cppo.methods.gspo import GSPO
from cppo.methods.method import Average, Plan, Scores, Term, Tokens, View
from cppo.methods.noisy_rollout import NoisyRollout
from cppo.methods.papo import PAPO, PAPO_DAPO
from cppo.methods.pgpo import PGPO
from cppo.methods.vision_sr1 import VisionSR1
from cppo.methods.visionary_r1 import VisionaryR1
from cppo.methods.vppo import VPPO

METHODS: dict[str, Callable[..., GRPO]] = {
    "grpo": GRPO,
    "dapo": DAPO,
    "dr_grpo": DR_GRPO,
    "gspo": GSPO,
    "cppo": CPPO,
    "cppo_areal": CPPO_AREAL,
    "papo": PAPO,
    "papo_dapo": PAPO_DAPO,
    "vppo": VPPO,
    "pgpo": PGPO,
    "dvrp": DVRP,
    "noisy_rollout": NoisyRollout,
    "vision_sr1": VisionSR1,
    "visionary_r1": VisionaryR1,
}


def build(name: str, options: Mapping[str, Any] | None = None) -> GRPO:
    """The method called `name`, its own settings as published, but for `options`.

    Raises ValueError for an unknown name or option (naming the nearest) and for a value out of
    range.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is not known{_nearest(name, list(METHODS))}")
    method, given = METHODS[name], dict(options or {})
    known = [field.name for field in dataclasses.fields(method())]
    for option in given:
        if option not in known:
            raise ValueError(f"method {name!r} has no option {option!r}{_nearest(option, known)}")
    try:
        return method(**given)
    except TypeError as error:
        raise ValueError(
            f"method {name!r}: an option has a value of the wrong type: {error}"
        ) from error


def _nearest(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(sorted(known))}"


__all__ = [
    "CPPO",
    "DVRP",
    "GRPO",
    "METHODS",
    "PAPO",
    "PGPO",
    "VPPO",
    "Average",
    "NoisyRollout",
    "Plan",
    "Scores",
    "Term",
    "Tokens",
    "View",
    "VisionSR1",
    "VisionaryR1",
    "build",
]
