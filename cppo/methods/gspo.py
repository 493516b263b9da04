"""GSPO: Group Sequence Policy Optimization (2507.18071), one ratio for a whole response."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cppo.methods.grpo import GRPO
from cppo.methods.method import Plan, Tokens
from cppo.objective import Aggregation, sequence_surrogate


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """Clips the geometric mean of a response's token ratios, over the paper's narrow range."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    aggregation: Aggregation = "sequence-mean"

    def log_ratio(self, tokens: Tokens) -> Tensor:
        by_token = torch.where(tokens.mask, super().log_ratio(tokens), 0.0)
        lengths = tokens.mask.sum(-1, keepdim=True).clamp(min=1)
        return (by_token.sum(-1, keepdim=True) / lengths).expand(tokens.mask.shape)

    def surrogate(self, tokens: Tokens, plan: Plan) -> Tensor:
        return sequence_surrogate(
            tokens.seen.logprobs,
            tokens.old_logprobs,
            plan.advantages,
            tokens.mask,
            low=self.clip_low,
            high=self.clip_high,
        )
