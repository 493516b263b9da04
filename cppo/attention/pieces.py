"""Pieces of unequal length: end to end, as models are given them, and as rows of one width."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, kw_only=True, eq=False)
class Segments:
    """N pieces of these lengths that lie end to end, as attention is told of them."""

    lengths: Sequence[int]
    device: torch.device | str

    @cached_property
    def places(self) -> list[slice]:
        """Where each of them lies."""
        ends = itertools.accumulate(self.lengths, initial=0)
        return [*itertools.starmap(slice, itertools.pairwise(ends))]

    @cached_property
    def offsets(self) -> Tensor:
        """(N + 1,) int32 on the device: 0, and where each of them ends."""
        ends = [*itertools.accumulate(self.lengths, initial=0)]
        return torch.tensor(ends, dtype=torch.int32, device=self.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """N pieces that lie end to end, S positions in all, and as rows of the longest's width W."""

    mask: Tensor  # (N, W) bool, False on padding
    to_rows: Tensor | None  # (N * W,) the position of each place; None where nothing is moved
    to_sequence: Tensor | None  # (S,) the place of each position

    @staticmethod
    def of(
        lengths: Sequence[int], device: torch.device | str, *, always_moved: bool = False
    ) -> Pieces:
        """Pieces of one length stay where they are, unless they are `always_moved`."""
        width = max(lengths)
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        if mask.all() and not always_moved:
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
