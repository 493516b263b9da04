"""What passes between the trainer and a method: records of tensors, and nothing that computes.

Shapes: B responses, T tokens (right-padded).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cppo.objective import Aggregation

Perturbations = Mapping[str, Mapping[str, object]]  # name in the suite -> its parameters
Draw = Literal["image", "item"]


@dataclass(frozen=True, kw_only=True)
class View:
    """Another view of the images that a method wants its responses scored on.

    `draw` says how often one of `perturbations` is drawn: "image", anew for each image each time
    its item is read; "item", once for all images of an item and for good. `gradient`: the loss
    differentiates through this view. `detects`: `plan` reads this view, and the image as it is, of
    the responses that it is scored for; they are then scored before the loss. A plan reads no
    scores of other responses: they may be zero. `positive_only`: only responses with a positive
    advantage are scored; for the others the view's tensors hold zeros.
    """

    name: str
    perturbations: Perturbations
    draw: Draw = "image"
    gradient: bool = True
    detects: bool = False
    positive_only: bool = False

    def needed(self, advantages_B: Tensor) -> Tensor:
        """The responses this view is scored for, (B,) bool."""
        if self.positive_only:
            return positive(advantages_B)
        return torch.ones_like(advantages_B, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probability and entropy of each response token, both (B, T), in nats."""

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """All a method sees of a batch. `seen` is scored on the image as it is."""

    mask: Tensor  # (B, T) bool, True on response tokens
    advantages: Tensor  # (B,)
    old_logprobs: Tensor  # (B, T), of the policy that is being improved upon
    seen: Scores
    views: Mapping[str, Scores] = field(default_factory=dict)
    reference_logprobs: Tensor | None = None  # (B, T)


@dataclass(frozen=True, kw_only=True)
class Average:
    """Over which tokens a term is averaged, and how (see `cppo.objective.aggregate`)."""

    mask: Tensor  # (B, T) bool
    mode: Aggregation = "token-mean"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed before any gradient: one advantage per token, and each term's average."""

    advantages: Tensor  # (B, T)
    averages: Mapping[str, Average]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of the loss, (B, T); it enters as `weight` times its average."""

    per_token: Tensor
    weight: float = 1.0


def positive(advantages_B: Tensor) -> Tensor:
    """The responses better than their group's mean; rounding of a mean does not count."""
    return advantages_B > 1e-6
