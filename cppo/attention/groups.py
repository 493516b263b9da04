"""The group layout: prompts with their responses as one packed sequence, and attention within it.

    [prompt 1 | prompt 2 | ... | response 1 of prompt 1 | response 2 of prompt 1 | ...]

A response attends to its prompt and to itself, so that it gets what it would get alone, while the
prompt runs once for all of them. Models stay as they are: in transformers a function of ours stands
for their attention, and what it must know of the layout travels as a keyword of the forward.

Shapes: L positions of the packed sequence; H query heads, h key and value heads (H is a multiple of
h), D of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cppo.attention.kernels import Kernel, eager_attention
from cppo.attention.masked import PaddedRows, attend_masked
from cppo.attention.merged import GroupSegments, attend_merged
from cppo.device import PartialAttention


class Attending(Protocol):
    """What stands for a layer's attention: `Layout` in scoring, a cache in sampling."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, kernel: Kernel
    ) -> Tensor:
        """`query` (B, H, L, D), `key` and `value` (B, h, L, D). Returns (B, L, H, D)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Prompts of these lengths, and of each its responses of those lengths."""

    prompts: Sequence[int]
    responses: Sequence[Sequence[int]]
    device: torch.device | str = "cpu"
    part: PartialAttention | None = None  # that stands for the kernel; without, there is a mask

    def __post_init__(self) -> None:
        assert all(self.prompts), "no prompt is empty"
        assert all(lengths and all(lengths) for lengths in self.responses), "no response is empty"

    @cached_property
    def segments(self) -> GroupSegments:
        return GroupSegments.of(self.prompts, self.responses, self.device)

    @cached_property
    def rows(self) -> PaddedRows:
        return PaddedRows.of(self.prompts, self.responses, self.device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, kernel: Kernel
    ) -> Tensor:
        """Every layer alike."""
        if self.part is None:
            return attend_masked(query, key, value, self.rows, scale=scale, kernel=kernel)
        return attend_merged(query, key, value, self.segments, scale=scale, part=self.part)


def register(attention: str) -> str:
    """Tells transformers of attention in groups, for a policy of this attention; returns the name
    by which a model's config asks for it.

    Where that is "eager", so is the attention in groups; else it is PyTorch's.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    name = "cppo_groups_eager" if attention == "eager" else "cppo_groups"
    kernel = eager_attention if attention == "eager" else scaled_dot_product_attention

    def forward(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layout: Attending,
        scaling: float,
        **options: Any,
    ) -> tuple[Tensor, None]:
        attended = layout.attend(
            query, key, value, layer=module.layer_idx, scale=scaling, kernel=kernel
        )
        return attended, None

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, lambda *given, **options: None)
    return name
