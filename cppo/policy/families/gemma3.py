"""Gemma 3: a picture is always as many tokens, and they attend to each other both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from cppo.policy.families.family import Features
from cppo.policy.families.flat import Flat, without_limits


class Gemma3(Flat):
    causal: ClassVar[bool] = False

    def __init__(self, config: Any, tokenizer: Any, image_processor: Any) -> None:
        self.image_token = int(config.image_token_id)
        self.placeholder = tokenizer.boi_token
        self._tokens = int(config.mm_tokens_per_image)
        image = tokenizer.convert_ids_to_tokens(self.image_token) * self._tokens
        self._text = f"\n\n{tokenizer.boi_token}{image}{tokenizer.eoi_token}\n\n"
        marks = (self.image_token, int(config.boi_token_id), int(config.eoi_token_id))
        self.forbidden = tuple(mark for mark in marks if mark < config.text_config.vocab_size)
        self._image_processor = image_processor

    @staticmethod
    def load_image_processor(folder: str | Path, limits: Mapping[str, int]) -> Any:
        from transformers import Gemma3ImageProcessorPil

        without_limits(limits, "gemma3")
        return Gemma3ImageProcessorPil.from_pretrained(folder)

    def processor_settings(self) -> Mapping[str, Any]:
        return {"processor_class": "Gemma3Processor", "image_seq_length": self._tokens}

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        # Transformers' processor takes no crops, whatever the image processor was saved with.
        made = self._image_processor(
            list(images), do_convert_rgb=True, do_pan_and_scan=False, return_tensors="pt"
        )
        return made["pixel_values"], made["num_crops"][:, None]

    def image_texts(self, grids: Tensor) -> list[str]:
        return [self._text] * len(grids)

    def encode(self, model: Any, pixels: Tensor, grids: Tensor) -> Features:
        features = model.model.get_image_features(pixels, return_dict=True).pooler_output
        return [image[None] for image in features]

    def hidden_states(
        self,
        model: Any,
        ids: Tensor,
        positions: Tensor,
        image_mask: Tensor | None,
        features: Tensor | None,
        **options: Any,
    ) -> Any:
        if image_mask is not None:  # left out, image tokens would silently attend one way
            options["token_type_ids"] = image_mask.long()
        return super().hidden_states(model, ids, positions, image_mask, features, **options)
