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
    present = [torch.ones(_length(row), dtype=torch.long) for row in rows]
    return Batch(
        ids=lined_up([torch.cat([row.prompt.ids, row.response]) for row in rows]),
        positions=lined_up(positions),
        image_mask=lined_up([row.prompt.image_mask for row in rows]),
        shown=rows,
        options={"attention_mask": lined_up(present)},
        before=torch.cat(before).to(device),
    )


def padded_tokens(rows: Sequence[Row]) -> int:
    """What rows cost: each its prompt and its response, padded to the longest of all."""
    return len(rows) * max(map(_length, rows))


def _length(row: Row) -> int:
    return len(row.prompt.ids) + len(row.response)
