"""What passes between the trainer and a method: records of tensors, and nothing that computes.

Shapes: B responses, T tokens (right-padded).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    its item is read; "item", once for all images of an item and for good. `blind`: the images'
    tokens are not attended to; pixels and positions are as they are, and `perturbations` is empty.
    `gradient`: the loss differentiates through this view. `detects`: `plan` reads this view, and
    the image as it is, of the responses that it is scored for; they are then scored before the
    loss. A plan reads no scores of other responses: they may be zero. `positive_only`: only
    responses with a positive advantage are scored, `nonzero_only`: only those with an advantage;
    for the others the view's tensors hold zeros. `read_on`: the loss reads this view on the tokens
    of the plan's average of this name, and on no others, which may be zero; empty: on all.
    `full_divergence`: the divergence of the policy on the image from that on this view is computed
    over the whole vocabulary too.
    """

    name: str
    perturbations: Perturbations = field(default_factory=dict)
    draw: Draw = "image"
    blind: bool = False
    gradient: bool = True
    detects: bool = False
    positive_only: bool = False
    nonzero_only: bool = False
    read_on: str = ""
    full_divergence: bool = False

    def __post_init__(self) -> None:
        # A constant view is scored by itself, and has nothing to be held against.
        assert self.gradient or not self.full_divergence

    def needed(self, advantages_B: Tensor) -> Tensor:
        """The responses this view is scored for, (B,) bool."""
        if self.positive_only:
            return positive(advantages_B)
        if self.nonzero_only:
            return nonzero(advantages_B)
        return torch.ones_like(advantages_B, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probability and entropy of each response token, both (B, T), in nats.

    `divergence`, (B, T) in nats, where the view asks for it: KL(policy on the image || policy on
    this view) over the whole vocabulary, differentiable where the view has a gradient.
    """

    logprobs: Tensor
    entropy: Tensor
    divergence: Tensor | None = None

    @staticmethod
    def combined(function: Callable[..., Tensor], *scores: Scores) -> Scores:
        """The same of each statistic; of the divergence only where all have one."""
        divergences = [each.divergence for each in scores]
        return Scores(
            logprobs=function(*(each.logprobs for each in scores)),
            entropy=function(*(each.entropy for each in scores)),
            divergence=None if any(d is None for d in divergences) else function(*divergences),
        )


def _alone(values_B: Tensor) -> Tensor:
    return values_B


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """All a method sees of a batch. `seen` is scored on the image as it is.

    `gather` takes values (B,) of this process's responses and returns those of all processes'
    responses in the mini-batch, (N,). It is a collective: a plan that calls it calls it exactly
    once, in every process, and its method plans ahead (see `GRPO.plans_ahead`).
    """

    mask: Tensor  # (B, T) bool, True on response tokens
    advantages: Tensor  # (B,)
    old_logprobs: Tensor  # (B, T), of the policy that is being improved upon
    seen: Scores
    views: Mapping[str, Scores] = field(default_factory=dict)
    reference_logprobs: Tensor | None = None  # (B, T)
    gather: Callable[[Tensor], Tensor] = _alone
    progress: float = 0.0  # share of the training that is done, in [0, 1]


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


def nonzero(advantages_B: Tensor) -> Tensor:
    """The responses better or worse than their group's mean; a broken advantage (NaN) shows."""
    return ~(advantages_B.abs() <= 1e-6)
