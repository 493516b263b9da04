"""Keys and values while responses are sampled: a prompt's once for its group, a response's its own.

No prompt is repeated for its responses: a token of theirs attends to it as one more row of queries.
Nothing is copied from token to token, but where responses end or their room is used up.

Shapes: P prompts, S responses, L of the longest prompt, t tokens sampled so far; H query heads, h
key and value heads (H is a multiple of h), D of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cppo.attention import Kernel
from cppo.attention.pieces import Pieces

ROOM = 64  # tokens of each response that a layer begins with; doubled as they are used up


@dataclass(kw_only=True, eq=False)
class _Held:
    """What a layer holds. Of `keys` and `values` the first t places are in use."""

    prompt_keys: Tensor  # (P, h, L, D)
    prompt_values: Tensor
    keys: Tensor  # (S, h, room, D)
    values: Tensor

    def double_room(self) -> None:
        self.keys = torch.cat([self.keys, torch.empty_like(self.keys)], dim=2)
        self.values = torch.cat([self.values, torch.empty_like(self.values)], dim=2)


class GroupCache:
    """Stands for attention (see `cppo.attention.groups.Attending`): in a first pass over the packed
    prompts, and then in one for each token."""

    def __init__(
        self,
        lengths: Sequence[int],
        responses: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        one_form: bool = False,
    ) -> None:
        """For prompts of these lengths, each with so many `responses`.

        With `one_form`, groups of one size are moved and prompts of one length are masked as others
        are, so that code compiled for a pass goes on to serve when responses end.
        """
        self.sampled = 0  # tokens of each response, that of the pass under way included
        self._one_form = one_form
        self._prompts = Pieces.of(lengths, device)
        self._group = torch.arange(len(lengths)).repeat_interleave(torch.tensor(responses))  # (S,)
        self._layers: dict[int, _Held] = {}
        self._line_up()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, kernel: Kernel
    ) -> Tensor:
        if layer not in self._layers:
            return self._attend_prompts(query, key, value, layer, scale, kernel)
        return self._attend_responses(query, key, value, layer, scale)

    def advance(self) -> None:
        """To be called before each pass over the next token of all responses."""
        self.sampled += 1
        for held in self._layers.values():
            # A place is always free: code compiled for rooms in part used goes on to serve.
            if self.sampled >= held.keys.shape[2]:
                held.double_room()

    def keep(self, rows: Tensor) -> None:
        """Lets go of all responses but these (indices in order), and of prompts without any."""
        left, self._group = torch.unique(self._group[rows.cpu()], return_inverse=True)
        prompts = left.to(rows.device)
        fewer = len(prompts) < len(self._prompts.mask)
        if fewer:
            self._prompts = Pieces.of(self._prompts.mask.sum(1)[prompts].tolist(), rows.device)
        longest = self._prompts.mask.shape[1]
        for held in self._layers.values():
            held.keys, held.values = held.keys[rows], held.values[rows]
            if fewer:
                held.prompt_keys = held.prompt_keys[prompts, :, :longest]
                held.prompt_values = held.prompt_values[prompts, :, :longest]
        self._line_up()

    def _line_up(self) -> None:
        """Responses by prompt, side by side."""
        device = self._prompts.mask.device
        counts = self._group.bincount().tolist()
        self._members = Pieces.of(counts, device, always_moved=self._one_form)
        padding = ~self._prompts.mask[:, None, None, None]  # (P, 1, 1, 1, L)
        self._padding = padding if self._one_form or padding.any() else None

    def _attend_prompts(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, kernel: Kernel
    ) -> Tensor:
        """Of all prompts, causally: (1, H, all positions, D) to (1, all positions, H, D)."""
        queries, keys, values = (
            self._prompts.pad(tensor[0].transpose(0, 1)).transpose(1, 2)
            for tensor in (query, key, value)
        )

        def own(held: Tensor) -> Tensor:
            # Rotations leave keys wide under autocast; products would make them narrow each time.
            # Not a view: code compiled for one would not serve what `keep` leaves.
            return held.to(values.dtype, copy=True, memory_format=torch.contiguous_format)

        empty = values.new_empty(len(self._group), values.shape[1], ROOM, values.shape[3])
        self._layers[layer] = _Held(
            prompt_keys=own(keys),
            prompt_values=own(values),
            keys=empty,
            values=torch.empty_like(empty),
        )
        grouped = query.shape[1] != key.shape[1]
        attended = kernel(queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
        return self._prompts.unpad(attended.transpose(1, 2))[None]

    def _attend_responses(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float
    ) -> Tensor:
        """Of the newest token of each response, (S, H, 1, D) to (S, 1, H, D)."""
        held, now = self._layers[layer], self.sampled
        # Indices would be constants to a compiler, which would begin anew for each token.
        held.keys.narrow(2, now - 1, 1).copy_(key)
        held.values.narrow(2, now - 1, 1).copy_(value)
        keys, values = held.keys.narrow(2, 0, now), held.values.narrow(2, 0, now)
        queries = (query * scale).to(keys.dtype).view(len(query), key.shape[1], -1, query.shape[3])
        to_own = queries @ keys.transpose(2, 3)  # (S, h, H / h, t)
        to_prompt = self._by_response(self._by_prompt(queries) @ held.prompt_keys.transpose(2, 3))
        weights = torch.cat([to_prompt, to_own], dim=3).softmax(3, dtype=torch.float32)
        longest = to_prompt.shape[3]
        weights = weights.to(values.dtype)
        on_prompt, on_own = weights[..., :longest], weights[..., longest:]
        attended: Tensor = on_own @ values + self._by_response(
            self._by_prompt(on_prompt) @ held.prompt_values, scores=False
        )
        return attended.reshape(len(query), 1, query.shape[1], query.shape[3])

    def _by_prompt(self, rows: Tensor) -> Tensor:
        """(S, h, H / h, .) to (P, h, responses * H / h, .)."""
        return self._members.pad(rows).transpose(1, 2).flatten(2, 3)

    def _by_response(self, rows: Tensor, *, scores: bool = True) -> Tensor:
        """And back; of `scores`, those of a prompt's padding are no longer finite."""
        grid = rows.view(*rows.shape[:2], self._members.mask.shape[1], -1, rows.shape[3])
        if scores and self._padding is not None:
            grid = grid.masked_fill(self._padding, -torch.inf)
        return self._members.unpad(grid.transpose(1, 2))
