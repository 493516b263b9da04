"""GRPO: Group Relative Policy Optimization (2402.03300), the base of every method here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cppo.methods.method import Average, Plan, Term, Tokens, View
from cppo.methods.options import require, require_choice, require_types
from cppo.methods.schedule import Schedule, anneal
from cppo.objective import (
    Aggregation,
    aggregate,
    clipped_surrogate,
    count_units,
    divergence,
    group_advantages,
)

Scope = Literal["global", "micro-batch"]


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """A response's advantage is its reward against its group's; the ratio is clipped per token.

    Args:
        clip_low, clip_high: The ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: Where the advantage is negative, the loss is at most `dual_clip` times its size
            (dual-clip PPO, 1912.09729); None for none.
        normalize: Divide advantages by their group's standard deviation.
        advantage_epsilon: What is added to it before.
        batch_normalize: Normalise advantages once more, over the whole batch.
        aggregation: How per-token losses are averaged.
        average_over: "global": every average runs over the whole batch, however it is cut.
            "micro-batch": each micro-batch is averaged by itself, all weighing the same, as some
            published code does; only for reproduction.
        reference_kl: Weight of the k3 divergence from the starting policy; 0 for none.
        reference_kl_schedule: How this weight falls to zero over the training: "constant" (it does
            not), "linear" or "cosine".
        resample: Groups without spread are replaced by new prompts (DAPO's dynamic sampling);
            otherwise they stay in the averages, and teach nothing.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    normalize: bool = True
    advantage_epsilon: float = 1e-6
    batch_normalize: bool = False
    aggregation: Aggregation = "token-mean"
    average_over: Scope = "global"
    reference_kl: float = 0.0
    reference_kl_schedule: Schedule = "constant"
    resample: bool = False

    def __post_init__(self) -> None:
        require_types(self)
        require("clip_low", self.clip_low, 0 < self.clip_low <= 1, "above 0, at most 1")
        require("clip_high", self.clip_high, self.clip_high > 0, "above 0")
        require(
            "dual_clip",
            self.dual_clip,
            self.dual_clip is None or self.dual_clip > 1,
            "above 1, or null",
        )
        require("advantage_epsilon", self.advantage_epsilon, self.advantage_epsilon > 0, "above 0")
        require("reference_kl", self.reference_kl, self.reference_kl >= 0, "at least 0")
        require_choice("reference_kl_schedule", self.reference_kl_schedule, Schedule)
        require_choice("aggregation", self.aggregation, Aggregation)
        require_choice("average_over", self.average_over, Scope)

    @property
    def plans_ahead(self) -> bool:
        """Whether all of a mini-batch is planned before any of it is learned from, at the price of
        a pass over what its plan reads where there are several micro-batches: as must be where
        responses are weighed against each other, or scores decide what an average divides by."""
        return any(view.detects for view in self.views)

    @property
    def policy_term(self) -> bool:
        """Whether advantages are in the loss."""
        return True

    @property
    def views(self) -> tuple[View, ...]:
        """The views of the images, beside the images themselves, to score responses on."""
        return ()

    @property
    def second_look(self) -> str | None:
        """The reward, by its name among the second looks, for which the policy is asked again
        without the images; None for a reward of the response alone."""
        return None

    def rollout_view(self, progress: float) -> View | None:
        """The view that the second half of each group is sampled on; None: on the images.

        Whatever a response was sampled on, it is scored and learnt from on the images as they are.
        `progress` is the share of the training that is done, in [0, 1].
        """
        return None

    def score_groups(self, rewards_N: Tensor, group_size: int) -> Tensor:
        """Advantages (N,) of rewards (N,), `group_size` neighbours a group."""
        advantages = group_advantages(
            rewards_N, group_size, normalize=self.normalize, epsilon=self.advantage_epsilon
        )
        if self.batch_normalize and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
        return advantages

    def loss(self, tokens: Tokens, *, max_new_tokens: int | None = None) -> Tensor:
        """The loss of a batch that is not cut, to be differentiated: for other trainers.

        `tokens` holds scores with their gradients, on the image and on each of `views`; of
        responses that a view is not `needed` for, its scores may be zero. `max_new_tokens` is the
        longest response allowed, which `aggregation` "sequence-sum-norm" divides by. ValueError
        where something is missing.
        """
        missing = [
            *(f"views[{v.name!r}]" for v in self.views if v.name not in tokens.views),
            *(
                f"views[{v.name!r}].divergence"
                for v in self.views
                if v.full_divergence and v.name in tokens.views
                if tokens.views[v.name].divergence is None
            ),
        ]
        if self.reference_kl and tokens.reference_logprobs is None:
            missing.append("reference_logprobs")
        if missing:
            raise ValueError(f"{type(self).__name__} needs tokens' {', '.join(missing)} too")
        if self.aggregation == "sequence-sum-norm" and max_new_tokens is None:
            raise ValueError("aggregation 'sequence-sum-norm' needs max_new_tokens")
        with torch.no_grad():
            plan = self.plan(tokens)
        total = torch.zeros((), device=tokens.mask.device)
        for name, term in self.terms(tokens, plan).items():
            mask, mode = plan.averages[name].mask, plan.averages[name].mode
            longest = max_new_tokens or 1 if mode == "sequence-sum-norm" else 1
            units = count_units(mask, mode) * longest
            total = total + term.weight * aggregate(term.per_token, mask, mode, denominator=units)
        return total

    def plan(self, tokens: Tokens) -> Plan:
        """What is decided before any gradient: of scores that are detached, for a whole mini-batch
        where the method plans ahead and it is cut, else for each micro-batch in the scorer's own
        pass, before views are projected of which the loss reads a part."""
        averages = {"policy": Average(mask=tokens.mask, mode=self.aggregation)}
        if self.reference_kl:
            averages["reference_kl"] = Average(mask=tokens.mask, mode=self.aggregation)
        advantages = tokens.advantages[:, None].expand(tokens.mask.shape)
        return Plan(advantages=advantages, averages=averages)

    def terms(self, tokens: Tokens, plan: Plan) -> dict[str, Term]:
        """The loss, term by term; the keys are those of `plan.averages`."""
        terms = {"policy": Term(per_token=self.policy_loss(tokens, plan))}
        if self.reference_kl:
            assert tokens.reference_logprobs is not None
            drift = divergence(tokens.seen.logprobs, tokens.reference_logprobs, "k3")
            weight = anneal(self.reference_kl, self.reference_kl_schedule, tokens.progress)
            terms["reference_kl"] = Term(per_token=drift, weight=weight)
        return terms

    def log_ratio(self, tokens: Tokens) -> Tensor:
        """Of the policy to the one that sampled, as the clip sees it; no gradient, (B, T)."""
        return tokens.seen.logprobs.detach() - tokens.old_logprobs

    def surrogate(self, tokens: Tokens, plan: Plan) -> Tensor:
        """The clipped policy-gradient loss, (B, T)."""
        return clipped_surrogate(
            tokens.seen.logprobs,
            tokens.old_logprobs,
            plan.advantages,
            low=self.clip_low,
            high=self.clip_high,
        )

    def policy_loss(self, tokens: Tokens, plan: Plan) -> Tensor:
        """The surrogate, bounded where the dual clip is on, (B, T)."""
        loss = self.surrogate(tokens, plan)
        if self.dual_clip is None:
            return loss
        bound = -plan.advantages * self.dual_clip
        return torch.where(plan.advantages < 0, torch.minimum(loss, bound), loss)
