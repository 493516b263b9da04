"""Rollouts in process, on the transformers model itself.

A group shares its prompt: images are encoded once and the prompt is run once, then the cache is
copied for each response of the group.

Shapes: P prompts, S sequences being sampled, L prompt positions (left-padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cppo.policy.batch import Row
from cppo.policy.loading import Policy
from cppo.policy.prompts import Prompt
from cppo.policy.scoring import encode_images


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
        with policy.evaluating(), policy.in_rows():
            groups = _sample(policy, prompts[start : start + step], sampling, generator)
        yield from groups


def _sample(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, generator: torch.Generator
) -> list[list[Response]]:
    device, repeats = policy.device, sampling.responses
    hidden, cache, mask = _prefill(policy, prompts)
    cache.batch_repeat_interleave(repeats)
    hidden = hidden.repeat_interleave(repeats, dim=0)
    mask = None if mask is None else mask.repeat_interleave(repeats, dim=0)
    position = torch.tensor([prompt.next_position for prompt in prompts], device=device)
    position = position.repeat_interleave(repeats)
    axes = prompts[0].positions.shape[0]
    ends = torch.tensor(policy.eos, device=device)

    count = len(prompts) * repeats
    alive = torch.arange(count, device=device)
    ids = torch.zeros((count, sampling.max_new_tokens), dtype=torch.long, device=device)
    logprobs = torch.zeros((count, sampling.max_new_tokens), device=device)
    lengths = torch.full((count,), sampling.max_new_tokens, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)

    for step in range(sampling.max_new_tokens):
        token, logprob = _draw(policy, hidden, sampling, generator)
        ids[alive, step], logprobs[alive, step] = token, logprob
        going = ~torch.isin(token, ends)
        if not going.all():
            stopped = alive[~going]
            lengths[stopped], finished[stopped] = step + 1, True
            kept = going.nonzero()[:, 0]
            alive, token, position = alive[kept], token[kept], position[kept]
            mask = None if mask is None else mask[kept]
            if len(alive):
                cache.batch_select_indices(kept)
        if not len(alive) or step + 1 == sampling.max_new_tokens:
            break
        mask = None if mask is None else pad(mask, (0, 1), value=1)
        hidden = policy.family.hidden_states(
            policy.base,
            token[:, None],
            position.expand(axes, 1, -1).transpose(1, 2),
            None,
            None,
            past_key_values=cache,
            attention_mask=mask,
            use_cache=True,
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


def _prefill(policy: Policy, prompts: Sequence[Prompt]) -> tuple[Tensor, Any, Tensor | None]:
    """Runs each prompt once. Returns the last hidden states (P, D), the cache and the mask."""
    device = policy.device
    longest = max(len(prompt.ids) for prompt in prompts)
    gaps = [longest - len(prompt.ids) for prompt in prompts]

    def lined_up(tensors: Sequence[Tensor]) -> Tensor:
        padded = [pad(tensor, (gap, 0)) for tensor, gap in zip(tensors, gaps, strict=True)]
        return torch.stack(padded).to(device)

    mask = lined_up([torch.ones_like(prompt.ids) for prompt in prompts])
    rows = [Row(prompt=p, pixels=p.pixels, response=p.ids[:0]) for p in prompts]
    output = policy.family.hidden_states(
        policy.base,
        lined_up([prompt.ids for prompt in prompts]),
        lined_up([prompt.positions for prompt in prompts]).transpose(0, 1),
        lined_up([prompt.image_mask for prompt in prompts]),
        encode_images(policy, rows),
        attention_mask=mask if any(gaps) else None,
        use_cache=True,
    )
    return output.last_hidden_state[:, -1], output.past_key_values, mask if any(gaps) else None


def _draw(
    policy: Policy, hidden: Tensor, sampling: Sampling, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One token for each sequence, and its log-probability. Visual placeholders are never drawn."""
    logits = (hidden @ policy.head.T).float()
    logprobs = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
    allowed = logprobs.clone()
    allowed[:, list(policy.family.forbidden)] = -torch.inf
    if sampling.temperature == 0:
        token = allowed.argmax(-1)
    else:
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
