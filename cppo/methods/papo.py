"""PAPO: Perception-Aware Policy Optimization (2507.06448).

On top of GRPO or DAPO the policy is to say something else where patches of the image are masked,
and to stay sure of what it says:

    loss - gamma mean k3(l, l_masked) + eta1 mean(-l) + eta2 mean(-l_masked)

over all response tokens, k3 clamped to 10, entropies estimated at the sampled token. The masked
branch is constant unless `learns_masked`: the divergence then moves the policy on the image alone,
and the second entropy term has no gradient at all. The authors' code computes the masked
log-probabilities once before the update, by default without ever giving them a gradient; one
released branch never back-propagates the added terms. Here they are of the policy at each optimizer
step. Its mask blackens each 14-pixel patch with probability 0.6, once for a prompt; here the number
of patches is exact (`patch_mask`).

Published: GRPO form, 3B gamma 0.02 without entropy terms, 7B gamma 0.02 and eta 0.05; without the
reference term gamma 0.01 and eta 0.03. DAPO form gamma 0.01 and eta 0.03.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from cppo.methods.grpo import GRPO
from cppo.methods.method import Average, Perturbations, Plan, Term, Tokens, View
from cppo.methods.options import require, require_perturbations
from cppo.objective import divergence

MASKED: Perturbations = {"patch_mask": {"ratio": 0.6, "patch_pixels": 14, "fill": "black"}}


@dataclass(frozen=True, kw_only=True)
class PAPO(GRPO):
    """GRPO plus a divergence from the masked view to be raised, and two entropies to be lowered.

    The defaults are those of the GRPO form for 3B models.

    Args:
        weight: Of the divergence (gamma).
        entropy_weight: Of the entropy on the image (eta1).
        masked_entropy_weight: Of the entropy on the masked view (eta2); a constant without
            `learns_masked`.
        learns_masked: The loss differentiates through the masked view too.
        masking: Perturbations (name to parameters) of which one is drawn for the masked view; what
            is given replaces the default as a whole.
    """

    clip_high: float = 0.3
    reference_kl: float = 0.01
    weight: float = 0.02
    entropy_weight: float = 0.0
    masked_entropy_weight: float = 0.0
    learns_masked: bool = False
    masking: Perturbations = field(default_factory=lambda: dict(MASKED))

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("weight", "entropy_weight", "masked_entropy_weight"):
            require(option, getattr(self, option), getattr(self, option) >= 0, "at least 0")
        reads = self.weight > 0 or self.masked_entropy_weight > 0  # the masked view
        require("weight", self.weight, reads, "above 0 where masked_entropy_weight is 0")
        require_perturbations("masking", self.masking)

    @property
    def views(self) -> tuple[View, ...]:
        return (View(name="masked", perturbations=self.masking, gradient=self.learns_masked),)

    def plan(self, tokens: Tokens) -> Plan:
        plan, over_all = super().plan(tokens), Average(mask=tokens.mask)
        return replace(plan, averages={**plan.averages, **dict.fromkeys(self._added(), over_all)})

    def terms(self, tokens: Tokens, plan: Plan) -> dict[str, Term]:
        seen, masked = tokens.seen.logprobs, tokens.views["masked"].logprobs
        masked = masked if self.learns_masked else masked.detach()
        per_token = {
            "masked_divergence": divergence(seen, masked, "k3"),
            "entropy": -seen,
            "masked_entropy": -masked,
        }
        added = {
            name: Term(per_token=per_token[name], weight=weight)
            for name, weight in self._added().items()
        }
        return {**super().terms(tokens, plan), **added}

    def _added(self) -> dict[str, float]:
        """The terms beside GRPO's, and their weights."""
        weights = {
            "masked_divergence": -self.weight,
            "entropy": self.entropy_weight,
            "masked_entropy": self.masked_entropy_weight,
        }
        return {name: weight for name, weight in weights.items() if weight}


PAPO_DAPO = partial(
    PAPO,
    clip_high=0.28,
    resample=True,
    reference_kl=0.0,
    weight=0.01,
    entropy_weight=0.03,
    masked_entropy_weight=0.03,
)
