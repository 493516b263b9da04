"""CPPO: Contrastive Perception Policy Optimization (2601.00501).

Perception tokens are the response tokens whose entropy rises when the image loses what matters.
On them, in responses with a positive advantage, the policy is drawn towards what it says under a
view that preserves the content and away from what it says under a view that removes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cppo import objective
from cppo.detector import Count, Keep, Ties, perception_mask, select_tokens
from cppo.methods.grpo import GRPO
from cppo.methods.method import (
    Average,
    Draw,
    Perturbations,
    Plan,
    Scores,
    Term,
    Tokens,
    View,
    positive,
)
from cppo.methods.options import require, require_choice, require_perturbations
from cppo.methods.schedule import Schedule, anneal
from cppo.objective import contrast_divergences

PRESERVED: Perturbations = {"colour_jitter": {}, "perspective": {}, "rotation": {}}
REMOVED: Perturbations = {"occlusion": {}, "zoom_crop": {}}
Divergence = Literal["k3", "k1", "full"]
RankBy = Literal["relative", "absolute", "divergence"]
CHOICES = {
    "weight_schedule": Schedule,
    "divergence": Divergence,
    "keep": Keep,
    "count": Count,
    "ties": Ties,
    "score": RankBy,
    "draw": Draw,
}


@dataclass(frozen=True, kw_only=True)
class CPPO(GRPO):
    """GRPO plus `weight` times the contrastive perception loss.

    What is CPPO's own is by default as in its synchronous code; what goes beyond the publication is
    marked (ours). The recipe is GRPO's: the published one adds a reference term of 0.01, a dual
    clip of 3.0 and averages over each micro-batch (see `configs/cppo-*`).

    Args:
        weight: Of the contrastive term (lambda).
        weight_schedule: How this weight falls to zero over the training: "constant" (it does not),
            "linear" or "cosine" (ours).
        policy_term: Whether GRPO's own policy term is in the loss; without it the contrast trains
            alone (ours).
        contrast_temperature: Of the contrastive term (tau).
        divergence: Between views: "k3" or "k1", estimates at the sampled token; "full", over the
            whole vocabulary (ours).
        stop_gradient: Which of "image", "preserved" and "removed" the contrast sends no gradient
            to (ours); not with "full", whose divergences carry the image's gradient in them.
        keep: Which of the candidates are perception tokens: "fraction", as published, the
            `fraction` of them that score best; "share_of_rise", the best that make up `fraction`
            of the sum of their scores (ours); "rise_above", those that score above `threshold`
            (ours). See `cppo.detector.select_tokens`.
        fraction: The share that is kept.
        threshold: What is to be exceeded where keep is "rise_above".
        count: The number that is kept is rounded down ("floor") or up ("ceil").
        ties: Of tokens tied at the last place, "keep" takes all and "cut" the earliest.
        gate: Only responses with a positive advantage are contrasted, as published; without it
            all are (ours).
        score: "relative" or "absolute": candidates are the tokens whose entropy rises, ranked by
            that rise, see `cppo.detector.rise`. "divergence": candidates are the tokens whose
            divergence of the image from the removed view is positive, ranked by it, whatever their
            entropy does (ours).
        draw: A view is drawn anew for each image each time its item is read ("image"), or once for
            all images of an item and for good ("item").
        preserving, removing: Perturbations (name to parameters) of which one is drawn; what is
            given replaces the defaults as a whole.
        removing_views: Removing views, drawn independently, whose entropies and divergences are
            averaged (ours).
    """

    weight: float = 0.01
    weight_schedule: Schedule = "constant"
    policy_term: bool = True
    contrast_temperature: float = 0.1
    divergence: Divergence = "k3"
    stop_gradient: Sequence[str] = field(default_factory=list)
    keep: Keep = "fraction"
    fraction: float = 0.5
    threshold: float = 0.0
    count: Count = "floor"
    ties: Ties = "keep"
    gate: bool = True
    score: RankBy = "relative"
    draw: Draw = "image"
    preserving: Perturbations = field(default_factory=lambda: dict(PRESERVED))
    removing: Perturbations = field(default_factory=lambda: dict(REMOVED))
    removing_views: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        tau, stopped = self.contrast_temperature, set(self.stop_gradient)
        views = {"image", "preserved", "removed"}
        require("weight", self.weight, self.weight > 0, "above 0; without the contrast, take grpo")
        require("fraction", self.fraction, 0 < self.fraction <= 1, "above 0, at most 1")
        require("threshold", self.threshold, self.threshold >= 0, "at least 0")
        reached = (self.keep, self.score) != ("rise_above", "relative") or self.threshold < 1
        require("threshold", self.threshold, reached, "below 1: no relative rise reaches that")
        read = self.keep == "rise_above" or not self.threshold
        require("threshold", self.threshold, read, "0, the default, unless keep is 'rise_above'")
        require("contrast_temperature", tau, tau > 0, "above 0")
        require("removing_views", self.removing_views, self.removing_views >= 1, "at least 1")
        require("stop_gradient", self.stop_gradient, stopped < views, f"some of {sorted(views)}")
        for option, choices in CHOICES.items():
            require_choice(option, getattr(self, option), choices)
        alone = self.divergence != "full" or not stopped
        require("stop_gradient", self.stop_gradient, alone, "empty where divergence is 'full'")
        require_perturbations("preserving", self.preserving)
        require_perturbations("removing", self.removing)

    @property
    def removed(self) -> tuple[str, ...]:
        """The names of the removing views."""
        return ("removed", *(f"removed_{n}" for n in range(2, self.removing_views + 1)))

    @property
    def views(self) -> tuple[View, ...]:
        preserved = View(
            name="preserved",
            perturbations=self.preserving,
            draw=self.draw,
            gradient="preserved" not in self.stop_gradient,
            positive_only=self.gate,
            read_on="perception",
            full_divergence=self.divergence == "full",
        )
        learns = "removed" not in self.stop_gradient
        removed = replace(preserved, perturbations=self.removing, gradient=learns, detects=True)
        return (preserved, *(replace(removed, name=name) for name in self.removed))

    @property
    def plans_ahead(self) -> bool:
        return self.average_over == "global"  # over the perception tokens of all micro-batches

    def detect(self, seen: Scores, removed: Sequence[Scores], mask: Tensor) -> Tensor:
        """The perception tokens among those of the mask, (B, T) bool.

        `removed` holds the scores on each removing view, in the order of `self.removed`.
        """
        select: dict[str, Any] = {
            "keep": self.keep,
            "fraction": self.fraction,
            "threshold": self.threshold,
            "count": self.count,
            "ties": self.ties,
        }
        if self.score == "divergence":
            distance = _mean([self._divergence(seen, view) for view in removed])
            return select_tokens(distance, mask & (distance > 0), **select)
        entropy = _mean([view.entropy for view in removed])
        return perception_mask(seen.entropy, entropy, mask, score=self.score, **select)

    def plan(self, tokens: Tokens) -> Plan:
        gated = positive(tokens.advantages)[:, None] if self.gate else True
        removed = [tokens.views[name] for name in self.removed]
        perception = self.detect(tokens.seen, removed, tokens.mask & gated)
        plan = super().plan(tokens)
        averages = {**plan.averages, "perception": Average(mask=perception)}
        if not self.policy_term:
            del averages["policy"]
        return replace(plan, averages=averages)

    def terms(self, tokens: Tokens, plan: Plan) -> dict[str, Term]:
        def unless_stopped(name: str, scores: Scores) -> Scores:
            stopped = name in self.stop_gradient
            return Scores.combined(Tensor.detach, scores) if stopped else scores

        seen = unless_stopped("image", tokens.seen)
        preserved = unless_stopped("preserved", tokens.views["preserved"])
        removed = [unless_stopped("removed", tokens.views[name]) for name in self.removed]
        contrast = contrast_divergences(
            self._divergence(seen, preserved),
            _mean([self._divergence(seen, view) for view in removed]),
            plan.averages["perception"].mask,
            temperature=self.contrast_temperature,
        )
        weight = anneal(self.weight, self.weight_schedule, tokens.progress)
        terms = super().terms(tokens, plan)
        terms["perception"] = Term(per_token=contrast, weight=weight)
        if not self.policy_term:
            del terms["policy"]
        return terms

    def _divergence(self, seen: Scores, view: Scores) -> Tensor:
        """Of the policy on the image from that on a view, (B, T)."""
        if self.divergence == "full":
            assert view.divergence is not None
            return view.divergence
        return objective.divergence(seen.logprobs, view.logprobs, self.divergence)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


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
