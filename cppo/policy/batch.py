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
    """A response to score, and after which prompt.

    `against`: another row of the same call and of the same response, after the prompt as it is;
    KL(there || here) is then computed for each token, over the whole vocabulary.
    """

    prompt: Prompt
    response: Tensor  # (length,) ids
    against: Row | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows as the language model takes them: S sequences of L positions."""

    ids: Tensor  # (S, L)
    positions: Tensor  # (axes, S, L)
    image_mask: Tensor  # (S, L), only within prompts: a sampled placeholder is no image
    shown: Sequence[Prompt]  # whose images those are, in order
    options: Mapping[str, Any]  # of the model's forward: what attends to what
    before: Tensor  # (response tokens, row by row) of S * L: what predicts each, the one before it
