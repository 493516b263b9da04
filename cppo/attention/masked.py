"""Attention of the group layout by any kernel that takes a mask: prompts causally, then responses
under a mask, those to prompts of one length at once. Both are padded to rows.

Shapes: G groups, R responses in all, L positions of the packed sequence, P of the longest prompt,
T of the longest response; H query heads, h key and value heads (H is a multiple of h), D of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cppo.attention.kernels import Kernel
from cppo.attention.pieces import Pieces


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """Responses one after the other whose prompts are of one length: they attend alike."""

    rows: slice
    prompt: int  # length
    visible: Tensor  # (1, 1, T, prompt + T) bool: what a response attends to, its prompt first


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedRows:
    """Prompts, then responses, in a packed sequence, as the rows that attention is given."""

    prompts: Pieces
    responses: Pieces
    split: int  # where responses begin
    group: Tensor  # (R,) the prompt that a response belongs to
    spans: tuple[Span, ...]  # of the responses, in order

    @staticmethod
    def of(
        prompts: Sequence[int], responses: Sequence[Sequence[int]], device: torch.device | str
    ) -> PaddedRows:
        """Prompts of these lengths, and of each its responses of those lengths."""
        group = [number for number, lengths in enumerate(responses) for _ in lengths]
        own = Pieces.of([length for lengths in responses for length in lengths], device)
        width = own.mask.shape[1]
        spans, start = [], 0
        for length, members in itertools.groupby(prompts[number] for number in group):
            stop = start + len(list(members))
            # All of the prompt, oneself causally; nothing reads what lies past a response's end.
            visible = torch.ones(width, length + width, dtype=torch.bool, device=device)
            spans.append(
                Span(
                    rows=slice(start, stop),
                    prompt=length,
                    visible=visible.tril(length)[None, None],
                )
            )
            start = stop
        return PaddedRows(
            prompts=Pieces.of(prompts, device),
            responses=own,
            split=sum(prompts),
            group=torch.tensor(group, device=device),
            spans=tuple(spans),
        )


def attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: PaddedRows,
    *,
    scale: float,
    kernel: Kernel,
) -> Tensor:
    """`query` (1, H, L, D), `key` and `value` (1, h, L, D). Returns (1, L, H, D)."""
    heads, key_heads, size = query.shape[1], key.shape[1], query.shape[3]
    prompts, responses = rows.prompts, rows.responses

    def as_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of prompts and of responses, (G, ., P, D) and (R, ., T, D)."""
        sequence = tensor[0].transpose(0, 1)
        return (
            prompts.pad(sequence[: rows.split]).transpose(1, 2),
            responses.pad(sequence[rows.split :]).transpose(1, 2),
        )

    (prompt_query, own_query), (prompt_key, own_key), (prompt_value, own_value) = map(
        as_rows, (query, key, value)
    )
    attended_prompts = kernel(
        prompt_query,
        prompt_key,
        prompt_value,
        is_causal=True,
        scale=scale,
        enable_gqa=heads != key_heads,
    )
    # Queries that share a key head follow each other in one long row: no key is repeated for them,
    # and kernels that take a mask but no grouped heads will do.
    shared, width = heads // key_heads, responses.mask.shape[1]
    attended_responses = []
    for span in rows.spans:
        contexts = rows.group[span.rows]
        keys, values = (
            torch.cat([prompt[contexts, :, : span.prompt], own[span.rows]], dim=2)
            for prompt, own in ((prompt_key, own_key), (prompt_value, own_value))
        )
        attended = kernel(
            own_query[span.rows].reshape(-1, key_heads, shared * width, size),
            keys,
            values,
            attn_mask=span.visible.repeat(1, 1, shared, 1),
            scale=scale,
        )
        attended_responses.append(attended.reshape(-1, heads, width, size))
    sequence = [
        prompts.unpad(attended_prompts.transpose(1, 2)),
        responses.unpad(torch.cat(attended_responses).transpose(1, 2)),
    ]
    return torch.cat(sequence)[None]
