"""A whole step, rollout included, of `cppo train` and TRL's trainer: time, and what passes through.

Both sample with transformers in the same process, from the same weights, on the same pictures, in
float32 with SDPA; a step of theirs, a step of ours, one of ours that samples with compiled code,
and so on. The peer's sampling is never compiled: its trainer has transformers leave that.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Row, now
from PIL import Image
from workload import SMALL, make_model

from cppo.builtin.policy import build_tokenizer
from cppo.config import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    TrainConfig,
)
from cppo.device import Backend
from cppo.rollout.decoding import _compiled
from cppo.trainer import Trainer

RESPONSES = 8
# Side of the image in tokens, response tokens, prompts a step.
SHAPES = ((24, 128, 1), (16, 128, 1), (16, 256, 1), (16, 128, 4))
IMAGES, TOKENS = (
    "images through the vision tower",
    "tokens through the language model, decoding aside",
)
OURS, PEER = "cppo, three views", "TRL's GRPO, one view"
COMPILED = f"{OURS}, sampling compiled"


asked = itertools.count()


def every_other(response: str, answer: str, question: str) -> float:
    """Half of each group is better than it, as in the update's measurements."""
    return float(next(asked) % 2)


def measure(backend: Backend, name: str, repeats: int) -> list[Row]:
    return [row for shape in SHAPES for row in _one(backend, name, repeats, *shape)]


def _one(
    backend: Backend, name: str, repeats: int, side: int, response: int, prompts: int
) -> list[Row]:
    """Prompts and their groups, all in one batch on both sides."""
    what = f"whole step, {prompts} x {side**2} image tokens, {RESPONSES} x up to {response} each"
    print(f"  {what}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer, images = _prepare(folder, repeats, side, prompts)
        ours = {
            subject: _ours(name, folder, repeats, response, prompts, compile=compile)
            for subject, compile in ((OURS, False), (COMPILED, True))
        }
        seconds: dict[str, list[float]] = {subject: [] for subject in ours}

        def steps_of_ours() -> None:
            for subject, trainer in ours.items():
                started = now()
                trainer._train_step(len(seconds[subject]) + 1)
                seconds[subject].append(now() - started)

        with contextlib.ExitStack() as closing:
            for trainer in ours.values():
                closing.callback(trainer.close)
            with _counting(ours[OURS].policy.model) as mine:
                theirs, other = _trls(
                    backend, folder, tokenizer, images, repeats, response, prompts, steps_of_ours
                )
    failed = {COMPILED: "compiling failed: see the log"} if _compiled().failed else {}
    rows = [
        Row(
            what=what,
            subject=subject,
            peer=PEER,
            subject_values=values[1:],  # the first warms up
            peer_values=theirs[1:],
            unit="s",
            target=0.6,
            not_run=failed.get(subject, ""),
        )
        for subject, values in seconds.items()
    ]
    return rows + [
        Row(
            what=f"{what}: {key}",
            subject=OURS,
            peer=PEER,
            subject_values=[mine[key] / (repeats + 1)],
            peer_values=[other[key] / (repeats + 1)],
            unit="",
        )
        for key in (IMAGES, TOKENS)
    ]


@contextlib.contextmanager
def _counting(model: Any) -> Iterator[Counter[str]]:
    """What passes through: hooks on the vision tower and on the first layer."""
    counts: Counter[str] = Counter()

    def tower(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        counts[IMAGES] += len(named["grid_thw"])

    def layer(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = given[0] if given else named["hidden_states"]
        if hidden.shape[1] > 1:  # a sampled token comes by itself
            counts[TOKENS] += hidden.shape[0] * hidden.shape[1]

    base = model.model
    hooks = [
        base.visual.register_forward_pre_hook(tower, with_kwargs=True),
        base.language_model.layers[0].register_forward_pre_hook(layer, with_kwargs=True),
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _prepare(folder: Path, repeats: int, side: int, prompts: int) -> tuple[Any, list[Image.Image]]:
    """Writes the model and the data; the first step warms up."""
    from transformers import Qwen2VLImageProcessorPil

    tokenizer = build_tokenizer()
    model = make_model(SMALL, tokenizer, torch.float32, "sdpa")
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=4000 * 4000)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 255, (28 * side, 28 * side, 3), dtype=np.uint8))
        for _ in range(prompts * (repeats + 4))
    ]
    (folder / "data").mkdir()
    with (folder / "data" / "train.jsonl").open("w") as rows:
        for number, image in enumerate(images):
            image.save(folder / "data" / f"{number}.png")
            row = {"images": [f"{number}.png"], "problem": "<image>What is this?", "answer": "1"}
            rows.write(json.dumps(row) + "\n")
    return tokenizer, images


def _ours(
    backend: str, folder: Path, repeats: int, response: int, prompts: int, *, compile: bool
) -> Trainer:
    config = TrainConfig(
        method="cppo",
        model=str(folder / "model"),
        data=str(folder / "data"),
        reward=f"{__name__}:every_other",
        steps=repeats + 1,
        backend=backend,
        precision="float32",
        attention="sdpa",
        checkpoint_every=0,
        samples_every=0,
        policy=PolicyConfig(max_prompt_tokens=4096),
        dataset=DataConfig(instruction=""),  # the peer appends none
        optimizer=OptimizerConfig(tokens_per_micro_batch=1_000_000),
        rollout=RolloutConfig(
            prompts=prompts, responses=RESPONSES, max_new_tokens=response, compile=compile
        ),
        evaluation=EvaluationConfig(items=1, k=1, every=0, items_during=1),
    )
    return Trainer(config, folder / f"run-{'compiled' if compile else 'plain'}")


def _trls(
    backend: Backend,
    folder: Path,
    tokenizer: Any,
    images: Sequence[Image.Image],
    repeats: int,
    response: int,
    prompts: int,
    between: Callable[[], None],
) -> tuple[list[float], Counter[str]]:
    """Seconds of its steps; `between` is called after each."""
    from datasets import Dataset
    from transformers import (
        AutoModelForImageTextToText,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessorPil,
        TrainerCallback,
    )
    from trl import GRPOConfig, GRPOTrainer

    from cppo.policy.families.qwen_vl import QwenVL

    class ImagesOnly(Qwen2_5_VLProcessor):  # type: ignore[misc]
        """Without a video processor, which needs torchvision."""

        def check_argument_for_proper_class(self, name: str, argument: Any) -> type:
            return type(argument)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.started, self.seconds = 0.0, []

        def on_step_begin(self, *given: Any, **named: Any) -> None:
            self.started = now()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            self.seconds.append(now() - self.started)
            between()

    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    QwenVL.prepare(model)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "model")
    clock = Clock()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [
            every_other(completion[0]["content"], "", "") for completion in completions
        ],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=prompts * RESPONSES,
            num_generations=RESPONSES,
            max_completion_length=response,
            max_steps=repeats + 1,
            beta=0.0,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            use_cpu=backend.device == "cpu",
        ),
        train_dataset=Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": "What is this?"}], "image": image}
                for image in images
            ]
        ),
        processing_class=ImagesOnly(
            image_processor=image_processor,
            tokenizer=tokenizer,
            video_processor=None,
            chat_template=tokenizer.chat_template,
        ),
        callbacks=[clock],
    )
    with _counting(model) as counts:
        trainer.train()
    return clock.seconds, counts
