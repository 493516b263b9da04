"""Scoring: log-probability and entropy of response tokens, on any view of the images.

Rows are packed, so that a prompt runs once for its responses, or padded where the model cannot
attend so. Either way each distinct picture passes through the vision tower once a call.

Shapes: R rows, T response tokens (right-padded), F image tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cppo.device import Backend
from cppo.methods import Scores
from cppo.policy.batch import Row
from cppo.policy.loading import Policy
from cppo.policy.packed import pack
from cppo.policy.padded import pad_rows


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
        """Scores each row's response tokens; (R, T), zero on padding. T is the longest response."""
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
        logprobs, entropy = self._backend.token_statistics(
            hidden[batch.before],
            policy.head,
            torch.cat([row.response for row in rows]).to(device),
            temperature=self._temperature,
        )
        lengths = torch.tensor([len(row.response) for row in rows])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
        empty = logprobs.new_zeros(mask.shape)
        return Scores(
            logprobs=empty.masked_scatter(mask, logprobs),
            entropy=empty.masked_scatter(mask, entropy),
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
