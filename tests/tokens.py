"""Golden and hand-made tokens for the tests of methods. B responses, T tokens."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import cppo.doctor
from cppo.methods import GRPO, Plan, Scores, Tokens
from cppo.objective import aggregate

GOLDEN = json.loads((Path(cppo.doctor.__file__).with_name("golden.json")).read_text())
VIEWS = {  # of which golden log-probabilities each view of a method is made
    "preserved": "preserved",
    "removed": "removed",
    "masked": "removed",
    "noised": "preserved",
    "blind": "blind",
}
every_response = pytest.mark.parametrize(
    "response", GOLDEN["responses"], ids=lambda r: f"T{len(r['logprobs'])}"
)


def golden_batch(responses: list[dict[str, Any]]) -> Tokens:
    """Golden responses as one batch, in float64; padding, at least one token, is NaN."""

    def padded(name: str) -> Tensor:
        rows = [torch.tensor([*r[name], math.nan], dtype=torch.float64) for r in responses]
        return pad_sequence(rows, batch_first=True, padding_value=math.nan)

    logprobs = padded("logprobs")
    entropy = {"removed": padded("removed_entropy")}
    return Tokens(
        mask=logprobs.isfinite(),
        advantages=torch.tensor([r["advantage"] for r in responses], dtype=torch.float64),
        old_logprobs=padded("old_logprobs"),
        seen=Scores(logprobs=logprobs, entropy=padded("entropy")),
        views={
            view: Scores(
                logprobs=padded(f"{source}_logprobs"),
                entropy=entropy.get(view, torch.full_like(logprobs, math.nan)),
            )
            for view, source in VIEWS.items()
        },
    )


def golden_tokens(response: dict[str, Any], *, advantage: float | None = None) -> Tokens:
    """A golden response as the only one of a batch, in float64, behind it one token of padding."""
    given = response["advantage"] if advantage is None else advantage
    return golden_batch([{**response, "advantage": given}])


def tokens_of(log_ratios: list[float], advantage: float) -> Tokens:
    """One response of which nothing but ratios and advantage is known."""
    return batch_of([log_ratios], [advantage])


def batch_of(
    log_ratios: list[list[float]],
    advantages: list[float],
    views: dict[str, list[list[float]]] | None = None,
) -> Tokens:
    """Responses of which ratios, advantages and views are known, in float64.

    A view is given by how much likelier each token is on it, as a difference of log-probabilities.
    """
    old = torch.full((len(log_ratios), len(log_ratios[0])), -1.0, dtype=torch.float64)
    logprobs, zeros = old + torch.tensor(log_ratios, dtype=torch.float64), torch.zeros_like(old)
    return Tokens(
        mask=torch.ones(old.shape, dtype=torch.bool),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        old_logprobs=old,
        seen=Scores(logprobs=logprobs, entropy=zeros),
        views={
            name: Scores(logprobs=logprobs + torch.tensor(gaps, dtype=torch.float64), entropy=zeros)
            for name, gaps in (views or {}).items()
        },
    )


def check(actual: Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64).reshape(actual.shape)
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def total(method: GRPO, tokens: Tokens, plan: Plan | None = None) -> Tensor:
    """The loss: every term's average by its weight, added up."""
    plan = plan or method.plan(tokens)
    loss = torch.zeros((), dtype=torch.float64)
    for name, term in method.terms(tokens, plan).items():
        average = plan.averages[name]
        loss = loss + term.weight * aggregate(term.per_token, average.mask, average.mode)
    return loss


def assert_gradients_are_the_finite_differences(
    method: GRPO, tokens: Tokens, *, without: Sequence[str] = ()
) -> None:
    """In the log-probabilities on the image and on each view, the plan being constant.

    No gradient must reach the views in `without`, whose scores are as good as constant.
    """
    plan = method.plan(tokens)
    names = ["seen", *(view.name for view in method.views)]

    def loss(*logprobs: Tensor) -> Tensor:
        given = dict(zip(names, logprobs, strict=True))
        views = {n: replace(tokens.views[n], logprobs=given[n]) for n in names[1:]}
        seen = replace(tokens.seen, logprobs=given["seen"])
        return total(method, replace(tokens, seen=seen, views={**tokens.views, **views}), plan)

    leaves = [tokens.seen.logprobs, *(tokens.views[name].logprobs for name in names[1:])]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(loss, leaves)
    gradients = torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient.any() == (name not in without), name


def with_gradient(tokens: Tokens) -> tuple[Tokens, dict[str, Tensor]]:
    """The same tokens, and the log-probabilities that a loss of them may be differentiated in."""
    leaves = {"seen": tokens.seen.logprobs.clone().requires_grad_()}
    views = {}
    for name, view in tokens.views.items():
        leaves[name] = view.logprobs.clone().requires_grad_()
        views[name] = replace(view, logprobs=leaves[name])
    seen = replace(tokens.seen, logprobs=leaves["seen"])
    return replace(tokens, seen=seen, views=views), leaves


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
