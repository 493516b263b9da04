"""Reinforcement learning that makes vision-language models look before they reason.

The pieces to embed are importable from here and load on first use, so that `import cppo` touches
neither torch nor a device.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "METHODS": "cppo.methods",
    "aggregate": "cppo.objective",
    "clipped_surrogate": "cppo.objective",
    "contrastive_perception_loss": "cppo.objective",
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
