"""Idefics3 and SmolVLM: a picture as rows of tiles, each named by its place, and as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from cppo.policy.families.family import Features
from cppo.policy.families.flat import Flat, without_limits

AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


class Idefics3(Flat):
    vision: ClassVar[tuple[str, ...]] = ("vision_model", "connector")

    def __init__(self, config: Any, tokenizer: Any, image_processor: Any) -> None:
        self.image_token = int(config.image_token_id)
        self.placeholder = tokenizer.convert_ids_to_tokens(self.image_token)
        marks = tokenizer.convert_tokens_to_ids([AROUND, WHOLE])
        self.forbidden: tuple[int, ...] = (self.image_token, *marks)
        self._image_processor = image_processor
        self._kind = {"idefics3": "Idefics3Processor", "smolvlm": "SmolVLMProcessor"}[
            config.model_type
        ]
        side = config.vision_config.image_size // config.vision_config.patch_size
        self._tile = side**2 // config.scale_factor**2  # tokens

    @staticmethod
    def load_image_processor(folder: str | Path, limits: Mapping[str, int]) -> Any:
        # SmolVLM's is the same under another name. Under `transformers` itself, older versions have
        # neither where torchvision is absent.
        from transformers.models.idefics3.image_processing_pil_idefics3 import (
            Idefics3ImageProcessorPil,
        )

        without_limits(limits, "idefics3 and smolvlm", known="max_pixels")
        processor = Idefics3ImageProcessorPil.from_pretrained(folder)
        if "max_pixels" in limits:
            tile = processor.max_image_size["longest_edge"]
            side = tile * max(1, math.isqrt(limits["max_pixels"]) // tile)
            size = {"longest_edge": min(side, processor.size["longest_edge"])}
            processor = Idefics3ImageProcessorPil.from_pretrained(folder, size=size)
        return processor

    @staticmethod
    def language_model(model: Any) -> Any:
        return model.model.text_model

    def processor_settings(self) -> Mapping[str, Any]:
        return {"processor_class": self._kind, "image_seq_len": self._tile}

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Tiles, and (rows, columns) of each image; none where it is seen as a whole alone."""
        made = self._image_processor([list(images)], return_row_col_info=True, return_tensors="pt")
        grids = torch.tensor([made["rows"][0], made["cols"][0]]).T
        return made["pixel_values"][0], grids

    def image_texts(self, grids: Tensor) -> list[str]:
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        return [
            get_image_prompt_string(
                *(rows, columns, self._tile),
                fake_token_around_image=AROUND,
                image_token=self.placeholder,
                global_image_token=WHOLE,
            )
            for rows, columns in grids.tolist()
        ]

    def encode(self, model: Any, pixels: Tensor, grids: Tensor) -> Features:
        # Tiles are whole here: not by the way that looks for padding, which takes zeros for it.
        tower = model.model.vision_model
        seen = tower(pixels.to(tower.dtype), return_dict=True).last_hidden_state
        tiles = torch.split(model.model.connector(seen), (grids.prod(-1) + 1).tolist())
        return [image.flatten(0, 1)[None] for image in tiles]
