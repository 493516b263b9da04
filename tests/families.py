"""Small random models of every supported family, saved as the folders `cppo.policy.load` reads.

Weights are drawn large enough for every part to matter: with transformers' own initialisation a
picture moves a log-probability by less than the tolerances the tests use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cppo.builtin.policy import SPECIAL
from cppo.data import Item
from cppo.policy import Policy, Prompt, encode_item

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PATCH_SIZES = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}
LIMITS = {"min_pixels": 32 * 32, "max_pixels": 192 * 192}


def save_family(name: str, folder: Path, tokenizer: Any) -> Path:
    """Writes model, tokenizer and image processor of the family `name` in Hugging Face format."""
    from transformers import Qwen2VLImageProcessorPil

    model = _build(name, tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    image_processor = Qwen2VLImageProcessorPil(patch_size=PATCH_SIZES[name], **LIMITS)
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)
    return folder


def _build(name: str, tokenizer: Any) -> Any:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    config_class, model_class = {
        "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
        "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    }[name]
    vision = {
        "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        # One block with windows of 2x2 merged patches, one that sees the whole picture.
        "qwen2_5_vl": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        "qwen3_vl": {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    }[name]
    ids = {part: tokenizer.convert_tokens_to_ids(token) for part, token in SPECIAL.items()}
    tied = name != "qwen2_vl"  # real models do both
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [4, 2, 2] if name == "qwen3_vl" else [2, 3, 3],
        },
        "bos_token_id": None,
        "eos_token_id": ids["end"],
        "pad_token_id": ids["pad"],
        "tie_word_embeddings": tied,
    }
    if name == "qwen3_vl":
        text |= {"head_dim": 16}
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = model_class(config)
        randomise(model)
    return model


@torch.no_grad()
def randomise(model: Any) -> None:
    """Draws all parameters anew: outputs of matrices keep their inputs' size, norms and biases
    are not the ones and zeros that would hide a mistake."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            parameter.normal_(std=0.1)
        elif parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("weight"):
            parameter.normal_(mean=1.0, std=0.2)
        else:
            parameter.normal_(std=0.2)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Noise of large squares, so that perturbations and resizing leave something of it."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def make_item(seed: int, sizes: Sequence[tuple[int, int]], words: str = "What is this") -> Item:
    """An item with one picture for each (width, height), text before, between and after them."""
    images = tuple(picture(1000 * seed + n, *size) for n, size in enumerate(sizes))
    question = " ".join(f"see {n}: <image>" for n in range(len(sizes)))
    return Item(row=f"made:{seed}", images=images, question=f"{question} {words}?", answer="1")


ITEMS = (
    make_item(1, [(140, 90)]),
    make_item(2, [(60, 120), (100, 100), (170, 64)], words="How many of them are red, in all"),
    make_item(3, [(64, 64)], words="Why"),
)


def make_prompt(policy: Policy, item: Item, max_tokens: int = 400) -> Prompt:
    return encode_item(policy, item, instruction=" Think first.", max_tokens=max_tokens)


def random_response(policy: Policy, length: int, seed: int) -> Tensor:
    """Ordinary tokens: none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), len(policy.tokenizer), (length,), generator=generator)
