"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

They differ in size and in the vision tower, which transformers hides; and Qwen3-VL adds deeper
visual features to its first layers ("deep-stack"), which here are just more levels of features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import linear

from cppo.policy.families.family import Features

PLACEHOLDERS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class PatchProjection(nn.Module):
    """The patch embedding as one matrix product.

    Its convolution's kernel is its stride, so that each output sees one patch: the same sum, but
    convolution kernels take about nine times as long for it (on a CPU, measured at 3,072 patches).
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.proj = convolution  # under its old name: saved models stay the same

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return linear(patches.to(weight.dtype), weight, self.proj.bias)


class QwenVL:
    vision: ClassVar[tuple[str, ...]] = ("visual",)
    causal: ClassVar[bool] = True

    def __init__(self, config: Any, tokenizer: Any, image_processor: Any) -> None:
        self.image_token = int(config.image_token_id)
        self.placeholder = tokenizer.convert_ids_to_tokens(self.image_token)
        self.forbidden = tuple(int(getattr(config, name)) for name in PLACEHOLDERS)
        self._image_processor = image_processor
        self._merged = config.vision_config.spatial_merge_size**2

    @staticmethod
    def load_image_processor(folder: str | Path, limits: Mapping[str, int]) -> Any:
        # AutoProcessor needs torchvision for its video part; the Pillow image processor does not.
        from transformers import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil.from_pretrained(folder, **limits)

    @staticmethod
    def language_model(model: Any) -> Any:
        return model.model.language_model

    @staticmethod
    def prepare(model: Any) -> None:
        tower = model.model.visual
        tower.patch_embed = PatchProjection(tower.patch_embed.proj)

    def processor_settings(self) -> Mapping[str, Any]:
        return {}  # its processor needs none

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        made = self._image_processor(list(images), return_tensors="pt")
        return made["pixel_values"], made["image_grid_thw"]

    def image_texts(self, grids: Tensor) -> list[str]:
        return [self.placeholder * tokens for tokens in self._tokens(grids)]

    def positions(self, model: Any, ids: Tensor, grids: Tensor) -> tuple[Tensor, int]:
        # Left out, mm_token_type_ids would silently give one-dimensional positions.
        kinds = (ids == self.image_token).int()
        found, _ = model.model.get_rope_index(ids[None], kinds[None], image_grid_thw=grids)
        return found[:, 0], int(found.max()) + 1

    def encode(self, model: Any, pixels: Tensor, grids: Tensor) -> Features:
        tower = model.model.visual
        seen = tower(pixels.to(tower.dtype), grid_thw=grids, return_dict=True)
        levels = torch.stack(
            [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())]
        )
        return torch.split(levels, self._tokens(grids), dim=1)

    def _tokens(self, grids: Tensor) -> list[int]:
        return [int(patches) // self._merged for patches in grids.prod(-1)]

    def hidden_states(
        self,
        model: Any,
        ids: Tensor,
        positions: Tensor,
        image_mask: Tensor | None,
        features: Tensor | None,
        **options: Any,
    ) -> Any:
        language = self.language_model(model)
        embeddings = language.embed_tokens(ids)
        if image_mask is not None and features is not None:
            surface, deeper = features[0].to(embeddings.dtype), list(features[1:])
            embeddings = embeddings.masked_scatter(image_mask[..., None], surface)
            if deeper:
                options |= {"visual_pos_masks": image_mask, "deepstack_visual_embeds": deeper}
        return language(inputs_embeds=embeddings, position_ids=positions, **options)
