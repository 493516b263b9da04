"""PGPO: Perception-Grounded Policy Optimization (2604.01840), on DAPO's recipe.

A token depends on the image as far as the policy says otherwise without seeing it:

    S = e^d - d - 1, d = l_blind - l      k3 against the image-blind policy, at the sampled token
    I = (log(1+S) - min) / (max - min)    min and max over the response
    w = I / tau                           where I is below the threshold tau
    w = 1 + beta (I - tau) / (1 - tau)    elsewhere; then scaled to mean 1 over the response

The token's advantage is A w. Blind means that the images' tokens are not attended to, positions
unchanged. Weights are constants. The authors have released no code; their development code is
reported to take tau as a quantile of the response's I, to keep w at 0.1 or above and not to scale
to mean 1: `threshold="quantile", floor=0.1, conserve_mass=False`. S is of the policy as it is at
each optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cppo.detector import share_of
from cppo.methods.grpo import GRPO
from cppo.methods.method import Plan, Tokens, View
from cppo.methods.options import require, require_choice
from cppo.objective import LOG_RATIO_BOUND

Threshold = Literal["absolute", "quantile"]
EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class PGPO(GRPO):
    """DAPO with advantages weighted token by token by how much they depend on the image.

    Args:
        threshold: What `tau` is: "absolute", a value of I; "quantile", the share of the response's
            tokens below it.
        tau: The threshold, in [0, 1].
        beta: How far weights grow above the threshold.
        floor: Least weight below the threshold.
        conserve_mass: Scale the weights of a response to mean 1.
    """

    clip_high: float = 0.28
    resample: bool = True
    threshold: Threshold = "absolute"
    tau: float = 0.4
    beta: float = 2.0
    floor: float = 0.0
    conserve_mass: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("threshold", self.threshold, Threshold)
        require("tau", self.tau, 0 <= self.tau <= 1, "from 0 to 1")
        require("beta", self.beta, self.beta >= 0, "at least 0")
        require("floor", self.floor, 0 <= self.floor <= 1, "from 0 to 1")

    @property
    def views(self) -> tuple[View, ...]:
        view = View(name="blind", blind=True, gradient=False, detects=True, nonzero_only=True)
        return (view,)

    def weights(self, logprobs_BT: Tensor, blind_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Each token's weight, (B, T); one outside the mask.

        A response none of whose tokens depends on the image more than another, by 1e-8, keeps
        weights of one: there is nothing to tell them apart by but rounding.
        """
        d = (blind_logprobs_BT - logprobs_BT).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        dependency = torch.log1p(torch.expm1(d) - d)
        least = dependency.masked_fill(~mask_BT, torch.inf).amin(-1, keepdim=True)
        span = dependency.masked_fill(~mask_BT, -torch.inf).amax(-1, keepdim=True) - least
        importance = torch.where(mask_BT, (dependency - least) / (span + EPSILON), 0.0)
        tau = self._tau(importance, mask_BT)
        low = (importance / (tau + EPSILON)).clamp(min=self.floor)
        high = 1 + self.beta * (importance - tau) / (1 - tau + EPSILON)
        weights = torch.where(mask_BT, torch.where(importance < tau, low, high), 0.0)
        if self.conserve_mass:
            length = mask_BT.sum(-1, keepdim=True)
            weights = weights * length / weights.sum(-1, keepdim=True)
        return torch.where(mask_BT & ~(span <= EPSILON), weights, 1.0)

    def _tau(self, importance_BT: Tensor, mask_BT: Tensor) -> Tensor | float:
        if self.threshold == "absolute" or self.tau == 0:
            return self.tau
        ranked = importance_BT.masked_fill(~mask_BT, torch.inf).sort(dim=-1).values
        length = mask_BT.sum(-1, keepdim=True)
        below = torch.minimum(share_of(length, self.tau), (length - 1).clamp(min=0))
        return ranked.gather(-1, below)

    @property
    def plans_ahead(self) -> bool:
        return False  # weights are a response's own, and all tokens are averaged over

    def plan(self, tokens: Tokens) -> Plan:
        plan = super().plan(tokens)
        weights = self.weights(tokens.seen.logprobs, tokens.views["blind"].logprobs, tokens.mask)
        return replace(plan, advantages=plan.advantages * weights.detach())
