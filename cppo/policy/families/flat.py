"""What families whose positions simply count share: all but how a picture becomes tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class Flat:
    """A vision tower and a projector beside a language model with one axis of positions."""

    vision: ClassVar[tuple[str, ...]] = ("vision_tower", "multi_modal_projector")
    causal: ClassVar[bool] = True

    @staticmethod
    def language_model(model: Any) -> Any:
        return model.model.language_model

    @staticmethod
    def prepare(model: Any) -> None:
        pass

    def positions(self, model: Any, ids: Tensor, grids: Tensor) -> tuple[Tensor, int]:
        return torch.arange(len(ids))[None], len(ids)

    def hidden_states(
        self,
        model: Any,
        ids: Tensor,
        positions: Tensor,
        image_mask: Tensor | None,
        features: Tensor | None,
        **options: Any,
    ) -> Any:
        if image_mask is None or features is None:
            embeddings = model.get_input_embeddings()(ids)
        else:
            # The id of an image token may lie outside of the vocabulary.
            embeddings = model.get_input_embeddings()(ids.masked_fill(image_mask, 0))
            seen = features[0].to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(image_mask[..., None], seen)
        return model.model(inputs_embeds=embeddings, position_ids=positions[0], **options)


def without_limits(limits: Mapping[str, int], kind: str, *, known: str = "") -> None:
    """ValueError for limits on an image's pixels other than the `known` one, which is kept to."""
    for name in limits:
        if name != known:
            raise ValueError(
                f"policy.{name} has no meaning for models of type {kind}, whose image processor "
                "decides on the size of images: leave it null"
            )
