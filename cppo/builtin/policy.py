"""The built-in policy: a real, small Qwen2.5-VL, warm-started so that it reads, but not well.

Supervised training in three phases: the language model learns form and reasoning from text alone;
all of it learns to read; and it imitates a careless reader, who misreads words now and then and
reasons on from there. A policy that imitates samples as carelessly, though it could read better:
what pretrained models are like too, and what reinforcement learning mends. Half of the pictures it
reads are altered as preserving views are, since those are to preserve what it reads, as they do for
pretrained models. The result is cached in Hugging Face format.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from cppo.builtin.task import Puzzle, ShapesTask
from cppo.data import PLACEHOLDER
from cppo.perturb import perturb
from cppo.policy.families.qwen_vl import QwenVL

SPECIAL = {
    "pad": "<|endoftext|>",
    "start": "<|im_start|>",
    "end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE_PIXELS = {"min_pixels": 56 * 56, "max_pixels": 224 * 224}
ALTERATIONS = ("colour_jitter", "perspective", "rotation")  # what CPPO takes as preserving
WARM_SEED = 20_260_101  # of the warm start's own puzzles and weights; no run uses it


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """The warm start's settings; changing one makes a new cache entry."""

    text_steps: int = 90
    text_batch: int = 96
    read_steps: int = 130
    read_batch: int = 48
    altered_share: float = 0.5  # of the pictures
    careless_steps: int = 25  # the last reading steps, on solutions of a careless reader
    careless_share: float = 0.1  # of the words it reads that are wrong
    puzzles: int = 3072
    matrix_rate: float = 0.012  # Muon's, for weight matrices
    other_rate: float = 6e-3  # AdamW's, for everything else
    seed: int = WARM_SEED

    @classmethod
    def of(cls, difficulty: int) -> WarmStart:
        """The settings for a difficulty: more cells take longer to learn to read."""
        return cls() if difficulty == 1 else cls(read_steps=200)

    @property
    def steps(self) -> int:
        return self.text_steps + self.read_steps


def entry(difficulty: int = 1, settings: WarmStart | None = None) -> Path:
    """The folder in `cache_folder()` where the policy lies, once it has been trained.

    Its name changes with the task, the settings and this code.
    """
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), here.parent / "perturb.py"]
    code = b"".join(path.read_bytes() for path in files)
    settings = settings or WarmStart.of(difficulty)
    key = hashlib.blake2b(code + repr((difficulty, settings)).encode(), digest_size=6).hexdigest()
    return cache_folder() / f"builtin-{difficulty}-{key}"


def ensure(
    difficulty: int = 1,
    *,
    settings: WarmStart | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """The folder of the warm-started policy; trains it on first use.

    `progress` is told the steps done, of `WarmStart.steps`. Without `settings`, those of
    `WarmStart.of`.
    """
    settings = settings or WarmStart.of(difficulty)
    folder = entry(difficulty, settings)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / folder.name
            _train(made, difficulty, settings, progress)
            if not folder.exists():  # another process may have been, or be, faster
                with contextlib.suppress(OSError):
                    made.rename(folder)
    return folder


def cache_folder() -> Path:
    """CPPO_CACHE where it is set, else the user's cache folder."""
    if "CPPO_CACHE" in os.environ:
        return Path(os.environ["CPPO_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cppo"


# --- building ----------------------------------------------------------------------------------


def build_tokenizer() -> Any:
    """Byte-level BPE trained on the task's own text: one token a word, any text encodable."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = []
    for difficulty in (1, 3):
        task = ShapesTask(split="train", size=400, difficulty=difficulty, seed=WARM_SEED)
        for puzzle in _written(task, range(len(task))):
            corpus += [puzzle.item.question, puzzle.response, "user\n", "assistant\n"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL["end"],
        pad_token=SPECIAL["pad"],
        chat_template=CHAT_TEMPLATE,
        instruction="",  # it knows one way to answer only
    )


def build_model(tokenizer: Any, *, seed: int) -> Any:
    """About a million random parameters in Qwen2.5-VL's architecture."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": None,
            "eos_token_id": ids["end"],
            "pad_token_id": ids["pad"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0, 1],
        },
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)


# --- warm start --------------------------------------------------------------------------------


def _train(
    folder: Path, difficulty: int, settings: WarmStart, progress: Callable[[int], None]
) -> None:
    from transformers import Qwen2VLImageProcessorPil

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=settings.seed).train()
    QwenVL.prepare(model)
    image_processor = Qwen2VLImageProcessorPil(**IMAGE_PIXELS)
    task = ShapesTask(split="train", size=10**6, difficulty=difficulty, seed=settings.seed)
    done = 0
    for losses in (
        _text_losses(model, tokenizer, task, settings),
        _reading_losses(model, tokenizer, image_processor, task, settings),
    ):
        optimizers = _optimizers(model, settings)
        for loss, rate in losses:
            for optimizer in optimizers:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["peak"]
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            done += 1
            progress(done)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)


