"""Sample rollouts with what is known of each of their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cppo.collect import Group
from cppo.methods import CPPO, GRPO
from cppo.policy import Policy, Row, encode_view


def describe(
    policy: Policy, scorer: nn.Module, method: GRPO, group: Group, *, seed: int, step: int
) -> list[dict[str, Any]]:
    """One record a response of the group, for `samples.jsonl`; with the reply without the images
    where the method asks for one.

    Each token comes with its log-probability and entropy and, where the method detects perception
    tokens, its entropy under the removing views and whether the detector picks it (but where it
    ranks by the divergence over the whole vocabulary).
    """
    views = {"seen": group.prompt}
    if isinstance(method, CPPO):
        for view in method.views:
            if view.detects:
                views[view.name] = encode_view(policy, group.prompt, view, seed=seed, step=step)
    responses = group.responses
    with policy.evaluating():
        scored = {
            name: scorer([Row(prompt=prompt, response=r.ids) for r in responses])
            for name, prompt in views.items()
        }
    columns = {
        "logprob": scored["seen"].logprobs,
        "entropy": scored["seen"].entropy,
    }
    if isinstance(method, CPPO):
        lengths = torch.tensor([len(response.ids) for response in responses])
        width = scored["seen"].entropy.shape[1]
        mask = (torch.arange(width)[None] < lengths[:, None]).to(scored["seen"].entropy.device)
        removed = [scored[name] for name in method.removed]
        columns["removed_entropy"] = torch.stack([view.entropy for view in removed]).mean(0)
        if method.score != "divergence" or method.divergence != "full":  # not scored here
            columns["perception"] = method.detect(scored["seen"], removed, mask)
    return [
        {
            "step": step,
            "row": group.prompt.item.row,
            "question": group.prompt.item.question,
            "answer": group.prompt.item.answer,
            "response": response.text,
            "reward": group.rewards[number].total,
            "accuracy": group.rewards[number].accuracy,
            **({"reply": group.replies[number]} if method.second_look else {}),
            "advantage": group.advantages[number],
            "tokens": [policy.tokenizer.decode([token]) for token in response.ids.tolist()],
            **{
                name: [round(float(v), 5) for v in values[number, : len(response.ids)]]
                for name, values in columns.items()
            },
        }
        for number, response in enumerate(responses)
    ]
