"""The model a token at a time: prompts first, then one more token of each response.

A policy that packs (see `cppo.policy.packed`) decodes in groups; any other in rows, as transformers
itself does.

Shapes: P prompts, S responses being sampled, D hidden size.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from cppo.device import first_line
from cppo.policy.families import Family
from cppo.policy.loading import Policy
from cppo.policy.prompts import Prompt
from cppo.policy.scoring import encode_images
from cppo.rollout.cache import GroupCache

logger = logging.getLogger(__name__)


class Decoder(Protocol):
    """The responses to some prompts, those to the same one side by side."""

    compiled: bool  # whether the pass of a token is

    def begin(self) -> Tensor:
        """Runs the prompts. Returns the states that predict the responses' first tokens, (S, D)."""

    def advance(self, tokens: Tensor) -> Tensor:
        """Runs one more token of each response, (S,). Returns the states that predict the next."""

    def keep(self, rows: Tensor) -> None:
        """Goes on with these responses alone (indices in order)."""


def decoder(
    policy: Policy, prompts: Sequence[Prompt], responses: int, *, compile: bool = False
) -> Decoder:
    """For `responses` to each prompt; one that follows itself is run once.

    `compile` has the pass of a token compiled; the log says where that cannot be.
    """
    assert not any(prompt.blind for prompt in prompts), "blind prompts are only scored"
    runs = [list(run) for _, run in itertools.groupby(prompts, key=id)]
    counts = [len(run) * responses for run in runs]
    distinct = [run[0] for run in runs]
    if compile and (why := _not_to_be_compiled(policy)):
        _say_once(f"sampling is not compiled: {why}")
        compile = False
    if not policy.packs:
        return InRows(policy, distinct, counts)
    return InGroups(policy, distinct, counts, compile=compile)


def _not_to_be_compiled(policy: Policy) -> str:
    """Why not; empty where it can be."""
    if not policy.packs:
        return "the model does not attend in groups"
    if policy.head.dtype != policy.precision:
        kept, wanted = str(policy.head.dtype)[6:], str(policy.precision)[6:]
        return f"weights are kept in {kept}, and would be made {wanted} again for each token"
    return ""


@functools.cache
def _say_once(line: str) -> None:
    logger.warning(line)


class InGroups:
    """Prompts are packed, and each is run, and its keys and values are held, once for its group."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        *,
        compile: bool = False,
    ) -> None:
        self._policy, self._prompts, self.compiled = policy, prompts, compile
        lengths = [len(prompt.ids) for prompt in prompts]
        self._cache = GroupCache(lengths, counts, policy.device, one_form=compile)
        self._group = _group(counts, policy.device)
        self._positions = _first_positions(prompts, self._group)

    def begin(self) -> Tensor:
        policy, prompts, device = self._policy, self._prompts, self._policy.device
        ends = torch.tensor([len(prompt.ids) for prompt in prompts]).cumsum(0) - 1
        output = policy.family.hidden_states(
            policy.base,
            torch.cat([prompt.ids for prompt in prompts])[None].to(device),
            torch.cat([prompt.positions for prompt in prompts], dim=1)[:, None].to(device),
            torch.cat([prompt.image_mask for prompt in prompts])[None].to(device),
            encode_images(policy, prompts),
            use_cache=False,
            layout=self._cache,
        )
        states: Tensor = output.last_hidden_state[0, ends.to(device)[self._group]]
        return states

    def advance(self, tokens: Tensor) -> Tensor:
        policy = self._policy
        self._cache.advance()
        # To a compiler, sizes of 1 are cases apart.
        compiled = self.compiled and self._cache.sampled > 1 and len(tokens) > 1
        run = _compiled() if compiled else _next_states
        # Draws are views until a response ends, and code compiled for a view serves nothing else.
        own = tokens.clone()
        states = run(policy.family, policy.base, own, self._positions, self._cache)
        self._positions = self._positions + 1
        return states

    def keep(self, rows: Tensor) -> None:
        self._cache.keep(rows)
        self._positions = self._positions[:, rows]


def _next_states(
    family: Family, base: Any, tokens: Tensor, positions: Tensor, cache: GroupCache
) -> Tensor:
    """Of one more token of each response, (S,), at positions (axes, S, 1); (S, D)."""
    output = family.hidden_states(
        base, tokens[:, None], positions, None, None, use_cache=False, layout=cache
    )
    states: Tensor = output.last_hidden_state[:, -1]
    return states


class _Compiled:
    """The same, compiled when it is first called, and again for the first batch of another kind (of
    several prompts, of one, of one response to each); as it is from where that fails. A call that
    fails can be made again: it writes to the cache's last place."""

    def __init__(self) -> None:
        logger.info("sampling will be compiled at its second token, for a minute or more")
        self._run: Callable[..., Tensor] = torch.compile(_next_states, dynamic=True)

    @property
    def failed(self) -> bool:
        return self._run is _next_states

    def __call__(self, *given: Any) -> Tensor:
        from torch._dynamo import config as of_code
        from torch._dynamo.exc import TorchDynamoException
        from torch.fx.experimental import _config as of_shapes

        try:
            with (
                # Sizes that happen to be equal, of responses and heads, say, are not one.
                of_shapes.patch(use_duck_shape=False),  # type: ignore[attr-defined]  # made at run time
                # The model's numbers are constants; to leave them open takes a second try.
                of_code.patch(specialize_float=True),
            ):
                return self._run(*given)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            logger.warning(
                "sampling is not compiled: %s: %s", type(cause).__name__, first_line(cause)
            )
            self._run = _next_states
            return self._run(*given)


_compiled = functools.cache(_Compiled)


class InRows:
    """Prompts are padded on the left, and transformers' cache is copied for each response."""

    compiled = False

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
