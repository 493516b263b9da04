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

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cppo.attention.kernels import eager_attention
from cppo.device import PartialAttention, first_line

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a prompt and its responses, one after the other, lie in a packed sequence."""

    prompt: slice
    responses: tuple[slice, ...]

    @property
    def together(self) -> slice:
        return slice(self.responses[0].start, self.responses[-1].stop)


def attend_merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[Places],
    *,
    scale: float,
    part: PartialAttention,
) -> Tensor:
    """`query` (1, H, L, D), `key` and `value` (1, h, L, D). Returns (1, L, H, D)."""
    narrow = value.dtype  # rotations leave the other two wide under autocast
    attended: Tensor = _Merged.apply(  # type: ignore[no-untyped-call]
        query.to(narrow), key.to(narrow), value, groups, scale, part
    )
    return attended


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        groups: Sequence[Places],
        scale: float,
        part: PartialAttention,
    ) -> Tensor:
        heads, length, size = query.shape[1:]
        result = query.new_empty(1, length, heads, size)
        attended = result.transpose(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        logsumexp = query.new_empty(1, heads, length, dtype=wide)

        def attend(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
            q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            return part.forward(q, k, v, causal=causal, scale=scale)

        for group in groups:
            for own in (group.prompt, *group.responses):
                attended[:, :, own], logsumexp[:, :, own] = attend(own, own, True)
            both = group.together
            to_prompt, of_prompt = attend(both, group.prompt, False)
            of_own = logsumexp[:, :, both]
            weight = torch.sigmoid(of_prompt - of_own)[..., None]
            merged = torch.lerp(attended[:, :, both].to(wide), to_prompt.to(wide), weight)
            attended[:, :, both] = merged
            logsumexp[:, :, both] = torch.logaddexp(of_own, of_prompt)
        ctx.save_for_backward(query, key, value, result, logsumexp)
        ctx.groups, ctx.scale, ctx.part = groups, scale, part
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, logsumexp = ctx.saved_tensors
        attended, gradient = result.transpose(1, 2), gradient.contiguous().transpose(1, 2)
        gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))

        def go_back(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, ...]:
            shares: tuple[Tensor, ...] = ctx.part.backward(
                gradient[:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                attended[:, :, queries],
                logsumexp[:, :, queries],
                causal=causal,
                scale=ctx.scale,
            )
            return shares

        for group in ctx.groups:
            for own in (group.prompt, *group.responses):
                for whole, share in zip(gradients, go_back(own, own, True), strict=True):
                    whole[:, :, own] = share
            places = (group.together, group.prompt, group.prompt)
            to_prompt = go_back(group.together, group.prompt, False)
            for whole, place, share in zip(gradients, places, to_prompt, strict=True):
                whole[:, :, place] += share
        return (*gradients, None, None, None)


def partial_or_none(
    part: PartialAttention, device: str, precision: Sequence[torch.dtype]
) -> PartialAttention | None:
    """Partial attention if attention merged from it agrees on the device, in every precision, with
    attention written out; else None, and why is logged: operators that PyTorch documents nowhere
    may change."""
    for dtype in precision:
        if reason := _trial(part, device, dtype):
            log.warning(
                "attention in parts fails a trial on %s in %s, and is not used: %s",
                *(device, dtype, reason),
            )
            return None
    return part


def _trial(part: PartialAttention, device: str, dtype: torch.dtype) -> str:
    """A prompt and two responses, forward and backward. What is wrong; empty where it works."""
    generator = torch.Generator().manual_seed(0)
    places = Places(prompt=slice(0, 20), responses=(slice(20, 33), slice(33, 40)))
    *inputs, upstream = (
        torch.randn(1, 40, heads, 64, generator=generator).to(device, dtype).transpose(1, 2)
        for heads in (4, 2, 2, 4)
    )
    scale, allowed = 0.125, 1e-4 if dtype.itemsize > 2 else 0.02

    def differentiate(attend: Callable[[Sequence[Tensor]], Tensor]) -> Sequence[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():  # whatever the caller is doing
            attended = attend(leaves)
            return attended, *torch.autograd.grad(attended, leaves, upstream.transpose(1, 2))

    def written_out(given: Sequence[Tensor]) -> Tensor:
        before = places.prompt.stop
        attended: list[Tensor] = []
        for own in places.responses:  # each behind the prompt
            q, k, v = (torch.cat([x[:, :, :before], x[:, :, own]], dim=2) for x in given)
            row = eager_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=True)
            attended += [row[:, :, before:]] if attended else [row]
        return torch.cat(attended, dim=2).transpose(1, 2)

    def merged(given: Sequence[Tensor]) -> Tensor:
        query, key, value = given
        return attend_merged(query, key, value, [places], scale=scale, part=part)

    truth = differentiate(written_out)
    try:
        pairs = zip(differentiate(merged), truth, strict=True)
        agrees = all((found - true).norm() <= allowed * true.norm() for found, true in pairs)
    except Exception as error:  # noqa: BLE001 - what is PyTorch's own may change in any way
        return f"{type(error).__name__}: {first_line(error)}"
    return "" if agrees else "it differs from attention written out"
