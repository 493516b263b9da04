"""CPPO: Contrastive Perception Policy Optimization (2601.00501).

Perception tokens are the response tokens whose entropy rises when the image loses what matters.
On them, in responses with a positive advantage, the policy is drawn towards what it says under a
view that preserves the content and away from what it says under a view that removes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import get_args

from PIL import Image
from torch import Tensor

from cppo.detector import Count, Score, Ties, perception_mask
from cppo.methods.grpo import GRPO, require
from cppo.methods.method import (
    Average,
    Draw,
    Perturbations,
    Plan,
    Term,
    Tokens,
    View,
    positive,
)
from cppo.objective import Divergence, contrastive_perception_loss
from cppo.perturb import PRESERVING, REMOVING, perturb

PRESERVED: Perturbations = {"colour_jitter": {}, "perspective": {}, "rotation": {}}
REMOVED: Perturbations = {"occlusion": {}, "zoom_crop": {}}
CHOICES = {"divergence": Divergence, "count": Count, "ties": Ties, "score": Score, "draw": Draw}


@dataclass(frozen=True, kw_only=True)
class CPPO(GRPO):
    """GRPO plus `weight` times the contrastive perception loss.

    The defaults are the paper's and its synchronous code's.

    Args:
        weight: Of the contrastive term (lambda).
        contrast_temperature: Of the contrastive term (tau).
        divergence: Estimate of the divergence between views, "k3" or "k1".
        fraction: Share of the tokens with rising entropy that count as perception tokens.
        count, ties, score: See `cppo.detector.perception_mask`.
        draw: See `View`.
        preserving, removing: Perturbations (name to parameters) of which one is drawn; what is
            given replaces the defaults as a whole.
    """

    weight: float = 0.01
    contrast_temperature: float = 0.1
    divergence: Divergence = "k3"
    fraction: float = 0.5
    count: Count = "floor"
    ties: Ties = "keep"
    score: Score = "relative"
    draw: Draw = "image"
    preserving: Perturbations = field(default_factory=lambda: dict(PRESERVED))
    removing: Perturbations = field(default_factory=lambda: dict(REMOVED))

    def __post_init__(self) -> None:
        super().__post_init__()
        tau = self.contrast_temperature
        require("weight", self.weight, self.weight >= 0, "at least 0")
        require("fraction", self.fraction, 0 < self.fraction <= 1, "above 0, at most 1")
        require("contrast_temperature", tau, tau > 0, "above 0")
        for option, choices in CHOICES.items():
            given, allowed = getattr(self, option), get_args(choices)
            require(option, given, given in allowed, f"one of {allowed}")
        for option in ("preserving", "removing"):
            given, known = getattr(self, option), {*PRESERVING, *REMOVING}
            if not isinstance(given, Mapping):
                raise TypeError(f"{option} must map perturbations to their parameters")
            require(option, set(given), given and set(given) <= known, f"some of {sorted(known)}")
            for name, parameters in given.items():  # bad ones show now, not at the first step
                perturb(Image.new("RGB", (8, 8)), name, seed=0, **parameters)

    @property
    def views(self) -> tuple[View, ...]:
        view = partial(View, draw=self.draw, positive_only=True)
        return (
            view(name="preserved", perturbations=self.preserving),
            view(name="removed", perturbations=self.removing, detects=True),
        )

    def detect(self, entropy_BT: Tensor, removed_entropy_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The perception tokens among those of the mask, (B, T) bool."""
        return perception_mask(
            entropy_BT,
            removed_entropy_BT,
            mask_BT,
            fraction=self.fraction,
            count=self.count,
            ties=self.ties,
            score=self.score,
        )

    def plan(self, tokens: Tokens) -> Plan:
        perception = self.detect(
            tokens.seen.entropy,
            tokens.views["removed"].entropy,
            tokens.mask & positive(tokens.advantages)[:, None],
        )
        plan = super().plan(tokens)
        return replace(plan, averages={**plan.averages, "perception": Average(mask=perception)})

    def terms(self, tokens: Tokens, plan: Plan) -> dict[str, Term]:
        contrast = contrastive_perception_loss(
            tokens.seen.logprobs,
            tokens.views["preserved"].logprobs,
            tokens.views["removed"].logprobs,
            plan.averages["perception"].mask,
            temperature=self.contrast_temperature,
            divergence=self.divergence,
        )
        perception = Term(per_token=contrast, weight=self.weight)
        return {**super().terms(tokens, plan), "perception": perception}


# The authors' asynchronous code. Its rewards enter as (r - 0.5) * 10, which normalising undoes;
# its behaviour weights correct for stale rollouts, which the trainer here does not make.
CPPO_AREAL = partial(
    CPPO,
    divergence="k1",
    count="ceil",
    ties="cut",
    clip_low=0.4,
    clip_high=0.4,
    batch_normalize=True,
    draw="item",
    preserving={**PRESERVED, "gaussian_blur": {}},
)
