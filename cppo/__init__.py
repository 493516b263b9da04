"""Reinforcement learning that makes vision-language models look before they reason.

The pieces to embed are importable from here and load on first use, so that `import cppo` touches
neither torch nor a device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cppo.detector import perception_mask as perception_mask
    from cppo.methods import METHODS as METHODS
    from cppo.methods import build as build
    from cppo.objective import aggregate as aggregate
    from cppo.objective import clipped_surrogate as clipped_surrogate
    from cppo.objective import contrastive_perception_loss as contrastive_perception_loss
    from cppo.objective import count_units as count_units
    from cppo.objective import divergence as divergence
    from cppo.objective import group_advantages as group_advantages
    from cppo.statistics import token_statistics as token_statistics

_HOMES = {
    "METHODS": "cppo.methods",
    "aggregate": "cppo.objective",
    "build": "cppo.methods",
    "clipped_surrogate": "cppo.objective",
    "contrastive_perception_loss": "cppo.objective",
    "count_units": "cppo.objective",
    "divergence": "cppo.objective",
    "group_advantages": "cppo.objective",
    "perception_mask": "cppo.detector",
    "token_statistics": "cppo.statistics",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cppo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
