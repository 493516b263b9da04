"""Attention of the group layout in parts, merged by their log-sum-exp: no padding, no mask.

Each prompt attends to itself, each response to itself, and all responses of a group at once to
their prompt. Attention to a part of the keys weighs them by exp(score - s), s being the part's
log-sum-exp; that to both parts weighs them by exp(score - s'), s' = log(exp(s1) + exp(s2)), so
that it is w a1 + (1 - w) a2 with w = exp(s1 - s'). For the same reason a part's backward pass,
given the merged result and s', gives that part's share of the gradients.

Shapes: L positions of the packed sequence; H query heads, h key and value heads (H is a multiple of
h), D of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cppo.attention.pieces import Segments
from cppo.device import PartialAttention


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupSegments:
    """What attends to what in a packed sequence."""

    own: Segments  # each prompt and each response, to itself
    prompts: Segments
    together: Segments  # of each group all responses, to their prompt

    @staticmethod
    def of(
        prompts: Sequence[int], responses: Sequence[Sequence[int]], device: torch.device | str
    ) -> GroupSegments:
        """Prompts of these lengths, and of each its responses of those lengths."""
        each = [length for lengths in responses for length in lengths]
        return GroupSegments(
            own=Segments(lengths=(*prompts, *each), device=device),
            prompts=Segments(lengths=prompts, device=device),
            together=Segments(lengths=[sum(lengths) for lengths in responses], device=device),
        )

    @property
    def split(self) -> int:
        """Where responses begin."""
        return sum(self.prompts.lengths)


def attend_merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: GroupSegments,
    *,
    scale: float,
    part: PartialAttention,
) -> Tensor:
    """`query` (1, H, L, D), `key` and `value` (1, h, L, D). Returns (1, L, H, D)."""
    narrow = value.dtype  # rotations leave the other two wide under autocast
    attended: Tensor = _Merged.apply(  # type: ignore[no-untyped-call]
        query.to(narrow), key.to(narrow), value, segments, scale, part
    )
    return attended


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: GroupSegments,
        scale: float,
        part: PartialAttention,
    ) -> Tensor:
        attended, logsumexp = part.forward(
            query, key, value, queries=segments.own, keys=segments.own, causal=True, scale=scale
        )
        to_prompt, of_prompt = part.forward(
            query[:, :, segments.split :],
            *(tensor[:, :, : segments.split] for tensor in (key, value)),
            queries=segments.together,
            keys=segments.prompts,
            causal=False,
            scale=scale,
        )
        own, of_own = (x[:, :, segments.split :] for x in (attended, logsumexp))
        weight = torch.sigmoid(of_prompt - of_own)[..., None]
        own.copy_(torch.lerp(own.to(weight.dtype), to_prompt.to(weight.dtype), weight))
        of_own.copy_(torch.logaddexp(of_own, of_prompt))
        result = attended.transpose(1, 2)
        ctx.save_for_backward(query, key, value, result, logsumexp)
        ctx.segments, ctx.scale, ctx.part = segments, scale, part
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, logsumexp = ctx.saved_tensors
        segments: GroupSegments = ctx.segments
        of_queries = (gradient.contiguous().transpose(1, 2), query)
        attended = result.transpose(1, 2)
        gradients: tuple[Tensor, ...] = ctx.part.backward(
            *of_queries,
            *(key, value, attended, logsumexp),
            queries=segments.own,
            keys=segments.own,
            causal=True,
            scale=ctx.scale,
        )
        shares = ctx.part.backward(
            *(tensor[:, :, segments.split :] for tensor in of_queries),
            *(tensor[:, :, : segments.split] for tensor in (key, value)),
            *(tensor[:, :, segments.split :] for tensor in (attended, logsumexp)),
            queries=segments.together,
            keys=segments.prompts,
            causal=False,
            scale=ctx.scale,
        )
        of_query, of_key, of_value = gradients
        to_query, to_key, to_value = shares
        of_query[:, :, segments.split :] += to_query
        of_key[:, :, : segments.split] += to_key
        of_value[:, :, : segments.split] += to_value
        return (*gradients, None, None, None)
