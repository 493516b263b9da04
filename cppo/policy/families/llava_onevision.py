"""LLaVA-OneVision: a picture by itself as a thumbnail, and as tiles near its own resolution whose
rows end with a newline feature; one of several pictures as a single tile."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from cppo.policy.families.family import Features
from cppo.policy.families.flat import Flat, without_limits


class LlavaOnevision(Flat):
    vision: ClassVar[tuple[str, ...]] = (*Flat.vision, "image_newline")

    def __init__(self, config: Any, tokenizer: Any, image_processor: Any) -> None:
        self.image_token = int(config.image_token_id)
        self.placeholder = tokenizer.convert_ids_to_tokens(self.image_token)
        self.forbidden: tuple[int, ...] = (self.image_token, int(config.video_token_id))
        self._image_processor = image_processor
        self._config = config
        self._tile = (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    @staticmethod
    def load_image_processor(folder: str | Path, limits: Mapping[str, int]) -> Any:
        from transformers import LlavaOnevisionImageProcessorPil

        without_limits(limits, "llava_onevision")
        return LlavaOnevisionImageProcessorPil.from_pretrained(folder)

    @staticmethod
    def prepare(model: Any) -> None:
        # Features are taken before these parts, which no gradient ever reaches: processes that
        # share gradients would wait for one.
        for name, parameter in model.model.vision_tower.named_parameters():
            if {"post_layernorm", "head"} & set(name.split(".")):
                parameter.requires_grad_(False)

    def processor_settings(self) -> Mapping[str, Any]:
        strategy = self._config.vision_feature_select_strategy
        return {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": self._tile + (strategy == "default"),  # which leaves one out
            "vision_feature_select_strategy": strategy,
            "vision_aspect_ratio": self._config.vision_aspect_ratio,
        }

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Tiles, and (height, width, tiles) of each image. More than one have one tile each."""
        made = self._image_processor([list(images)], return_tensors="pt")
        tiles = torch.full((len(images), 1), made["pixel_values"].shape[1])
        return made["pixel_values"].flatten(0, 1), torch.cat([made["image_sizes"], tiles], dim=1)

    def image_texts(self, grids: Tensor) -> list[str]:
        from transformers import LlavaOnevisionModel

        # The model's own way with features tells how many there are, on tensors without data.
        counted, _ = LlavaOnevisionModel.pack_image_features(
            SimpleNamespace(config=self._config),
            [torch.empty(tiles, self._tile, 1, device="meta") for tiles in grids[:, 2].tolist()],
            grids[:, :2].tolist(),
            image_newline=torch.empty(1, device="meta"),
            vision_aspect_ratio=self._config.vision_aspect_ratio,
        )
        return [self.placeholder * len(features) for features in counted]

    def encode(self, model: Any, pixels: Tensor, grids: Tensor) -> Features:
        prompts: list[int] = []  # images of each, by which the model tells those of one tile
        for alone, run in itertools.groupby(grids[:, 2].tolist(), key=lambda tiles: tiles > 1):
            count = len(list(run))
            prompts += [1] * count if alone else [count]
        features = model.model.get_image_features(
            pixels, grids[:, :2], batch_num_images=prompts, return_dict=True
        ).pooler_output
        return [image[None] for image in features]
