"""VPPO: Visually-Perceptive Policy Optimization (2510.09285), on DAPO's recipe.

A token depends on the image as far as the policy says otherwise where patches are masked: S = k3 of
the masked view at the sampled token, in [0, 10], a constant.

Token filter: of each response only the ceil(0.4 T) tokens with the highest S give gradient; the
loss is still averaged over all tokens. Trajectory scaling: with n the mean S of a response, min-max
normalised over the mini-batch, its advantage is multiplied by

    low + n (top - low), top = low + (1 - low) / (mean(n) + 1e-8)

which has mean 1 over the responses; where max - min is at most 1e-6, by 1. An entropy penalty is
added: *minimised*, mean(-l) over the tokens. Responses without an advantage are not scored and take
part in neither.

The authors' code takes the minimum and maximum over one process's share of the mini-batch
(`scale_over="process"`) and mean(n) over each micro-batch; S is of the policy that sampled, where
here it is of the policy at each optimizer step. It draws a mask for each response, each patch by
itself; here a prompt's responses share one, and the number of patches is exact (`patch_mask`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from cppo.detector import select_tokens
from cppo.methods.grpo import GRPO
from cppo.methods.method import Average, Perturbations, Plan, Term, Tokens, View, nonzero
from cppo.methods.options import require, require_choice, require_perturbations
from cppo.objective import divergence

ScaleOver = Literal["global", "process"]


@dataclass(frozen=True, kw_only=True)
class VPPO(GRPO):
    """DAPO with a token filter, and advantages scaled by how much a response depends on the image.

    The defaults are those of the 7B model. Filter alone: `scale_low=1`; scaling alone:
    `fraction=1`.

    Args:
        fraction: Share of each response's tokens that give gradient.
        scale_low: Least factor of an advantage.
        scale_over: Mini-batch that factors are normalised over: "global", that of all processes;
            "process", the process's own.
        entropy_weight: Of the entropy penalty.
        masking: Perturbations (name to parameters) of which one is drawn for the masked view; what
            is given replaces the default as a whole.
    """

    clip_high: float = 0.28
    resample: bool = True
    fraction: float = 0.4
    scale_low: float = 0.9
    scale_over: ScaleOver = "global"
    entropy_weight: float = 0.06
    masking: Perturbations = field(
        default_factory=lambda: {"patch_mask": {"ratio": 0.5, "patch_pixels": 14, "fill": "black"}}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require("fraction", self.fraction, 0 < self.fraction <= 1, "above 0, at most 1")
        require("scale_low", self.scale_low, 0 <= self.scale_low <= 1, "from 0 to 1")
        require("entropy_weight", self.entropy_weight, self.entropy_weight >= 0, "at least 0")
        require_choice("scale_over", self.scale_over, ScaleOver)
        require_perturbations("masking", self.masking)

    @property
    def views(self) -> tuple[View, ...]:
        return (
            View(
                name="masked",
                perturbations=self.masking,
                gradient=False,
                detects=True,
                nonzero_only=True,
            ),
        )

    @property
    def plans_ahead(self) -> bool:
        return self.scale_low < 1  # responses are weighed against each other

    def plan(self, tokens: Tokens) -> Plan:
        plan, scored = super().plan(tokens), tokens.mask & nonzero(tokens.advantages)[:, None]
        dependency = divergence(tokens.seen.logprobs, tokens.views["masked"].logprobs, "k3")
        dependency = torch.where(scored, dependency.detach().clamp(min=0), 0.0)
        kept = select_tokens(dependency, scored, fraction=self.fraction, count="ceil", ties="cut")
        advantages = plan.advantages * kept
        if self.scale_low < 1:
            means = dependency.sum(-1) / scored.sum(-1).clamp(min=1)
            means = torch.where(scored.any(-1), means, -1.0)  # none is negative: told apart by this
            everyone = tokens.gather(means) if self.scale_over == "global" else means
            advantages = advantages * self._scales(means, everyone)[:, None]
        averages = dict(plan.averages)
        if self.entropy_weight:
            averages["entropy"] = Average(mask=scored)
        return replace(plan, advantages=advantages, averages=averages)

    def _scales(self, means_B: Tensor, everyone_N: Tensor) -> Tensor:
        """The factor of each response's advantage, (B,)."""
        everyone = everyone_N[~(everyone_N < 0)]
        if not len(everyone) or everyone.max() - everyone.min() <= 1e-6:
            return torch.ones_like(means_B)
        least, span = everyone.min(), everyone.max() - everyone.min()
        step = (1 - self.scale_low) / (((everyone - least) / span).mean() + 1e-8)
        scales = self.scale_low + (means_B - least) / span * step
        return torch.where(means_B < 0, 1.0, scales)

    def terms(self, tokens: Tokens, plan: Plan) -> dict[str, Term]:
        terms = super().terms(tokens, plan)
        if self.entropy_weight:
            terms["entropy"] = Term(per_token=-tokens.seen.logprobs, weight=self.entropy_weight)
        return terms