def _text_losses(
    model: Any, tokenizer: Any, task: ShapesTask, settings: WarmStart
) -> Iterator[tuple[Tensor, float]]:
    """Puzzles without their pictures; what only the picture tells is not asked for."""
    size = settings.text_steps * settings.text_batch
    start = settings.puzzles  # these puzzles are not met again with their pictures
    puzzles = _written(task, range(start, start + size))
    examples = [_example(tokenizer, puzzle, image_tokens=0) for puzzle in puzzles]
    for step in range(settings.text_steps):
        batch = examples[step * settings.text_batch : (step + 1) * settings.text_batch]
        ids, targets, perception = _pad(batch)
        logits = model(input_ids=ids).logits
        yield _loss(logits, targets.masked_fill(perception, -100)), min(1.0, (step + 1) / 10)


def _reading_losses(
    model: Any, tokenizer: Any, image_processor: Any, task: ShapesTask, settings: WarmStart
) -> Iterator[tuple[Tensor, float]]:
    puzzles = [task.puzzle(index) for index in range(settings.puzzles)]
    careless = _written(task, range(settings.puzzles), misread=settings.careless_share)
    pictures = [_picture(puzzle, index, settings) for index, puzzle in enumerate(puzzles)]
    made = image_processor(pictures, return_tensors="pt")
    grids = made["image_grid_thw"]
    pixels = made["pixel_values"].view(len(puzzles), -1, made["pixel_values"].shape[-1])
    image_tokens = int(grids[0].prod()) // image_processor.merge_size**2
    examples = [
        [_example(tokenizer, puzzle, image_tokens=image_tokens) for puzzle in written]
        for written in (puzzles, careless)
    ]
    rng = np.random.default_rng(settings.seed)
    for step in range(settings.read_steps):
        batch = rng.choice(len(puzzles), size=settings.read_batch, replace=False)
        imitated = examples[step >= settings.read_steps - settings.careless_steps]
        ids, targets, _ = _pad([imitated[index] for index in batch])
        logits = model(
            input_ids=ids,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=pixels[batch].flatten(0, 1),
            image_grid_thw=grids[batch],
        ).logits
        progress = step / settings.read_steps
        rate = min(1.0, (step + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        yield _loss(logits, targets), rate


def _picture(puzzle: Puzzle, index: int, settings: WarmStart) -> Image:
    """The puzzle's picture: as it is, or altered in one of the ways that leave it readable."""
    rng = np.random.default_rng([settings.seed, index])
    [picture] = puzzle.item.images
    if rng.random() >= settings.altered_share:
        return picture
    return perturb(picture, str(rng.choice(ALTERATIONS)), index)


def _optimizers(model: Any, settings: WarmStart) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which learns in half of AdamW's steps; AdamW for the rest."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(
            [{"params": matrices, "peak": settings.matrix_rate}], weight_decay=0.01, ns_steps=3
        ),
        torch.optim.AdamW([{"params": others, "peak": settings.other_rate}], weight_decay=0.0),
    ]


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


Example = tuple[Tensor, Tensor, Tensor]  # ids, targets (-100 on the prompt), perception; all (L,)


def _example(tokenizer: Any, puzzle: Puzzle, *, image_tokens: int) -> Example:
    content: list[dict[str, str]] = [
        {"type": "text", "text": puzzle.item.question.replace(PLACEHOLDER, "")}
    ]
    if image_tokens:
        content.append({"type": "image"})
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    ).replace(SPECIAL["image"], SPECIAL["image"] * image_tokens)
    prompt_ids = tokenizer(prompt).input_ids
    response_ids, perception = label_tokens(tokenizer, puzzle)
    response_ids = [*response_ids, tokenizer.eos_token_id]
    return (
        torch.tensor(prompt_ids + response_ids),
        torch.tensor([-100] * len(prompt_ids) + response_ids),
        torch.tensor([False] * len(prompt_ids) + [*perception, False]),
    )


def label_tokens(tokenizer: Any, puzzle: Puzzle) -> tuple[list[int], list[bool]]:
    """The reference solution's token ids, and which of them are perception tokens."""
    coded = tokenizer(puzzle.response, return_offsets_mapping=True)
    perception = np.zeros(len(puzzle.response), dtype=bool)
    start = 0
    for span in puzzle.solution:
        perception[start : start + len(span.text)] = span.perception
        start += len(span.text)
    return coded.input_ids, [bool(perception[a:b].any()) for a, b in coded.offset_mapping]


def _written(task: ShapesTask, indices: Sequence[int], *, misread: float = 0.0) -> list[Puzzle]:
    return [task.puzzle(index, draw=False, misread=misread) for index in indices]


def _pad(examples: Sequence[Example]) -> Example:
    ids, targets, perception = zip(*examples, strict=True)
    return (
        pad_sequence(list(ids), batch_first=True),
        pad_sequence(list(targets), batch_first=True, padding_value=-100),
        pad_sequence(list(perception), batch_first=True),
    )
