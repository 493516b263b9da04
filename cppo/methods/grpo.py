"""GRPO: Group Relative Policy Optimization (2402.03300), the base of every method here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cppo.methods.method import Average, Plan, Term, Tokens, View
from cppo.objective import Aggregation, clipped_surrogate, divergence, group_advantages


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """A response's advantage is its reward against its group's; the ratio is clipped per token.

    Args:
        clip_low, clip_high: The ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: Where the advantage is negative, the loss is at most `dual_clip` times its size
            (dual-clip PPO, 1912.09729); None for none.
        normalize: Divide advantages by their group's standard deviation.
        batch_normalize: Normalise advantages once more, over the whole batch.
        aggregation: How per-token losses are averaged.
        average_over: "global": every average runs over the whole batch, however it is cut.
            "micro-batch": each micro-batch is averaged by itself, all weighing the same, as some
            published code does; only for reproduction.
        reference_kl: Weight of the k3 divergence from the starting policy; 0 for none.
        resample: Groups without spread are replaced by new prompts (DAPO's dynamic sampling);
            otherwise they are dropped.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    normalize: bool = True
    batch_normalize: bool = False
    aggregation: Aggregation = "token-mean"
    average_over: Literal["global", "micro-batch"] = "global"
    reference_kl: float = 0.0
    resample: bool = False

    def __post_init__(self) -> None:
        require("clip_low", self.clip_low, 0 < self.clip_low <= 1, "above 0, at most 1")
        require("clip_high", self.clip_high, self.clip_high > 0, "above 0")
        require(
            "dual_clip",
            self.dual_clip,
            self.dual_clip is None or self.dual_clip > 1,
            "above 1, or null",
        )
        require("reference_kl", self.reference_kl, self.reference_kl >= 0, "at least 0")
        modes = get_args(Aggregation)
        require("aggregation", self.aggregation, self.aggregation in modes, f"one of {modes}")
        scopes = ("global", "micro-batch")
        require("average_over", self.average_over, self.average_over in scopes, f"one of {scopes}")

    @property
    def views(self) -> tuple[View, ...]:
        """The views of the images, beside the images themselves, to score responses on."""
        return ()

    def score_groups(self, rewards_N: Tensor, group_size: int) -> Tensor:
        """Advantages (N,) of rewards (N,), `group_size` neighbours a group."""
        advantages = group_advantages(rewards_N, group_size, normalize=self.normalize)
        if self.batch_normalize and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
        return advantages

    def plan(self, tokens: Tokens) -> Plan:
        """What is decided before any gradient, for a whole mini-batch."""
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
            terms["reference_kl"] = Term(per_token=drift, weight=self.reference_kl)
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


def require(name: str, given: object, fine: object, allowed: str) -> None:
    """Raises ValueError where an option is out of range."""
    if not fine:
        raise ValueError(f"{name} is {given!r}; it must be {allowed}")
