"""What is measured: one small model and batch, given to `cppo`, to TRL, and to a plain update.

The model has Qwen2.5-VL's architecture and, but for its size, the 3B model's proportions: a head
about a tenth of the layers, a vision tower 0.6 times as wide as the language model.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cppo.builtin.policy import SPECIAL, build_tokenizer
from cppo.data import Item
from cppo.device import Backend, resolve_attention
from cppo.methods import GRPO, Scores, build
from cppo.objective import aggregate, clipped_surrogate, contrastive_perception_loss
from cppo.policy import Policy, Prompt, Scorer, encode_item, encode_view
from cppo.policy.families.qwen_vl import QwenVL
from cppo.policy.loading import place
from cppo.processes import Processes
from cppo.update import Sample, Updater

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


SMALL = Size(
    layers=4,
    hidden=256,
    intermediate=1376,
    heads=4,
    key_heads=2,
    vocabulary=2048,
    vision_layers=4,
    vision_hidden=160,
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
)


@dataclass(frozen=True, kw_only=True)
class Batch:
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
            "intermediate_size": int(size.vision_hidden * 2.67),
            "num_heads": max(1, size.vision_hidden // 80),
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": [size.vision_layers - 1],
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


def make_batch(
    backend: Backend,
    *,
    size: Size,
    image_tokens: Sequence[int],
    response_tokens: Sequence[int],
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> Batch:
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
    return Batch(policy=policy, samples=samples, views=shown, method=method)


def _prompt(policy: Policy, image: Image.Image) -> Prompt:
    """Words until the prompt has as many as it should."""
    question = "<image>"
    while True:
        item = Item(row="0", images=(image,), question=question, answer="1")
        prompt = encode_item(policy, item, instruction="", max_tokens=100_000)
        if int((~prompt.image_mask).sum()) >= WORDS_PER_PROMPT:
            return prompt
        question += " is"


# --- ours ----------------------------------------------------------------------------------------


class Ours:
    """`cppo`'s own update, gradient clipping included, the optimizer's step at rate zero."""

    def __init__(self, batch: Batch, backend: Backend, *, views: bool = True) -> None:
        scorer = Scorer(batch.policy, backend, temperature=1.0)
        self._updater = Updater(
            scorer=scorer,
            optimizer=torch.optim.SGD(scorer.parameters(), lr=0.0),
            method=batch.method if views else build("grpo", {}),
            processes=Processes(backend, batch.policy.precision),
            tokens_per_micro_batch=1_000_000,
            max_grad_norm=1.0,
            max_new_tokens=max(len(sample.ids) for sample in batch.samples),
        )
        bare = [Sample(prompt=s.prompt, ids=s.ids, advantage=s.advantage) for s in batch.samples]
        self._samples = batch.samples if views else bare
        self.dtype = batch.policy.precision

    def update(self) -> dict[str, float]:
        return self._updater.step(self._samples)


# --- rows, as others have them --------------------------------------------------------------------


def padded(samples: Sequence[Sample], prompts: Sequence[Prompt], device: Any) -> dict[str, Tensor]:
    """Each response with its prompt: prompts padded on the left, responses on the right."""

    def left(tensors: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(tensors), batch_first=True, padding_side="left").to(device)

    ids = pad_sequence([sample.ids for sample in samples], batch_first=True)
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    return {
        "prompt_ids": left([prompt.ids for prompt in prompts]),
        "prompt_mask": left([torch.ones_like(prompt.ids) for prompt in prompts]),
        "completion_ids": ids.to(device),
        "completion_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device),
        "pixel_values": torch.cat([prompt.pixels for prompt in prompts]).to(device),
        "image_grid_thw": torch.cat([prompt.grids for prompt in prompts]).to(device),
        "mm_token_type_ids": torch.cat(
            [
                left([prompt.image_mask.int() for prompt in prompts]),
                torch.zeros_like(ids, dtype=torch.int).to(device),
            ],
            dim=1,
        ),
        "advantages": torch.tensor([sample.advantage for sample in samples], device=device),
    }


# --- TRL's ---------------------------------------------------------------------------------------


class Trl:
    """TRL's GRPOTrainer: its loss, forward and backward, with one view of the image.

    At its best: SDPA, no reference model, no gradient checkpointing unless ours has it, no padding
    where responses are of one length, the fused head that TRL puts on by itself.
    """

    def __init__(self, batch: Batch, *, checkpointing: bool = False) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        policy, samples = batch.policy, batch.samples
        count = len(samples)
        model = copy.deepcopy(policy.model)
        model.set_attn_implementation(policy.attention)
        self._folder = tempfile.TemporaryDirectory()
        config = GRPOConfig(
            output_dir=self._folder.name,
            per_device_train_batch_size=count,
            num_generations=count,
            max_completion_length=max(len(sample.ids) for sample in samples),
            beta=0.0,
            bf16=policy.precision is torch.bfloat16,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            report_to=[],
            use_cpu=policy.device.type == "cpu",
        )
        self._trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda prompts, **columns: [0.0] * len(prompts),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "unused"}] * count),
            processing_class=policy.tokenizer,
        )
        self.model = self._trainer.model
        rows = padded(samples, [sample.prompt for sample in samples], policy.device)
        self._inputs = rows | {
            "num_images": [1] * count,
            "num_items_in_batch": rows["completion_mask"].sum().float(),
        }
        self._trainer.current_gradient_accumulation_steps = 1

    def update(self) -> None:
        self.model.zero_grad()
        self._trainer.compute_loss(self.model, self._inputs).backward()


# --- a plain three-view update -------------------------------------------------------------------


class Naive:
    """CPPO as one would first write it: three padded forwards of everything, logits whole."""

    def __init__(self, batch: Batch) -> None:
        self._policy, self._method = batch.policy, batch.method
        self.model = copy.deepcopy(batch.policy.model)
        self.model.set_attn_implementation(batch.policy.attention)
        as_is = [sample.prompt for sample in batch.samples]
        device = batch.policy.device
        self._views = [
            padded(batch.samples, prompts, device) for prompts in (as_is, *batch.views.values())
        ]
        self._mask = self._views[0]["completion_mask"].bool()
        self._advantages = self._views[0]["advantages"]

    def _forward(self, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        targets = rows["completion_ids"]
        with self._policy.autocast():
            output = self.model(
                input_ids=torch.cat([rows["prompt_ids"], targets], dim=1),
                attention_mask=torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1),
                logits_to_keep=targets.shape[1] + 1,
                **{
                    name: rows[name]
                    for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")
                },
            )
        logprobs = output.logits[:, :-1].float().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[..., None])[..., 0], entropy

    def update(self) -> None:
        self.model.zero_grad()
        (seen, entropy), (preserved, _), (removed, removed_entropy) = map(
            self._forward, self._views
        )
        better = self._mask & (self._advantages > 0)[:, None]
        tokens = self._method.detect(
            Scores(logprobs=seen, entropy=entropy),
            [Scores(logprobs=removed, entropy=removed_entropy)],
            better,
        )
        policy = clipped_surrogate(seen, seen.detach(), self._advantages)
        contrast = contrastive_perception_loss(
            seen, preserved, removed, tokens, temperature=self._method.contrast_temperature
        )
        loss = aggregate(policy, self._mask, "token-mean")
        loss = loss + self._method.weight * aggregate(contrast, tokens, "token-mean")
        loss.backward()
