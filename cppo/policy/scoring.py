"""Scoring: log-probability and entropy of response tokens, on any view of the images.

This is the reference path: rows are padded to one length, each row carrying its own prompt. Each
distinct picture passes through the vision tower once a call.

Shapes: R rows, T response tokens (right-padded), L positions of prompt and response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cppo.device import Backend
from cppo.methods import Scores
from cppo.policy.loading import Policy
from cppo.policy.prompts import Prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A response to score: after which prompt, and seeing which pixels."""

    prompt: Prompt
    pixels: Tensor
    response: Tensor  # (length,) ids


class Scorer(nn.Module):
    """The one module that is called for scoring, so that wrapping it synchronises all gradients."""

    def __init__(self, policy: Policy, backend: Backend, *, temperature: float) -> None:
        super().__init__()
        self.policy_model = policy.model  # registered here: its parameters are this module's
        self._policy = policy
        self._backend = backend
        self._temperature = temperature

    def forward(self, rows: Sequence[Row]) -> Scores:
        """Scores each row's response tokens; (R, T), zero on padding. T is the longest response."""
        policy, device = self._policy, self._policy.device
        batch = _pad(rows)
        with policy.autocast():
            hidden = policy.family.hidden_states(
                policy.base,
                batch.ids.to(device),
                batch.positions.to(device),
                batch.image_mask.to(device),
                encode_images(policy, rows),
                use_cache=False,
            ).last_hidden_state
        # Position p predicts token p + 1; only the positions before response tokens are projected.
        lengths = torch.tensor([len(row.response) for row in rows])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        first = torch.tensor([len(row.prompt.ids) - 1 for row in rows])
        row_index, token_index = mask.nonzero(as_tuple=True)
        picked = hidden[row_index.to(device), (first[row_index] + token_index).to(device)]
        targets = torch.cat([row.response for row in rows]).to(device)
        logprobs, entropy = self._backend.token_statistics(
            picked, policy.head, targets, temperature=self._temperature
        )
        place = mask.to(device)
        empty = logprobs.new_zeros(place.shape)
        return Scores(
            logprobs=empty.masked_scatter(place, logprobs),
            entropy=empty.masked_scatter(place, entropy),
        )


def encode_images(policy: Policy, rows: Sequence[Row]) -> Tensor:
    """Features (levels, F, D) of all rows' images in order, each distinct picture encoded once."""
    distinct = {id(row.pixels): row for row in rows}
    encoded = policy.family.encode(
        policy.base,
        torch.cat([row.pixels for row in distinct.values()]).to(policy.device),
        torch.cat([row.prompt.grids for row in distinct.values()]).to(policy.device),
    )
    of_row, start = {}, 0
    for key, row in distinct.items():
        of_row[key] = encoded[start : start + len(row.prompt.grids)]
        start += len(row.prompt.grids)
    return torch.cat([image for row in rows for image in of_row[id(row.pixels)]], dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    ids: Tensor  # (R, L)
    positions: Tensor  # (axes, R, L)
    image_mask: Tensor  # (R, L), only within prompts: a sampled placeholder is no image


def _pad(rows: Sequence[Row]) -> _Batch:
    """Right-pads `prompt + response`. Attention is causal: what follows a row never reaches it."""
    positions = []
    for row in rows:
        response = row.prompt.next_position + torch.arange(len(row.response))
        axes = row.prompt.positions.shape[0]
        positions.append(torch.cat([row.prompt.positions, response.expand(axes, -1)], dim=1).T)
    return _Batch(
        ids=pad_sequence(
            [torch.cat([row.prompt.ids, row.response]) for row in rows], batch_first=True
        ),
        positions=pad_sequence(positions, batch_first=True).permute(2, 0, 1),
        image_mask=pad_sequence(
            [
                torch.cat([row.prompt.image_mask, torch.zeros(len(row.response), dtype=torch.bool)])
                for row in rows
            ],
            batch_first=True,
        ),
    )
