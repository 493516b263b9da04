"""Who is measured: `cppo`, TRL, and a plain update, on the same workload."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from workload import Workload

from cppo.device import Backend
from cppo.methods import Scores, build
from cppo.objective import aggregate, clipped_surrogate, contrastive_perception_loss
from cppo.policy import Prompt, Scorer
from cppo.processes import Processes
from cppo.samples import Sample
from cppo.update import Updater

# --- ours ----------------------------------------------------------------------------------------


class Ours:
    """`cppo`'s own update, gradient clipping included, the optimizer's step at rate zero."""

    def __init__(
        self,
        work: Workload,
        backend: Backend,
        *,
        views: bool = True,
        tokens_per_micro_batch: int = 1_000_000,
    ) -> None:
        scorer = Scorer(work.policy, backend, temperature=1.0)
        self.model = work.policy.model
        self._updater = Updater(
            scorer=scorer,
            optimizer=torch.optim.SGD(scorer.parameters(), lr=0.0),
            method=work.method if views else build("grpo", {}),
            processes=Processes(backend, work.policy.precision),
            tokens_per_micro_batch=tokens_per_micro_batch,
            max_grad_norm=1.0,
            max_new_tokens=max(len(sample.ids) for sample in work.samples),
        )
        bare = [Sample(prompt=s.prompt, ids=s.ids, advantage=s.advantage) for s in work.samples]
        self._samples = work.samples if views else bare
        self.dtype = work.policy.precision

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

    def __init__(self, work: Workload, *, checkpointing: bool = False) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        policy, samples = work.policy, work.samples
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

    def __init__(self, work: Workload) -> None:
        self._policy, self._method = work.policy, work.method
        self.model = copy.deepcopy(work.policy.model)
        self.model.set_attn_implementation(work.policy.attention)
        as_is = [sample.prompt for sample in work.samples]
        device = work.policy.device
        self._views = [
            padded(work.samples, prompts, device) for prompts in (as_is, *work.views.values())
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
