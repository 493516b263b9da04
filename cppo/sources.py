"""What `model:` and `data:` name: the built-in ones, or files, folders and Hub ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from cppo import builtin
from cppo.config import DataConfig, PolicyConfig
from cppo.console import Console
from cppo.data import Columns, Source, load
from cppo.policy import Policy
from cppo.policy import load as load_policy

BUILTIN_TRAIN, BUILTIN_EVAL = 100_000, 10_000  # puzzles in each split
BUILTIN_SEED = 7  # the task is the same in every run; only the order of its items is not


def open_data(data: str, settings: DataConfig, split: Literal["train", "eval"]) -> Source:
    """The rows of `data` for training or for evaluation."""
    if data == "builtin":
        size = BUILTIN_TRAIN if split == "train" else BUILTIN_EVAL
        return builtin.ShapesTask(
            split=split, size=size, difficulty=settings.difficulty, seed=BUILTIN_SEED
        )
    columns = Columns(
        images=settings.images,
        question=settings.question,
        answer=settings.answer,
        kind=settings.kind,
    )
    return load(
        data,
        split=split,
        columns=columns,
        eval_share=settings.eval_share,
        max_pixels=settings.max_image_pixels,
    )


def open_policy(
    model: str,
    settings: PolicyConfig,
    *,
    difficulty: int,
    precision: torch.dtype,
    attention: str,
    device: str | torch.device,
    console: Console,
    training: bool,
) -> Policy:
    """Loads `model`; the built-in one is warm-started on first use.

    Weights that are trained are kept in float32 whatever the precision, since small updates are
    lost in 16 bits; all others, beneath LoRA adapters too, are kept in the precision itself.
    """
    if model == "builtin":
        model = str(warm_start(difficulty, console))
    limits = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    lora: dict[str, Any] | None = None
    if settings.lora_rank:
        lora = {
            "r": settings.lora_rank,
            "lora_alpha": settings.lora_alpha,
            "target_modules": settings.lora_targets,
        }
    return load_policy(
        model,
        dtype=torch.float32 if training and lora is None else precision,
        attention=attention,
        precision=precision,
        device=device,
        pixel_limits={name: pixels for name, pixels in limits.items() if pixels is not None},
        freeze_vision=settings.freeze_vision,
        gradient_checkpointing=settings.gradient_checkpointing,
        lora=lora,
    )


def warm_start(difficulty: int, console: Console) -> Path:
    """The folder of the built-in policy, which is trained on first use."""
    folder = builtin.entry(difficulty)
    if not folder.exists():
        with console.progress("warm start", builtin.WarmStart.of(difficulty).steps) as show:
            builtin.ensure(difficulty, progress=lambda done: show(done, ""))
    return folder
