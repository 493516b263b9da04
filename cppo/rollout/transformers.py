"""Rollouts in process, on the transformers model itself.

A group shares its prompt: images are encoded once, the prompt is run once, and its keys and values
are held once (see `cache`).

Shapes: P prompts, S sequences being sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cppo.policy.loading import Policy
from cppo.policy.prompts import Prompt
from cppo.policy.scoring import Row, encode_images
from cppo.rollout.cache import GroupCache


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn. `temperature` 0 always takes the likeliest token."""

    responses: int  # per prompt
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_responses: int = 256  # sampled side by side; bounds memory


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
    """Yields `sampling.responses` responses for each prompt, in order."""
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
    cache = GroupCache([len(prompt.ids) for prompt in prompts], repeats, device)
    hidden = _prefill(policy, prompts, cache).repeat_interleave(repeats, dim=0)
    position = torch.tensor([prompt.next_position for prompt in prompts], device=device)
    position = position.repeat_interleave(repeats)
    axes = prompts[0].positions.shape[0]
    ends = torch.tensor(policy.eos, device=device)
    forbidden = torch.tensor(policy.family.forbidden, device=device)

    count = len(prompts) * repeats
    alive = torch.arange(count, device=device)
    ids = torch.zeros((count, sampling.max_new_tokens), dtype=torch.long, device=device)
    logprobs = torch.zeros((count, sampling.max_new_tokens), device=device)
    lengths = torch.full((count,), sampling.max_new_tokens, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)

    for step in range(sampling.max_new_tokens):
        logits = (hidden @ policy.head.T).float()
        token, logprob = _draw(logits, forbidden, sampling, generator)
        ids[alive, step], logprobs[alive, step] = token, logprob
        going = ~torch.isin(token, ends)
        if not going.all():
            stopped = alive[~going]
            lengths[stopped], finished[stopped] = step + 1, True
            kept = going.nonzero()[:, 0]
            alive, token, position = alive[kept], token[kept], position[kept]
            if len(alive):
                cache.keep(kept)
        if not len(alive) or step + 1 == sampling.max_new_tokens:
            break
        cache.advance()
        hidden = policy.family.hidden_states(
            policy.base,
            token[:, None],
            position.expand(axes, 1, -1).transpose(1, 2),
            None,
            None,
            use_cache=False,
            layout=cache,
        ).last_hidden_state[:, -1]
        position = position + 1

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


def _prefill(policy: Policy, prompts: Sequence[Prompt], cache: GroupCache) -> Tensor:
    """Runs each prompt once, packed. Returns the last hidden state of each, (P, D)."""
    device = policy.device
    ends = torch.tensor([len(prompt.ids) for prompt in prompts]).cumsum(0) - 1
    rows = [Row(prompt=p, pixels=p.pixels, response=p.ids[:0]) for p in prompts]
    output = policy.family.hidden_states(
        policy.base,
        torch.cat([prompt.ids for prompt in prompts])[None].to(device),
        torch.cat([prompt.positions for prompt in prompts], dim=1)[:, None].to(device),
        torch.cat([prompt.image_mask for prompt in prompts])[None].to(device),
        encode_images(policy, rows),
        use_cache=False,
        layout=cache,
    )
    hidden: Tensor = output.last_hidden_state[0, ends.to(device)]
    return hidden


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
        token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keeps the likeliest tokens that together reach `top_p` (at least one); (S, V)."""
    sorted_down, order = probabilities.sort(-1, descending=True)
    # Some devices have no cumulative sum that is the same each time; the CPU has.
    fixed = torch.are_deterministic_algorithms_enabled()
    summed = (sorted_down.cpu() if fixed else sorted_down).cumsum(-1).to(sorted_down.device)
    before = summed - sorted_down
    sorted_down = sorted_down.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, sorted_down)
