"""The group layout: prompts with their responses as one packed sequence, and attention within it.

    [prompt 1 | prompt 2 | ... | response 1 of prompt 1 | response 2 of prompt 1 | ...]

A response attends to its prompt and to itself, so that it gets what it would get alone, while the
prompt runs once for all of them. Models stay as they are: in transformers a function of ours stands
for their attention, and what it must know of the layout travels as a keyword of the forward.

Shapes: G groups, R responses in all, L positions of the packed sequence, P of the longest prompt,
T of the longest response; H query heads, h key and value heads (H is a multiple of h), D of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from cppo.attention import eager_attention

Kernel = Callable[..., Tensor]  # called as PyTorch's scaled_dot_product_attention is


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """N pieces that lie end to end, S positions in all, and as rows of the longest's width W."""

    mask: Tensor  # (N, W) bool, False on padding
    to_rows: Tensor | None  # (N * W,) the position of each place; None where nothing is padded
    to_sequence: Tensor | None  # (S,) the place of each position

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str) -> Pieces:
        width = max(lengths)
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        if mask.all():
            return Pieces(mask=mask.to(device), to_rows=None, to_sequence=None)
        flat = mask.flatten()
        return Pieces(
            mask=mask.to(device),
            to_rows=((flat.cumsum(0) - 1) * flat).to(device),
            to_sequence=flat.nonzero()[:, 0].to(device),
        )

    def pad(self, sequence: Tensor) -> Tensor:
        """(S, ...) to (N, W, ...); what padding holds is undefined."""
        rows = sequence if self.to_rows is None else _move(sequence, self, to_rows=True)
        return rows.view(*self.mask.shape, *sequence.shape[1:])

    def unpad(self, rows: Tensor) -> Tensor:
        """(N, W, ...) to (S, ...); padding gets no gradient."""
        flat = rows.reshape(-1, *rows.shape[2:])
        return flat if self.to_sequence is None else _move(flat, self, to_rows=False)


def _move(tensor: Tensor, pieces: Pieces, *, to_rows: bool) -> Tensor:
    moved: Tensor = _Move.apply(tensor, pieces, to_rows)  # type: ignore[no-untyped-call]
    return moved


class _Move(torch.autograd.Function):
    """Between sequence and rows. Either way back is a copy too, where autograd would add up."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, pieces: Pieces, to_rows: bool) -> Tensor:
        ctx.pieces, ctx.to_rows = pieces, to_rows
        index = pieces.to_rows if to_rows else pieces.to_sequence
        assert index is not None
        return tensor.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        pieces: Pieces = ctx.pieces
        assert pieces.to_rows is not None
        assert pieces.to_sequence is not None
        if ctx.to_rows:
            return gradient.index_select(0, pieces.to_sequence), None, None
        rows = gradient.index_select(0, pieces.to_rows)
        padding = ~pieces.mask.view(-1, *[1] * (rows.dim() - 1))
        return rows.masked_fill_(padding, 0), None, None


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """Responses one after the other whose prompts are of one length: they attend alike."""

    rows: slice
    prompt: int  # length
    visible: Tensor  # (1, 1, T, prompt + T) bool: what a response attends to, its prompt first


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Prompts, then responses, in a packed sequence."""

    prompts: Pieces
    responses: Pieces
    split: int  # where responses begin
    group: Tensor  # (R,) the prompt that a response belongs to
    spans: tuple[Span, ...]  # of the responses, in order

    @staticmethod
    def of(
        prompts: Sequence[int],
        responses: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> Layout:
        """Prompts of these lengths, and of each its responses of those lengths."""
        group = [number for number, lengths in enumerate(responses) for _ in lengths]
        contexts = Pieces.of(prompts, device)
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
        return Layout(
            prompts=contexts,
            responses=own,
            split=sum(prompts),
            group=torch.tensor(group, device=device),
            spans=tuple(spans),
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, kernel: Kernel
    ) -> Tensor:
        """Every layer alike."""
        return attend_in_groups(query, key, value, self, scale=scale, kernel=kernel)


def attend_in_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float,
    kernel: Kernel = scaled_dot_product_attention,
) -> Tensor:
    """Attention of the packed sequence, in two parts: prompts causally; responses to both.

    `query` (1, H, L, D), `key` and `value` (1, h, L, D). Returns (1, L, H, D).
    """
    heads, key_heads, size = query.shape[1], key.shape[1], query.shape[3]
    prompts, responses = layout.prompts, layout.responses

    def parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of prompts and of responses, (G, ., P, D) and (R, ., T, D)."""
        sequence = tensor[0].transpose(0, 1)
        return (
            prompts.pad(sequence[: layout.split]).transpose(1, 2),
            responses.pad(sequence[layout.split :]).transpose(1, 2),
        )

    (prompt_query, own_query), (prompt_key, own_key), (prompt_value, own_value) = map(
        parts, (query, key, value)
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
    for span in layout.spans:
        contexts = layout.group[span.rows]
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
    parts_of_sequence = [
        prompts.unpad(attended_prompts.transpose(1, 2)),
        responses.unpad(torch.cat(attended_responses).transpose(1, 2)),
    ]
    return torch.cat(parts_of_sequence)[None]


class Attending(Protocol):
    """What stands for a layer's attention: `Layout` in scoring, a cache in sampling."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, kernel: Kernel
    ) -> Tensor:
        """`query` (B, H, L, D), `key` and `value` (B, h, L, D). Returns (B, L, H, D)."""


def name_of(attention: str) -> str:
    """The name by which transformers knows attention in groups, for a policy of this attention.

    Where that is "eager", so is the attention in groups; else it is PyTorch's.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    name = "cppo_groups_eager" if attention == "eager" else "cppo_groups"
    kernel = eager_attention if attention == "eager" else scaled_dot_product_attention

    def forward(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layout: Attending,
        scaling: float,
        **options: Any,
    ) -> tuple[Tensor, None]:
        attended = layout.attend(
            query, key, value, layer=module.layer_idx, scale=scaling, kernel=kernel
        )
        return attended, None

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, lambda *given, **options: None)
    return name
