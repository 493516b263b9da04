"""The interface of a model family.

Shapes: N images, R rows (sequences), L positions, F image tokens in all, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image
from torch import Tensor

Features = Sequence[Tensor]  # one (levels, tokens, D) tensor an image


class Family(Protocol):
    """How one architecture turns pictures into tokens and runs its language model on them."""

    vision: ClassVar[tuple[str, ...]]  # parts of `model.model` that turn pictures into features
    causal: ClassVar[bool]  # whether no token attends to a later one, image tokens included
    placeholder: str  # what a chat template writes for an image
    image_token: int  # id that stands for one token of an image
    forbidden: tuple[int, ...]  # ids that stand for visual input: never sampled, never an image

    def __init__(self, config: Any, tokenizer: Any, image_processor: Any) -> None: ...

    @staticmethod
    def load_image_processor(folder: str | Path, limits: Mapping[str, int]) -> Any:
        """The image processor saved at `folder`, without torchvision. `limits`: pixel counts;
        ValueError for one that it cannot keep to."""

    @staticmethod
    def language_model(model: Any) -> Any:
        """The part whose attention takes the group layout."""

    @staticmethod
    def prepare(model: Any) -> None:
        """Makes a freshly loaded model ready, without changing what it computes or saves."""

    def processor_settings(self) -> Mapping[str, Any]:
        """What transformers' processor must be told besides its tokenizer and image processor."""

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """What the vision tower sees of all images of a prompt, and a row of integers for each
        image (N, k), from which its number of tokens follows."""

    def image_texts(self, grids: Tensor) -> list[str]:
        """What takes the place of each image's placeholder, as transformers' processor has it."""

    def positions(self, model: Any, ids: Tensor, grids: Tensor) -> tuple[Tensor, int]:
        """Positions (axes, L) of a prompt's ids (L,), and the position after its last."""

    def encode(self, model: Any, pixels: Tensor, grids: Tensor) -> Features:
        """One pass of the vision tower over all the images of one or more prompts."""

    def hidden_states(
        self,
        model: Any,
        ids: Tensor,
        positions: Tensor,
        image_mask: Tensor | None,
        features: Tensor | None,
        **options: Any,
    ) -> Any:
        """The language model on ids (R, L) at positions (axes, R, L).

        `features` (levels, F, D) replace the embeddings where `image_mask` (R, L) is True, in
        order. `options` (attention mask, cache) go through. Returns transformers' model output.
        """
