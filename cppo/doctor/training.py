"""One training step of the built-in policy, on the device against the CPU; and how fast it is.

The policy has random weights, so nothing is trained or downloaded first. Its responses are the
task's reference solutions, half of them better than the others, scored on all of CPPO's views. The
step is plain gradient descent at rate 1: what the weights lose is the gradient.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from cppo.builtin import ShapesTask, label_tokens
from cppo.builtin.policy import IMAGE_PIXELS, build_model, build_tokenizer
from cppo.device import Backend, choose, resolve_attention
from cppo.doctor.finding import Examination, Finding, at_most, relative_error, short
from cppo.methods import CPPO
from cppo.policy import Policy, Scorer, encode_item, encode_view
from cppo.policy.families.qwen_vl import QwenVL
from cppo.policy.loading import place
from cppo.processes import Processes
from cppo.samples import Sample
from cppo.update import Updater

PROMPTS = 4
ADVANTAGES = (1.0, -1.0, 0.5, -0.5)  # of each prompt's responses
# Relative error of the gradient, by norm, against the CPU's in float32.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
METHOD = CPPO(weight=0.5)  # heavy, so that a wrong contrast shows


def examine(given: Examination) -> Iterator[Finding]:
    truth, true_loss, _ = _step(choose("cpu"), torch.float32, alone=True)
    for dtype in given.backend.precision:
        gradient, loss, tokens_per_second = _step(given.backend, dtype)
        what = short(dtype)
        error = relative_error(gradient, truth)
        yield at_most(f"gradient of a step in {what}", error, LIMITS[dtype])
        error = abs(loss - true_loss) / true_loss
        yield at_most(f"contrastive loss in {what}", error, LIMITS[dtype])
        yield Finding(
            name=f"update in {what}",
            verdict="info",
            measured=tokens_per_second,
            unit="response tokens/s",
            detail=f"{given.processes.world} process(es), 1.1 M parameters, three views",
        )


def examine_throughput(given: Examination) -> Iterator[Finding]:
    """Square matrix products, the larger the faster the device."""
    for dtype in given.backend.precision:
        size, seconds = 512, 0.0
        while seconds < 0.05 and size < 16384:
            size *= 2
            matrix = torch.randn(size, size, device=given.device).to(dtype)
            matrix @ matrix
            given.synchronize()
            started = time.monotonic()
            matrix @ matrix
            given.synchronize()
            seconds = time.monotonic() - started
        yield Finding(
            name=f"matrix product in {short(dtype)}",
            verdict="info",
            measured=2 * size**3 / seconds / 1e12,
            unit="TFLOP/s",
            detail=f"{size} x {size}",
        )


def _step(
    backend: Backend, dtype: torch.dtype, *, alone: bool = False
) -> tuple[Tensor, float, float]:
    """The gradient, the contrastive loss, and response tokens a second in a second step."""
    processes = Processes(backend, dtype, alone=alone)
    attention = resolve_attention(backend, "auto", precision=dtype)
    policy = _policy(processes.device, dtype, attention)
    scorer = Scorer(policy, backend, temperature=1.0)
    samples = _samples(policy)
    own = samples[processes.rank :: processes.world]
    updater = Updater(
        scorer=processes.wrap(scorer),
        optimizer=torch.optim.SGD(scorer.parameters(), lr=1.0),
        method=METHOD,
        processes=processes,
        tokens_per_micro_batch=2048,
        max_grad_norm=1e9,
        max_new_tokens=64,
    )
    before = _weights(policy)
    metrics = updater.step(own)
    while metrics["skipped"] and processes.loss_scale > 1:  # float16 finds its scale
        metrics = updater.step(own)
    gradient = before - _weights(policy)
    started = time.monotonic()
    updater.step(own)
    _weights(policy)  # waits for the device
    seconds = time.monotonic() - started
    return gradient, metrics["loss/perception"], sum(len(s.ids) for s in samples) / seconds


def _policy(device: torch.device, precision: torch.dtype, attention: str) -> Policy:
    """The built-in architecture with the same random weights wherever it is."""
    from transformers import Qwen2VLImageProcessorPil

    tokenizer, image_processor = build_tokenizer(), Qwen2VLImageProcessorPil(**IMAGE_PIXELS)
    model = build_model(tokenizer, seed=0)
    QwenVL.prepare(model)
    model.set_attn_implementation(attention)
    place(model, device)
    return Policy(
        model=model.train(),
        family=QwenVL(model.config, tokenizer, image_processor),
        tokenizer=tokenizer,
        image_processor=image_processor,
        eos=(tokenizer.eos_token_id,),
        precision=precision,
        attention=attention,
        source="random weights",
    )


def _samples(policy: Policy) -> list[Sample]:
    """Responses of several lengths, better and worse than their group."""
    task = ShapesTask(split="train", size=PROMPTS, seed=0)
    samples = []
    for index in range(PROMPTS):
        puzzle = task.puzzle(index)
        prompt = encode_item(policy, puzzle.item, instruction="", max_tokens=1000)
        views = {v.name: encode_view(policy, prompt, v, seed=0, step=0) for v in METHOD.views}
        ids = torch.tensor(label_tokens(policy.tokenizer, puzzle)[0])
        for number, advantage in enumerate(ADVANTAGES):
            samples.append(
                Sample(
                    prompt=prompt,
                    ids=ids[: len(ids) - 3 * number],
                    advantage=advantage,
                    views=views if advantage > 0 else {},
                )
            )
    return samples


def _weights(policy: Policy) -> Tensor:
    parameters = [p.detach().flatten() for p in policy.model.parameters()]
    return torch.cat(parameters).cpu()
