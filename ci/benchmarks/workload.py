"""What every subject is given: a model, and a mini-batch of one group or several.

The model has Qwen2.5-VL's architecture and, but for its size, the 3B model's proportions: a head
about a tenth of the layers, a vision tower 0.6 times as wide as the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from cppo.builtin.policy import SPECIAL, build_tokenizer
from cppo.data import Item
from cppo.device import Backend, resolve_attention
from cppo.methods import GRPO, build
from cppo.policy import Policy, Prompt, encode_item, encode_view
from cppo.policy.families.qwen_vl import QwenVL
from cppo.policy.loading import place
from cppo.samples import Sample

WORDS_PER_PROMPT = 33  # tokens that are not the image's


@dataclass(frozen=True, kw_only=True)
class Size:
    """A language model's, and what follows from it for the vision tower."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_whole: tuple[int, ...]  # layers whose attention is not in windows


SMALL = Size(
    layers=4,
    hidden=256,
    intermediate=1376,
    heads=4,
    key_heads=2,
    vocabulary=2048,
    vision_layers=4,
    vision_hidden=160,
    vision_intermediate=427,
    vision_whole=(3,),
)
# Qwen2.5-VL-3B's own numbers.
THREE_BILLION = Size(
    layers=36,
    hidden=2048,
    intermediate=11008,
    heads=16,
    key_heads=2,
    vocabulary=151_936,
    vision_layers=32,
    vision_hidden=1280,
    vision_intermediate=3420,
    vision_whole=(7, 15, 23, 31),
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Groups of responses; `views` holds each sample's prompt on each view, needed or not."""

    policy: Policy
    samples: list[Sample]
    views: dict[str, list[Prompt]]
    method: GRPO

    @property
    def tokens(self) -> int:
        return sum(len(sample.ids) for sample in self.samples)


def make_model(size: Size, tokenizer: Any, dtype: torch.dtype, attention: str) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    head_size = size.hidden // size.heads
    sections = [head_size // 8, 3 * head_size // 16, 3 * head_size // 16]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": sections,
            },
            "bos_token_id": None,
            "eos_token_id": ids["end"],
            "pad_token_id": ids["pad"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": max(1, size.vision_hidden // 80),
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": list(size.vision_whole),
        },
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        config, attn_implementation=attention, dtype=dtype
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    QwenVL.prepare(model)  # the peers too get the fast patch embedding
    return model


def make_workload(
    backend: Backend,
    *,
    size: Size,
    image_tokens: Sequence[int],
    response_tokens: Sequence[int],
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> Workload:
    """For each number of image tokens a prompt with one image, and for each prompt responses of
    these lengths: every other one is better."""
    from transformers import Qwen2VLImageProcessorPil

    tokenizer = build_tokenizer()
    attention = resolve_attention(backend, "auto", precision=dtype)
    model = make_model(size, tokenizer, dtype, attention)
    place(model, backend.device)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=4000 * 4000)
    policy = Policy(
        model=model.train(),
        family=QwenVL(model.config, tokenizer, processor),
        tokenizer=tokenizer,
        image_processor=processor,
        eos=(tokenizer.eos_token_id,),
        precision=dtype,
        attention=attention,
        source="random weights",
    )
    method = build("cppo", {})
    generator = torch.Generator().manual_seed(1)
    samples: list[Sample] = []
    shown: dict[str, list[Prompt]] = {view.name: [] for view in method.views}
    for number, tokens in enumerate(image_tokens):
        side = 28 * round(tokens**0.5)
        pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
        prompt = _prompt(policy, Image.fromarray(pixels))
        views = {v.name: encode_view(policy, prompt, v, seed=0, step=0) for v in method.views}
        for order, length in enumerate(response_tokens):
            better = order % 2 == 0
            samples.append(
                Sample(
                    prompt=prompt,
                    ids=torch.randint(len(SPECIAL), len(tokenizer), (length,), generator=generator),
                    advantage=1.0 if better else -1.0,
                    views=views if better else {},
                )
            )
        for name, view in views.items():
            shown[name] += [view] * len(response_tokens)
    return Workload(policy=policy, samples=samples, views=shown, method=method)


def _prompt(policy: Policy, image: Image.Image) -> Prompt:
    """Words until the prompt has as many as it should."""
    question = "<image>"
    while True:
        item = Item(row="0", images=(image,), question=question, answer="1")
        prompt = encode_item(policy, item, instruction="", max_tokens=100_000)
        if int((~prompt.image_mask).sum()) >= WORDS_PER_PROMPT:
            return prompt
        question += " is"
