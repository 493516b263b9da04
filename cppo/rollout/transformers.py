"""Rollouts in process, on the transformers model itself.

Shapes: S responses being sampled, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from cppo.policy.loading import Policy
from cppo.policy.prompts import Prompt
from cppo.rollout.decoding import decoder


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn. `temperature` 0 always takes the likeliest token."""

    responses: int  # per prompt
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_responses: int = 256  # sampled side by side; bounds memory
    compile: bool = False  # the pass of a token, by `torch.compile`


@dataclass(frozen=True, kw_only=True, eq=False)
class Response:
    """One sampled response."""

    ids: Tensor  # (length,), the end token included where there is one
    logprobs: Tensor  # (length,), of the temperature-scaled distribution before top-p, in nats
    finished: bool  # False where max_new_tokens cut it off
    text: str


def generate(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, generator: torch.Generator
) -> Iterator[list[Response]]:
    """Yields `sampling.responses` responses for each prompt, in order.

    A prompt that follows itself, the same object, is run once for all its responses.
    """
    step = max(1, sampling.batch_responses // sampling.responses)
    for start in range(0, len(prompts), step):
        # A generator that yielded within would leave its caller without gradients meanwhile.
        with policy.evaluating():
            groups = _sample(policy, prompts[start : start + step], sampling, generator)
        yield from groups


def _sample(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, generator: torch.Generator
) -> list[list[Response]]:
    device, repeats = policy.device, sampling.responses
    decoding = decoder(policy, prompts, repeats, compile=sampling.compile)
    hidden = decoding.begin()
    # As scores are made: of states and weights in the policy's precision, added up in float32.
    head = policy.head.to(policy.precision).float()
    ends = torch.tensor(policy.eos, device=device)
    forbidden = torch.tensor(policy.family.forbidden, device=device)

    count = len(prompts) * repeats
    alive = torch.arange(count, device=device)
    ids = torch.zeros((count, sampling.max_new_tokens), dtype=torch.long, device=device)
    logprobs = torch.zeros((count, sampling.max_new_tokens), device=device)
    lengths = torch.full((count,), sampling.max_new_tokens, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)

    # Autocast keeps no narrow copies of the weights in inference mode: each token would make them.
    # Compiled code gains nothing by it.
    as_usual = torch.is_autocast_enabled(device.type) or decoding.compiled
    faster = contextlib.nullcontext if as_usual else torch.inference_mode
    for step in range(sampling.max_new_tokens):
        with torch.autocast(device.type, enabled=False):
            logits = linear(hidden.to(policy.precision).float(), head)
        token, logprob = _draw(logits, forbidden, sampling, generator)
        ids[alive, step], logprobs[alive, step] = token, logprob
        going = ~torch.isin(token, ends)
        if not going.all():
            stopped = alive[~going]
            lengths[stopped], finished[stopped] = step + 1, True
            kept = going.nonzero()[:, 0]
            alive, token = alive[kept], token[kept]
            if len(alive):
                decoding.keep(kept)
        if not len(alive) or step + 1 == sampling.max_new_tokens:
            break
        with faster():
            hidden = decoding.advance(token)

    responses = [
        Response(
            ids=ids[row, : lengths[row]].cpu(),
            logprobs=logprobs[row, : lengths[row]].cpu(),
            finished=bool(finished[row]),
            text=policy.tokenizer.decode(ids[row, : lengths[row]], skip_special_tokens=True),
        )
        for row in range(count)
    ]
    return [responses[start : start + repeats] for start in range(0, count, repeats)]


def _draw(
    logits: Tensor, forbidden: Tensor, sampling: Sampling, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One token for each row of logits (S, V), and its log-probability; of `forbidden` none."""
    logprobs = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
    if sampling.temperature == 0:
        token = logprobs.index_fill(1, forbidden, -torch.inf).argmax(-1)
    else:
        # What is allowed has all the mass, however little that is.
        allowed = logprobs.index_fill(1, forbidden, -torch.inf)
        probabilities = allowed.softmax(-1)
        if sampling.top_p < 1:
            probabilities = _nucleus(probabilities, sampling.top_p)
        token = _one_of(probabilities, generator)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def _one_of(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A column for each row, by its share of the row's mass; (S, V) to (S,)."""
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    # It draws a number for each column, which a CPU does one by one; one for each row will do.
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    if not reached[:, -1].isfinite().all():
        raise RuntimeError(
            "the policy's probabilities are not finite, so no token can be drawn: look for weights "
            "that are not, or choose a wider --precision"
        )
    drawn = torch.rand(len(reached), 1, dtype=torch.float64, generator=generator) * reached[:, -1:]
    return torch.searchsorted(reached, drawn, right=True)[:, 0]


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keeps the likeliest tokens that together reach `top_p` (at least one); (S, V)."""
    sorted_down, order = probabilities.sort(-1, descending=True)
    # Some devices have no cumulative sum that is the same each time; the CPU has.
    fixed = torch.are_deterministic_algorithms_enabled()
    summed = (sorted_down.cpu() if fixed else sorted_down).cumsum(-1).to(sorted_down.device)
    before = summed - sorted_down
    sorted_down = sorted_down.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, sorted_down)
