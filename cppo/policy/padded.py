"""Rows side by side, each a prompt and its response, padded on the right: for language models that
cannot attend in groups. Attention and its masks are the model's own.

Shapes: R rows, L positions of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from cppo.policy.batch import Batch, Row


def pad_rows(rows: Sequence[Row], device: torch.device) -> Batch:
    """Each row's prompt and response; the response's positions go on from the prompt's."""
    width = max(map(_length, rows))

    def lined_up(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([pad(x, (0, width - x.shape[-1])) for x in tensors], dim=-2).to(device)

    positions, before = [], []
    for number, row in enumerate(rows):
        own = torch.arange(len(row.response))
        later = (row.prompt.next_position + own).expand(row.prompt.positions.shape[0], -1)
        positions.append(torch.cat([row.prompt.positions, later], dim=1))
        before.append(number * width + len(row.prompt.ids) - 1 + own)
    hidden = [row.prompt.image_mask & row.prompt.blind for row in rows]
    ids = [row.prompt.ids.masked_fill(mask, 0) for row, mask in zip(rows, hidden, strict=True)]
    attended = [
        torch.cat([~m, m.new_ones(len(r.response))]) for r, m in zip(rows, hidden, strict=True)
    ]
    return Batch(
        ids=lined_up([torch.cat([own, row.response]) for own, row in zip(ids, rows, strict=True)]),
        positions=lined_up(positions),
        image_mask=lined_up([row.prompt.image_mask & (not row.prompt.blind) for row in rows]),
        shown=[row.prompt for row in rows if not row.prompt.blind],
        options={"attention_mask": lined_up(attended).long()},
        before=torch.cat(before).to(device),
    )


def padded_tokens(rows: Sequence[Row]) -> int:
    """What rows cost: each its prompt and its response, padded to the longest of all."""
    return len(rows) * max(map(_length, rows))


def _length(row: Row) -> int:
    return len(row.prompt.ids) + len(row.response)
