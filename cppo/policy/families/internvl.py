"""InternVL (3 and 3.5, in Hugging Face's format): a picture cut into tiles, and a thumbnail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cppo.policy.families.family import Features
from cppo.policy.families.flat import Flat, without_limits


class InternVL(Flat):
    def __init__(self, config: Any, tokenizer: Any, image_processor: Any) -> None:
        self.image_token = int(config.image_token_id)
        self.placeholder = tokenizer.convert_ids_to_tokens(self.image_token)
        self._start, self._end = tokenizer.start_image_token, tokenizer.end_image_token
        marks = (self.placeholder, self._start, self._end, tokenizer.video_token)
        self.forbidden = tuple(tokenizer.convert_tokens_to_ids(list(marks)))
        self._image_processor = image_processor
        height, width = (
            int(side // patch * config.downsample_ratio)
            for side, patch in zip(
                config.vision_config.image_size, config.vision_config.patch_size, strict=True
            )
        )
        self._tile = height * width  # tokens

    @staticmethod
    def load_image_processor(folder: str | Path, limits: Mapping[str, int]) -> Any:
        from transformers import GotOcr2ImageProcessorPil

        without_limits(limits, "internvl", known="max_pixels")
        processor = GotOcr2ImageProcessorPil.from_pretrained(folder)
        if "max_pixels" in limits:
            tile = processor.size["height"] * processor.size["width"]
            processor.max_patches = max(processor.min_patches, limits["max_pixels"] // tile)
        return processor

    def processor_settings(self) -> Mapping[str, Any]:
        return {"processor_class": "InternVLProcessor", "image_seq_length": self._tile}

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        # Saved image processors have this off; transformers' processor turns it on.
        made = self._image_processor(list(images), crop_to_patches=True, return_tensors="pt")
        return made["pixel_values"], torch.as_tensor(made["num_patches"])[:, None]

    def image_texts(self, grids: Tensor) -> list[str]:
        return [
            self._start + self.placeholder * (self._tile * tiles) + self._end
            for tiles in grids[:, 0].tolist()
        ]

    def encode(self, model: Any, pixels: Tensor, grids: Tensor) -> Features:
        tiles = model.model.get_image_features(pixels, return_dict=True).pooler_output
        return [image.flatten(0, 1)[None] for image in torch.split(tiles, grids[:, 0].tolist())]
