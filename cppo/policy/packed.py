"""Rows in one packed sequence: responses to the same prompt, on the same view, share its pass.

What attends to what in that sequence is the group layout (see `groups`); not every language model
can be made to attend so.

Shapes: R rows, L positions of the packed sequence, G groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cppo.attention.groups import Layout
from cppo.device import PartialAttention
from cppo.policy.batch import Batch, Row
from cppo.policy.families import Family

if TYPE_CHECKING:
    from cppo.policy.prompts import Prompt

# Language models, as transformers calls them, whose attention does nothing that groups leave out.
PROVEN = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen2", "qwen3", "llama")


def obstacle(family: Family | type[Family], language: Any) -> str:
    """Why a language model of this config cannot attend in groups; empty where it can."""
    if not family.causal:
        return "its image tokens attend to later ones"
    kinds = set(getattr(language, "layer_types", None) or ["full_attention"])
    if others := kinds - {"full_attention"}:
        return f"it has layers of {', '.join(sorted(others))}"
    if getattr(language, "attention_dropout", 0):
        return f"it drops {language.attention_dropout} of its attention in training"
    if language.model_type not in PROVEN:
        return (
            f"attention in groups is not proven for language models of type {language.model_type}"
        )
    return ""


def pack(rows: Sequence[Row], device: torch.device, part: PartialAttention | None = None) -> Batch:
    """Prompts, then responses; each response's positions go on from its prompt's.

    They are attended to in parts where there is a `part`, else under a mask.
    """
    groups = _grouped(rows)
    prompts = [group[0].prompt for group in groups]
    present = [_present(prompt) for prompt in prompts]
    lengths = [int(kept.sum()) for kept in present]
    responses = torch.cat([row.response for group in groups for row in group])
    axes, start = prompts[0].positions.shape[0], sum(lengths)
    positions, before = [], {}
    for group, end in zip(groups, itertools.accumulate(lengths), strict=True):
        for row in group:
            own = torch.arange(len(row.response))
            positions.append((row.prompt.next_position + own).expand(axes, -1))
            before[id(row)] = torch.where(own == 0, end - 1, start + own - 1)
            start += len(own)

    def joined(of_prompts: Sequence[Tensor], of_responses: Sequence[Tensor]) -> Tensor:
        shortened = [x[..., kept] for x, kept in zip(of_prompts, present, strict=True)]
        return torch.cat([*shortened, *of_responses], dim=-1).to(device)

    nowhere = torch.zeros(len(responses), dtype=torch.bool)
    layout = Layout(
        prompts=lengths,
        responses=[[len(row.response) for row in group] for group in groups],
        device=device,
        part=part,
    )
    return Batch(
        ids=joined([prompt.ids for prompt in prompts], [responses])[None],
        positions=joined([prompt.positions for prompt in prompts], positions)[:, None],
        image_mask=joined([prompt.image_mask for prompt in prompts], [nowhere])[None],
        shown=[prompt for prompt in prompts if not prompt.blind],
        options={"layout": layout},
        before=torch.cat([before[id(row)] for row in rows]).to(device),
    )


def packed_tokens(rows: Sequence[Row]) -> int:
    """What rows cost: every prompt once, and responses as long as the longest, as attention under
    a mask pads them."""
    prompts = {id(row.prompt): int(_present(row.prompt).sum()) for row in rows}
    return sum(prompts.values()) + len(rows) * max(len(row.response) for row in rows)


def _present(prompt: Prompt) -> Tensor:
    """The tokens of a prompt that its sequence holds, (L,): what nothing attends to is left out,
    positions being given with each token."""
    return ~prompt.image_mask if prompt.blind else torch.ones_like(prompt.image_mask)


def _grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that share a prompt; prompts of one length follow each other."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(id(row.prompt), []).append(row)
    return sorted(groups.values(), key=lambda group: int(_present(group[0].prompt).sum()))
