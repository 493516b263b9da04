"""The model a token at a time: prompts first, then one more token of each response.

A policy that packs (see `cppo.policy.packed`) decodes in groups; any other in rows, as transformers
itself does.

Shapes: P prompts, S responses being sampled, D hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from cppo.policy.loading import Policy
from cppo.policy.prompts import Prompt
from cppo.policy.scoring import encode_images
from cppo.rollout.cache import GroupCache


class Decoder(Protocol):
    """The responses to some prompts, those to the same one side by side."""

    def begin(self) -> Tensor:
        """Runs the prompts. Returns the states that predict the responses' first tokens, (S, D)."""

    def advance(self, tokens: Tensor) -> Tensor:
        """Runs one more token of each response, (S,). Returns the states that predict the next."""

    def keep(self, rows: Tensor) -> None:
        """Goes on with these responses alone (indices in order)."""


def decoder(policy: Policy, prompts: Sequence[Prompt], responses: int) -> Decoder:
    """For `responses` to each prompt; one that follows itself is run once."""
    assert not any(prompt.blind for prompt in prompts), "blind prompts are only scored"
    runs = [list(run) for _, run in itertools.groupby(prompts, key=id)]
    counts = [len(run) * responses for run in runs]
    return (InGroups if policy.packs else InRows)(policy, [run[0] for run in runs], counts)


class InGroups:
    """Prompts are packed, and each is run, and its keys and values are held, once for its group."""

    def __init__(self, policy: Policy, prompts: Sequence[Prompt], counts: Sequence[int]) -> None:
        self._policy, self._prompts = policy, prompts
        lengths = [len(prompt.ids) for prompt in prompts]
        self._cache = GroupCache(lengths, counts, policy.device)
        self._group = _group(counts, policy.device)
        self._positions = _first_positions(prompts, self._group)

    def begin(self) -> Tensor:
        prompts, device = self._prompts, self._policy.device
        ends = torch.tensor([len(prompt.ids) for prompt in prompts]).cumsum(0) - 1
        hidden = self._run(
            torch.cat([prompt.ids for prompt in prompts])[None].to(device),
            torch.cat([prompt.positions for prompt in prompts], dim=1)[:, None].to(device),
            torch.cat([prompt.image_mask for prompt in prompts])[None].to(device),
            encode_images(self._policy, prompts),
        )
        return hidden[0, ends.to(device)[self._group]]

    def advance(self, tokens: Tensor) -> Tensor:
        self._cache.advance()
        hidden = self._run(tokens[:, None], self._positions, None, None)
        self._positions = self._positions + 1
        return hidden[:, -1]

    def keep(self, rows: Tensor) -> None:
        self._cache.keep(rows)
        self._positions = self._positions[:, rows]

    def _run(self, *given: Any) -> Tensor:
        policy = self._policy
        output = policy.family.hidden_states(
            policy.base, *given, use_cache=False, layout=self._cache
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


class InRows:
    """Prompts are padded on the left, and transformers' cache is copied for each response."""

    def __init__(self, policy: Policy, prompts: Sequence[Prompt], counts: Sequence[int]) -> None:
        self._policy, self._prompts = policy, prompts
        self._group = _group(counts, policy.device)
        self._positions = _first_positions(prompts, self._group)
        self._cache: Any = None
        self._mask: Tensor | None = None  # (S, positions so far), where prompts are padded

    def begin(self) -> Tensor:
        prompts, device = self._prompts, self._policy.device
        longest = max(len(prompt.ids) for prompt in prompts)

        def lined_up(tensors: Sequence[Tensor]) -> Tensor:
            padded = [pad(tensor, (longest - tensor.shape[-1], 0)) for tensor in tensors]
            return torch.stack(padded, dim=-2).to(device)

        mask = lined_up([torch.ones_like(prompt.ids) for prompt in prompts])
        self._mask = None if mask.all() else mask
        hidden = self._run(
            lined_up([prompt.ids for prompt in prompts]),
            lined_up([prompt.positions for prompt in prompts]),
            lined_up([prompt.image_mask for prompt in prompts]),
            encode_images(self._policy, prompts),
        )
        self._cache.batch_select_indices(self._group)
        if self._mask is not None:
            self._mask = self._mask[self._group]
        return hidden[self._group]

    def advance(self, tokens: Tensor) -> Tensor:
        if self._mask is not None:
            self._mask = pad(self._mask, (0, 1), value=1)
        hidden = self._run(tokens[:, None], self._positions, None, None)
        self._positions = self._positions + 1
        return hidden

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._positions = self._positions[:, rows]
        self._mask = None if self._mask is None else self._mask[rows]

    def _run(self, *given: Any) -> Tensor:
        """The last state of each row."""
        policy = self._policy
        output = policy.family.hidden_states(
            policy.base,
            *given,
            past_key_values=self._cache,
            attention_mask=self._mask,
            use_cache=True,
        )
        self._cache = output.past_key_values
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden


def _group(counts: Sequence[int], device: torch.device) -> Tensor:
    """The prompt that each response belongs to, (S,), where prompts have so many responses."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)


def _first_positions(prompts: Sequence[Prompt], group: Tensor) -> Tensor:
    """Of each response's first token, (axes, S, 1)."""
    first = torch.tensor([prompt.next_position for prompt in prompts], device=group.device)
    axes = prompts[0].positions.shape[0]
    return first[group][None, :, None].expand(axes, -1, -1)
