"""Scoring: log-probability and entropy of response tokens, on any view of the images.

Rows are packed, so that a prompt runs once for its responses, or padded where the model cannot
attend so. Either way each distinct picture passes through the vision tower once a call at most.

Shapes: R rows, T response tokens (right-padded), F image tokens of all prompts that are shown.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

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


class Scorer(nn.Module):
    """The one module that is called for scoring, so that wrapping it synchronises all gradients."""

    def __init__(self, policy: Policy, backend: Backend, *, temperature: float) -> None:
        super().__init__()
        self.policy_model = policy.model  # registered here: its parameters are this module's
        self._policy = policy
        self._backend = backend
        self._temperature = temperature
        self._arrange = pack if policy.packs else pad_rows

    def forward(self, rows: Sequence[Row]) -> Scores:
        """Scores each row's response tokens; (R, T), zero on padding. T is the longest response.

        Where rows are to be held against others, so are their divergences, zero for the rest.
        """
        policy, device = self._policy, self._policy.device
        batch = self._arrange(rows, device)
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
        states, head = (
            tensor.to(policy.precision) for tensor in (hidden[batch.before], policy.head)
        )
        logprobs, entropy = self._backend.token_statistics(
            states,
            head,
            torch.cat([row.response for row in rows]).to(device),
            temperature=self._temperature,
        )
        lengths = [len(row.response) for row in rows]
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)
        empty = logprobs.new_zeros(mask.shape)
        divergence = None
        if any(row.against for row in rows):
            divergence = self._divergence(rows, states.split(lengths), head, empty)
        return Scores(
            logprobs=empty.masked_scatter(mask, logprobs),
            entropy=empty.masked_scatter(mask, entropy),
            divergence=divergence,
        )

    def _divergence(
        self, rows: Sequence[Row], states: Sequence[Tensor], head: Tensor, empty: Tensor
    ) -> Tensor:
        """Of the rows that are to be held against others, (R, T); zero elsewhere."""
        place = {id(row): number for number, row in enumerate(rows)}
        pairs = [(place[id(row.against)], n) for n, row in enumerate(rows) if row.against]
        divergence = token_divergence(
            torch.cat([states[there] for there, _ in pairs]),
            torch.cat([states[here] for _, here in pairs]),
            head,
            temperature=self._temperature,
        )
        lengths = torch.tensor([len(row.response) if row.against else 0 for row in rows])
        mask = (torch.arange(empty.shape[1]) < lengths[:, None]).to(empty.device)
        return empty.masked_scatter(mask, divergence)


def encode_images(policy: Policy, prompts: Sequence[Prompt]) -> Tensor | None:
    """Features (levels, F, D) of all prompts' images in order; None where there are none.

    Each distinct picture is encoded once; and where nothing in the vision tower is trained, never
    again as long as its pixels are held.
    """
    prompts = [prompt for prompt in prompts if len(prompt.grids)]
    known: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
    if not policy.learns_to_see:
        known = policy.features
    fresh = {id(p.pixels): p for p in prompts if p.pixels not in known}
    if fresh:
        # Checkpointing adapters makes the tower's inputs differentiable, whether it learns or not.
        with torch.set_grad_enabled(torch.is_grad_enabled() and policy.learns_to_see):
            encoded = policy.family.encode(
                policy.base,
                torch.cat([prompt.pixels for prompt in fresh.values()]).to(policy.device),
                torch.cat([prompt.grids for prompt in fresh.values()]).to(policy.device),
            )
        start = 0
        for prompt in fresh.values():
            images = encoded[start : start + len(prompt.grids)]
            known[prompt.pixels] = torch.cat(list(images), dim=1)
            start += len(prompt.grids)
    return torch.cat([known[p.pixels] for p in prompts], dim=1) if prompts else None
