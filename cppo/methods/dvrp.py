"""DVRP: Differential Visual Reasoning Policy (2601.06801), on GRPO.

The policy is to say something else where patches of the image are masked, the same where the image
is noised, and to be sure of it on both views:

    loss - 0.01 mean k3(l, l_masked) + 0.01 mean k3(l, l_noised) + 0.05 mean(-l_view), each view

over all response tokens. No code is released and the settings are second-hand: patches of 14 pixels
masked with probability 0.6, diffusion noise, no reference term. The paper is reported to write both
divergences over the whole vocabulary, and to start from step 500 and lower it over the training;
here they are sampled and the step stays. Views are scored by the policy that learns, with gradient
through them, unless `learns_views` is false; the two entropies are then constants.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cppo.methods.grpo import GRPO
from cppo.methods.method import Average, Perturbations, Plan, Term, Tokens, View
from cppo.methods.options import require, require_perturbations
from cppo.methods.papo import MASKED
from cppo.objective import divergence


@dataclass(frozen=True, kw_only=True)
class DVRP(GRPO):
    """GRPO plus a divergence to be raised, one to be lowered, and the views' entropies.

    Args:
        masked_weight: Of the divergence from the masked view, which is raised.
        noised_weight: Of the divergence from the noised view, which is lowered.
        view_entropy_weight: Of the entropy on each view, which is lowered.
        learns_views: The loss differentiates through the views too.
        masking, noising: Perturbations (name to parameters) of which one is drawn; what is given
            replaces the default as a whole.
    """

    masked_weight: float = 0.01
    noised_weight: float = 0.01
    view_entropy_weight: float = 0.05
    learns_views: bool = True
    masking: Perturbations = field(default_factory=lambda: dict(MASKED))
    noising: Perturbations = field(default_factory=lambda: {"diffusion_noise": {"step": 500}})

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("masked_weight", "noised_weight", "view_entropy_weight"):
            require(option, getattr(self, option), getattr(self, option) >= 0, "at least 0")
        require_perturbations("masking", self.masking)
        require_perturbations("noising", self.noising)

    @property
    def views(self) -> tuple[View, ...]:
        views = (
            View(name="masked", perturbations=self.masking, gradient=self.learns_views),
            View(name="noised", perturbations=self.noising, gradient=self.learns_views),
        )
        return tuple(view for view in views if self._weights(view.name))

    def plan(self, tokens: Tokens) -> Plan:
        plan, over_all = super().plan(tokens), Average(mask=tokens.mask)
        names = [f"{view.name}_{what}" for view in self.views for what in self._weights(view.name)]
        return replace(plan, averages={**plan.averages, **dict.fromkeys(names, over_all)})

    def terms(self, tokens: Tokens, plan: Plan) -> dict[str, Term]:
        terms = super().terms(tokens, plan)
        for view in self.views:
            logprobs = tokens.views[view.name].logprobs
            logprobs = logprobs if view.gradient else logprobs.detach()
            per_token = {
                "divergence": divergence(tokens.seen.logprobs, logprobs, "k3"),
                "entropy": -logprobs,
            }
            for what, weight in self._weights(view.name).items():
                terms[f"{view.name}_{what}"] = Term(per_token=per_token[what], weight=weight)
        return terms

    def _weights(self, view: str) -> dict[str, float]:
        """Of the terms that a view has."""
        distance = {"masked": -self.masked_weight, "noised": self.noised_weight}[view]
        weights = {"divergence": distance, "entropy": self.view_entropy_weight}
        return {what: weight for what, weight in weights.items() if weight}
