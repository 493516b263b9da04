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
    """One group: a prompt, its responses, and their views."""

    policy: Policy
    prompt: Prompt
    samples: list[Sample]
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
    image_tokens: int,
    response_tokens: Sequence[int],
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> Batch:
    """A prompt with one image, and responses of these lengths: every other one is better."""
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
    side = 28 * round(image_tokens**0.5)
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    prompt = _prompt(policy, Image.fromarray(pixels))
    method = build("cppo", {})
    views = {v.name: encode_view(policy, prompt, v, seed=0, step=0) for v in method.views}
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number, length in enumerate(response_tokens):
        better = number % 2 == 0
        ids = torch.randint(len(SPECIAL), len(tokenizer), (length,), generator=generator)
        advantage = 1.0 if better else -1.0
        samples.append(
            Sample(prompt=prompt, ids=ids, advantage=advantage, views=views if better else {})
        )
    return Batch(policy=policy, prompt=prompt, samples=samples, method=method)


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

    def update(self) -> None:
        self._updater.step(self._samples)


# --- TRL's ---------------------------------------------------------------------------------------


class Trl:
    """TRL's GRPOTrainer: its loss, forward and backward, with one view of the image.

    At its best: SDPA, no reference model, no gradient checkpointing unless ours has it, no padding
    where responses are of one length, the fused head that TRL puts on by itself.
    """

    def __init__(self, batch: Batch, *, checkpointing: bool = False) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        policy, prompt, samples = batch.policy, batch.prompt, batch.samples
        count = len(samples)
        model = copy.deepcopy(policy.model)
        model.set_attn_implementation(policy.attention)
        config = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
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
        device = policy.device
        ids = torch.nn.utils.rnn.pad_sequence([s.ids for s in samples], batch_first=True)
        lengths = torch.tensor([len(s.ids) for s in samples])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        kinds = torch.cat([prompt.image_mask.int(), torch.zeros(ids.shape[1], dtype=torch.int)])
        self._inputs: dict[str, Any] = {
            "prompt_ids": prompt.ids.expand(count, -1).to(device),
            "prompt_mask": torch.ones(count, len(prompt.ids), dtype=torch.long, device=device),
            "completion_ids": ids.to(device),
            "completion_mask": mask.to(device),
            "advantages": torch.tensor([s.advantage for s in samples], device=device),
            "pixel_values": prompt.pixels.repeat(count, 1).to(device),
            "image_grid_thw": prompt.grids.repeat(count, 1).to(device),
            "num_images": [1] * count,
            "mm_token_type_ids": kinds.expand(count, -1).to(device),
            "num_items_in_batch": lengths.sum().float().to(device),
        }
        self._trainer.current_gradient_accumulation_steps = 1

    def update(self) -> None:
        self.model.zero_grad()
        self._trainer.compute_loss(self.model, self._inputs).backward()


# --- a plain three-view update -------------------------------------------------------------------


class Naive:
    """CPPO as one would first write it: three padded forwards of everything, logits whole."""

    def __init__(self, batch: Batch) -> None:
        self._policy, self._samples, self._method = batch.policy, batch.samples, batch.method
        self.model = copy.deepcopy(batch.policy.model)
        self.model.set_attn_implementation(batch.policy.attention)
        prompt, device = batch.prompt, batch.policy.device
        count = len(self._samples)
        ids = torch.nn.utils.rnn.pad_sequence([s.ids for s in self._samples], batch_first=True)
        lengths = torch.tensor([len(s.ids) for s in self._samples])
        self._mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)
        kinds = torch.cat([prompt.image_mask.int(), torch.zeros(ids.shape[1], dtype=torch.int)])
        self._targets = ids.to(device)
        self._inputs = {
            "input_ids": torch.cat([prompt.ids.expand(count, -1), ids], dim=1).to(device),
            "attention_mask": torch.cat(
                [torch.ones(count, len(prompt.ids), device=device), self._mask], dim=1
            ).long(),
            "image_grid_thw": prompt.grids.repeat(count, 1).to(device),
            "mm_token_type_ids": kinds.expand(count, -1).to(device),
        }
        views = self._samples[0].views
        self._pixels = [
            pixels.repeat(count, 1).to(device) for pixels in (prompt.pixels, *views.values())
        ]
        self._advantages = torch.tensor([s.advantage for s in self._samples], device=device)

    def _forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        keep = self._targets.shape[1] + 1
        with self._policy.autocast():
            output = self.model(**self._inputs, pixel_values=pixels, logits_to_keep=keep)
        logprobs = output.logits[:, :-1].float().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, self._targets[..., None])[..., 0], entropy

    def update(self) -> None:
        self.model.zero_grad()
        (seen, entropy), (preserved, _), (removed, removed_entropy) = map(
            self._forward, self._pixels
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
