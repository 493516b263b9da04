"""Small random models of every supported family, saved as the folders `cppo.policy.load` reads.

Weights are drawn large enough for every part to matter: with transformers' own initialisation a
picture moves a log-probability by less than the tolerances the tests use.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cppo.builtin.policy import SPECIAL
from cppo.data import Item
from cppo.policy import Policy, Prompt, encode_item

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = (*QWEN, "internvl", "llava_onevision", "idefics3", "gemma3")
PACKED = tuple(name for name in FAMILIES if name != "gemma3")
PATCH_SIZES = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}
LIMITS = {"min_pixels": 32 * 32, "max_pixels": 192 * 192}
# What a chat template writes for an image, and the further special tokens, by their names.
PLACEHOLDERS = {
    "internvl": "<IMG_CONTEXT>\n",
    "llava_onevision": "<image>\n",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "gemma3": "<start_of_image>",
}
TILES = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
} | {f"tile_{r}_{c}": f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)}
MARKS = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "idefics3": TILES,
    "smolvlm": TILES,
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
}
PINPOINTS = [[32 * rows, 32 * columns] for rows in (1, 2) for columns in (1, 2, 3)]
# What transformers' processor is saved with, besides its parts.
PROCESSORS: dict[str, dict[str, Any]] = {
    "internvl": {"image_seq_length": 4},
    "llava_onevision": {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4",
    },
    "idefics3": {"image_seq_len": 4},
    "smolvlm": {"image_seq_len": 4},
    "gemma3": {"image_seq_length": 4},
}


def save_family(name: str, folder: Path, tokenizer: Any) -> Path:
    """Writes model, tokenizer and image processor of the family `name` in Hugging Face format."""
    tokenizer = adapt_tokenizer(name, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = _build(name, tokenizer)
        randomise(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for part in (model, tokenizer, _image_processor(name)):
        part.save_pretrained(folder)
    if name in PROCESSORS:
        (folder / "processor_config.json").write_text(json.dumps(PROCESSORS[name]))
    return folder


def adapt_tokenizer(name: str, tokenizer: Any) -> Any:
    """The built-in policy's tokenizer with the special tokens and the template of a family."""
    if name in QWEN:
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert image in tokenizer.chat_template
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # Runs of newlines are one token, so that those around an image merge with a question's own.
    backend.add_tokens(["\n\n\n", "\n\n"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template.replace(image, PLACEHOLDERS[name]),
        extra_special_tokens=MARKS[name],
    )


def _image_processor(name: str) -> Any:
    import transformers

    if name in QWEN:
        return transformers.Qwen2VLImageProcessorPil(patch_size=PATCH_SIZES[name], **LIMITS)
    if name == "llava_onevision":
        return transformers.LlavaOnevisionImageProcessorPil(
            size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
        )
    if name in ("idefics3", "smolvlm"):
        from transformers.models.idefics3.image_processing_pil_idefics3 import (
            Idefics3ImageProcessorPil,
        )
        from transformers.models.smolvlm.image_processing_pil_smolvlm import (
            SmolVLMImageProcessorPil,
        )

        made = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}[name]
        return made(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    if name == "gemma3":
        return transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    # As saved with real models, tiles are off: the processor turns them on.
    return transformers.GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, max_patches=4, crop_to_patches=False
    )


def _build(name: str, tokenizer: Any) -> Any:
    if name in QWEN:
        return _build_qwen(name, tokenizer)
    import transformers

    if name == "llava_onevision":
        # Tokens of more than four tiles are shrunk: one picture of the tests has so many.
        return transformers.LlavaOnevisionForConditionalGeneration(
            transformers.LlavaOnevisionConfig(
                text_config={"model_type": "qwen2", **_text(tokenizer)},
                vision_config=_siglip(image_size=32, patch_size=8),
                image_token_index=tokenizer.image_token_id,
                video_token_index=tokenizer.video_token_id,
                image_grid_pinpoints=PINPOINTS,
                vision_aspect_ratio="anyres_max_4",
            )
        )
    if name in ("idefics3", "smolvlm"):
        config_class, model_class = {
            "idefics3": (
                transformers.Idefics3Config,
                transformers.Idefics3ForConditionalGeneration,
            ),
            "smolvlm": (transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration),
        }[name]
        vision = _siglip(image_size=32, patch_size=8)
        del vision["model_type"], vision["vision_use_head"]
        return model_class(
            config_class(
                text_config={"model_type": "llama", **_text(tokenizer)},
                vision_config=vision,
                image_token_id=tokenizer.image_token_id,
                scale_factor=2,
            )
        )
    if name == "gemma3":
        return transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(
                text_config=_text(tokenizer)
                | {
                    "head_dim": 16,
                    "query_pre_attn_scalar": 16,
                    "sliding_window": 8,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                },
                vision_config=_siglip(image_size=32, patch_size=8),
                mm_tokens_per_image=4,
                boi_token_index=tokenizer.boi_token_id,
                eoi_token_index=tokenizer.eoi_token_id,
                image_token_index=tokenizer.image_token_id,
            )
        )
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            text_config={"model_type": "qwen3", "head_dim": 16, **_text(tokenizer)},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [32, 32],
                "patch_size": [8, 8],
            },
            image_token_id=tokenizer.context_image_token_id,
            tie_word_embeddings=False,
        )
    )


