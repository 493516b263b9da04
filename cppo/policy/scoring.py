"""Scoring: log-probability and entropy of response tokens, on any view of the images.

Rows are packed, so that a prompt runs once for its responses, or padded where the model cannot
attend so. Either way each distinct picture passes through the vision tower once a call at most.

Shapes: R rows, T response tokens (right-padded), F image tokens of all prompts that are shown.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from cppo.device import Backend
from cppo.methods import Scores
from cppo.policy.batch import Row
from cppo.policy.loading import Policy
from cppo.policy.packed import pack
from cppo.policy.padded import pad_rows
from cppo.policy.prompts import Prompt
from cppo.statistics import token_divergence

log = logging.getLogger(__name__)


class Scorer(nn.Module):
    """The one module that is called for scoring, so that wrapping it synchronises all gradients."""

    def __init__(self, policy: Policy, backend: Backend, *, temperature: float) -> None:
        super().__init__()
        self.policy_model = policy.model  # registered here: its parameters are this module's
        self._policy = policy
        self._backend = backend
        self._temperature = temperature
        part = backend.partial_attention
        # Who asks for eager attention gets it here too.
        if policy.attention == "eager" or (part and policy.precision not in part.precision):
            part = None
        self._arrange = partial(pack, part=part) if policy.packs else pad_rows
        if policy.packs:
            log.info("attention in groups is %s", "in parts" if part else "under a mask")

    def forward(
        self,
        rows: Sequence[Row],
        later: Sequence[Row] = (),
        choose: Callable[[Scores], Sequence[Tensor]] | None = None,
    ) -> Scores:
        """Scores each row's response tokens; (R, T), zero on padding. T is the longest response.

        Where rows are to be held against others, so are their divergences, zero for the rest.

        `later` follow `rows` in the result. They go through the model in the same pass; but which
        of their tokens go on to the vocabulary, `choose` says, given the scores of `rows`: a mask,
        (length,) bool, for each. On the others they are zero.
        """
        policy, device = self._policy, self._policy.device
        every = [*rows, *later]
        batch = self._arrange(every, device)
        with policy.autocast():
            hidden = policy.family.hidden_states(
                policy.base,
                batch.ids,
                batch.positions,
                batch.image_mask,
                encode_images(policy, batch.shown),
                use_cache=False,
                **batch.options,
            ).last_hidden_state.flatten(0, 1)
        # Weights that are trained are wide, and so are the states that the last norm gives: the
        # products would be too, at many times the cost on hardware that multiplies 16-bit numbers.
        head = policy.head.to(policy.precision)
        project = partial(self._project, every, hidden, batch.before, head)
        first = sum(len(row.response) for row in rows)
        tokens = torch.arange(len(batch.before), device=device)
        scores = project(tokens[:first])
        chosen = choose(scores) if choose else []
        if not later:
            return scores
        return Scores.combined(torch.add, scores, project(tokens[first:][torch.cat([*chosen])]))

    def _project(
        self, rows: Sequence[Row], hidden: Tensor, before: Tensor, head: Tensor, tokens: Tensor
    ) -> Scores:
        """The scores of some of all rows' tokens, given by number; (R, T), zero elsewhere."""
        device = self._policy.device

        def states(tokens: Tensor) -> Tensor:
            return hidden[before[tokens]].to(head.dtype)

        lengths = torch.tensor([len(row.response) for row in rows])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)

        def spread(values: Tensor, tokens: Tensor) -> Tensor:
            flat = values.new_zeros(len(before)).index_copy(0, tokens, values)
            return flat.new_zeros(mask.shape).masked_scatter(mask, flat)

        logprobs, entropy = self._backend.token_statistics(
            states(tokens),
            head,
            torch.cat([row.response for row in rows]).to(device)[tokens],
            temperature=self._temperature,
        )
        divergence = None
        if any(row.against for row in rows):
            beside = _beside(rows).to(device)
            held = tokens[beside[tokens] >= 0]
            divergence = logprobs.new_zeros(mask.shape)
            if len(held):
                divergence = spread(
                    token_divergence(
                        states(beside[held]), states(held), head, temperature=self._temperature
                    ),
                    held,
                )
        return Scores(
            logprobs=spread(logprobs, tokens),
            entropy=spread(entropy, tokens),
            divergence=divergence,
        )


def _beside(rows: Sequence[Row]) -> Tensor:
    """Of each token its counterpart in the row that its own is held against, by number; else -1."""
    starts, start = {}, 0
    for row in rows:
        starts[id(row)] = start
        start += len(row.response)
    counterparts = [
        torch.arange(len(row.response)) + starts[id(row.against)]
        if row.against
        else row.response.new_full(row.response.shape, -1)
        for row in rows
    ]
    return torch.cat(counterparts)


def encode_images(policy: Policy, prompts: Sequence[Prompt]) -> Tensor | None:
    """Features (levels, F, D) of all prompts' images in order; None where there are none.

    Each distinct picture is encoded once; and where no gradient is wanted, never again as long as
    its pixels are held and the vision tower is as it was.
    """
    prompts = [prompt for prompt in prompts if len(prompt.grids)]
    sight = policy.sight
    learns = bool(sight) and torch.is_grad_enabled()
    held = WeakTensorKeyDictionary() if learns else policy.features
    fresh = {id(p.pixels): p for p in prompts if sight not in held.get(p.pixels, {})}
    if fresh:
        # Checkpointing adapters makes the tower's inputs differentiable, whether it learns or not.
        with torch.set_grad_enabled(learns):
            encoded = policy.family.encode(
                policy.base,
                torch.cat([prompt.pixels.to(policy.device) for prompt in fresh.values()]),
                torch.cat([prompt.grids for prompt in fresh.values()]).to(policy.device),
            )
        start = 0
        for prompt in fresh.values():
            images = encoded[start : start + len(prompt.grids)]
            held.setdefault(prompt.pixels, {})[sight] = torch.cat(list(images), dim=1)
            start += len(prompt.grids)
    return torch.cat([held[p.pixels][sight] for p in prompts], dim=1) if prompts else None
