"""What is scored in one call, and how the language model takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from cppo.policy.prompts import Prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A response to score: after which prompt, and seeing which pixels."""

    prompt: Prompt
    pixels: Tensor
    response: Tensor  # (length,) ids


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows as the language model takes them: S sequences of L positions."""

    ids: Tensor  # (S, L)
    positions: Tensor  # (axes, S, L)
    image_mask: Tensor  # (S, L), only within prompts: a sampled placeholder is no image
    shown: Sequence[Row]  # whose images those are, in order
    options: Mapping[str, Any]  # of the model's forward: what attends to what
    before: Tensor  # (response tokens, row by row) of S * L: what predicts each, the one before it