def _siglip(image_size: int, patch_size: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
        "vision_use_head": False,
    }


def _text(tokenizer: Any) -> dict[str, Any]:
    """A small language model of any kind."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _build_qwen(name: str, tokenizer: Any) -> Any:
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
    text = _text(tokenizer) | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [4, 2, 2] if name == "qwen3_vl" else [2, 3, 3],
        },
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
    return model_class(config)


@torch.no_grad()
def randomise(model: Any) -> None:
    """Draws all parameters anew: outputs of matrices keep their inputs' size, norms and biases
    are not the ones and zeros that would hide a mistake."""
    kinds = {f"{name}.weight": type(module).__name__ for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        if kinds.get(name) == "Gemma3RMSNorm":  # which adds one to its weight
            parameter.normal_(std=0.2)
        elif "embed_tokens" in name or "lm_head" in name:
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
    return torch.randint(len(SPECIAL), 400, (length,), generator=generator)


# --- the truth: transformers' own processor -----------------------------------------------------


def true_inputs(folder: Path, item: Item) -> dict[str, Tensor]:
    """A prompt as transformers' own processor makes it of a chat."""
    name = json.loads((folder / "config.json").read_text())["model_type"]
    processor = true_processor(name, folder)
    content: list[dict[str, Any]] = []
    for number, text in enumerate((item.question + " Think first.").split("<image>")):
        content += [{"type": "image"}] * bool(number) + [{"type": "text", "text": text}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    images = [list(item.images)] if item.images else None
    made = processor(images=images, text=[text], return_tensors="pt")
    kinds = made.pop("mm_token_type_ids", None)
    return dict(made) | ({"mm_token_type_ids": kinds} if name in QWEN else {})


def continued(inputs: Mapping[str, Tensor], response: Tensor) -> dict[str, Tensor]:
    """A prompt's inputs with a response after it."""
    text = torch.zeros_like(response)
    later = {
        "input_ids": response,
        "attention_mask": text + 1,
        "mm_token_type_ids": text,
        "token_type_ids": text,
    }
    return dict(inputs) | {
        name: torch.cat([inputs[name], later[name][None]], dim=1)
        for name in later.keys() & inputs.keys()
    }


@contextmanager
def as_loaded(policy: Policy) -> Iterator[None]:
    """Under `with`: the model's own attention, over rows."""
    config = policy.language.config
    before, config._attn_implementation = config._attn_implementation, policy.attention
    try:
        yield
    finally:
        config._attn_implementation = before


def vision_tower(policy: Policy) -> nn.Module:
    tower: nn.Module = getattr(policy.base.model, policy.family.vision[0])
    return tower


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """The length of what each call of a module is given first, under `with`."""
    lengths: list[int] = []

    def note(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        lengths.append(len(given[0] if given else named["pixel_values"]))

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lengths
    finally:
        hook.remove()


def true_processor(name: str, folder: Path) -> Any:
    """Of the parts that lie in `folder`, without a video processor, which needs torchvision."""
    import transformers
    from transformers.models.smolvlm import processing_smolvlm as smolvlm

    made = {
        "qwen2_vl": transformers.Qwen2VLProcessor,
        "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
        "qwen3_vl": transformers.Qwen3VLProcessor,
        "internvl": transformers.InternVLProcessor,
        "llava_onevision": transformers.LlavaOnevisionProcessor,
        "idefics3": transformers.Idefics3Processor,
        "smolvlm": transformers.SmolVLMProcessor,
        "gemma3": transformers.Gemma3Processor,
    }[name]

    if name == "smolvlm" and smolvlm.num2words is None:
        smolvlm.num2words = str  # which a video's frames are counted with

    class ImagesOnly(made):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> type:
            return type(argument)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings, file = {}, folder / "processor_config.json"
    if file.exists():
        settings = json.loads(file.read_text())
        settings.pop("processor_class", None)
    if "video_processor" in inspect.signature(made).parameters:
        settings["video_processor"] = None
    return ImagesOnly(
        image_processor=type(_image_processor(name)).from_pretrained(folder),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        **settings,
    )
