"""Scoring: log-probability and entropy of response tokens, on any view of the images.

Responses to the same prompt with the same pixels share one pass of both (see `groups`). Each
distinct picture passes through the vision tower once a call.

Shapes: R rows, T response tokens (right-padded), L positions of the packed sequence, G groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cppo.device import Backend
from cppo.methods import Scores
from cppo.policy.groups import Layout
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
        groups = _grouped(rows)
        batch = _pack(groups, device)
        with policy.autocast():
            hidden = policy.family.hidden_states(
                policy.base,
                batch.ids,
                batch.positions,
                batch.image_mask,
                encode_images(policy, [group[0] for group in groups]),
                use_cache=False,
                layout=batch.layout,
            ).last_hidden_state[0]
        logprobs, entropy = self._backend.token_statistics(
            hidden[batch.before], policy.head, batch.targets, temperature=self._temperature
        )
        mask = batch.layout.responses.mask
        place = {id(row): number for number, row in enumerate(itertools.chain(*groups))}
        order = torch.tensor([place[id(row)] for row in rows], device=device)
        empty = logprobs.new_zeros(mask.shape)
        return Scores(
            logprobs=empty.masked_scatter(mask, logprobs)[order],
            entropy=empty.masked_scatter(mask, entropy)[order],
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
    ids: Tensor  # (1, L)
    positions: Tensor  # (axes, 1, L)
    image_mask: Tensor  # (1, L), only within prompts: a sampled placeholder is no image
    layout: Layout
    before: Tensor  # (tokens of all responses,) what predicts each: the one before it
    targets: Tensor  # (tokens of all responses,)


def _grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that share prompt and pixels; prompts of one length follow each other."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((id(row.prompt), id(row.pixels)), []).append(row)
    return sorted(groups.values(), key=lambda group: len(group[0].prompt.ids))


def _pack(groups: Sequence[Sequence[Row]], device: torch.device) -> _Batch:
    """The groups as one sequence; each response's positions go on from its prompt's."""
    prompts = [group[0].prompt for group in groups]
    lengths = [len(prompt.ids) for prompt in prompts]
    rows = [row for group in groups for row in group]
    responses = torch.cat([row.response for row in rows])
    axes, start = prompts[0].positions.shape[0], sum(lengths)
    positions, before = [], []
    for group, end in zip(groups, itertools.accumulate(lengths), strict=True):
        for row in group:
            own = torch.arange(len(row.response))
            positions.append((row.prompt.next_position + own).expand(axes, -1))
            before.append(torch.where(own == 0, end - 1, start + own - 1))
            start += len(own)
    return _Batch(
        ids=torch.cat([*(prompt.ids for prompt in prompts), responses])[None].to(device),
        positions=torch.cat([*(p.positions for p in prompts), *positions], dim=1)[:, None].to(
            device
        ),
        image_mask=torch.cat(
            [*(p.image_mask for p in prompts), torch.zeros(len(responses), dtype=torch.bool)]
        )[None].to(device),
        layout=Layout.of(
            lengths, [[len(row.response) for row in group] for group in groups], device
        ),
        before=torch.cat(before).to(device),
        targets=responses.to(device),
    )
