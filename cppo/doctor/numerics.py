"""Token statistics, the objective and random numbers on the device, against independent truths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cppo.detector import perception_mask
from cppo.doctor.finding import Examination, Finding, at_most, holds, relative_error, short
from cppo.objective import (
    aggregate,
    clipped_surrogate,
    contrastive_perception_loss,
    group_advantages,
)

TOKENS, VOCABULARY, HIDDEN = 48, 151_936, 128  # Qwen's vocabulary
TEMPERATURE = 0.7
# Log-probabilities and entropies are float32 whatever the inputs; gradients have the inputs' dtype.
STATISTICS_LIMIT = 1e-5
GRADIENT_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
GOLDEN_LIMIT = 1e-5


def examine_statistics(given: Examination) -> Iterator[Finding]:
    """At a real vocabulary's size, and against float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) * HIDDEN**-0.5
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    upstream = torch.randn(2, TOKENS, generator=generator)
    for dtype in given.backend.precision:
        low = [tensor.to(dtype) for tensor in (hidden, weight)]
        truth = _differentiate(_exact_statistics, low, targets, upstream.double(), torch.float64)
        on_device = [tensor.to(given.device) for tensor in low]
        statistics = given.backend.token_statistics
        found = _differentiate(
            lambda *args, kernel=statistics: kernel(*args, temperature=TEMPERATURE),
            on_device,
            targets.to(given.device),
            upstream.to(given.device),
            dtype,
        )
        limits = (STATISTICS_LIMIT, STATISTICS_LIMIT, *[GRADIENT_LIMITS[dtype]] * 2)
        names = ("log-probability", "entropy", "gradient of hidden states", "gradient of weight")
        for name, measured, true, limit in zip(names, found, truth, limits, strict=True):
            error = relative_error(measured, true)
            yield at_most(f"{name} from {short(dtype)}", error, limit)


def examine_objective(given: Examination) -> Iterator[Finding]:
    """The golden vectors that the tests hold on the CPU in float64, here in float32."""
    responses = GOLDEN["responses"]
    mask = _padded([[True] * len(r["logprobs"]) for r in responses], given).bool()
    seen, preserved, removed, old, entropy, removed_entropy = (
        _padded([response[name] for response in responses], given)
        for name in (
            "logprobs",
            "preserved_logprobs",
            "removed_logprobs",
            "old_logprobs",
            "entropy",
            "removed_entropy",
        )
    )
    advantages = torch.tensor([r["advantage"] for r in responses], device=given.device)
    losses = {
        "contrastive_k3": contrastive_perception_loss(seen, preserved, removed, mask),
        "contrastive_k1": contrastive_perception_loss(
            seen, preserved, removed, mask, divergence="k1"
        ),
        "clipped_surrogate": clipped_surrogate(seen, old, advantages),
    }
    for name, loss in losses.items():
        expected = _padded([response["expect"][name] for response in responses], given)
        yield at_most(name, relative_error(loss[mask], expected[mask]), GOLDEN_LIMIT)
        mean, true_mean = (aggregate(x, mask, "sequence-mean") for x in (loss, expected))
        yield at_most(f"{name}, averaged", relative_error(mean, true_mean), GOLDEN_LIMIT)
    variants: dict[str, dict[str, Any]] = {
        "perception_mask_floor_keep": {},
        "perception_mask_ceil_cut": {"count": "ceil", "ties": "cut"},
        "perception_mask_absolute": {"score": "absolute"},
    }
    for name, options in variants.items():
        chosen = perception_mask(entropy, removed_entropy, mask, **options)
        expected = _padded([response["expect"][name] for response in responses], given).bool()
        yield holds(name, torch.equal(chosen, expected))
    rewards = torch.tensor(GOLDEN["rewards"], device=given.device)
    for name, normalize in (("grpo_advantages", True), ("dr_grpo_advantages", False)):
        found = group_advantages(rewards, GOLDEN["group_size"], normalize=normalize)
        error = relative_error(found, torch.tensor(GOLDEN["expect"][name]))
        yield at_most(name, error, GOLDEN_LIMIT)


def examine_random_numbers(given: Examination) -> Iterator[Finding]:
    """What sampling rests on: the same seed gives the same draws, another seed gives others."""
    weights = torch.ones(64, 1000, device=given.device)

    def draw(generator: torch.Generator) -> Tensor:
        return torch.multinomial(weights, 4, generator=generator)

    generator = torch.Generator(given.device).manual_seed(1)
    first, second = draw(generator), draw(generator)
    again = torch.Generator(given.device).manual_seed(1)
    yield holds("the same seed gives the same draws", torch.equal(first, draw(again)))
    yield holds("a generator goes on, and does not repeat", not torch.equal(first, second))
    state = again.get_state()
    third = draw(again)
    again.set_state(state)
    yield holds("a saved state gives its draws again", torch.equal(third, draw(again)))
    other = torch.Generator(given.device).manual_seed(2)
    yield holds("another seed gives other draws", not torch.equal(first, draw(other)))


def _differentiate(
    statistics: Any,
    inputs: list[Tensor],
    targets: Tensor,
    upstream: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Log-probabilities, entropies, and the gradients of hidden states and weight."""
    hidden, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs)
    logprobs, entropy = statistics(hidden, weight, targets)
    (upstream[0] * logprobs + upstream[1] * entropy).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [logprobs, entropy, hidden.grad, weight.grad]


def _exact_statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def _padded(rows: list[list[Any]], given: Examination) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(given.device)
