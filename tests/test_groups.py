"""Laws of the group layout: packed together, prompts and responses get what they get alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cppo_cpu
import pytest
import torch
from families import ITEMS, PACKED, as_loaded, make_prompt, random_response, save_family
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cppo.attention import eager_attention
from cppo.attention.groups import Layout
from cppo.attention.pieces import Segments
from cppo.device import choose
from cppo.policy import Policy, Row, Scorer, load
from cppo.policy.padded import pad_rows

PART = cppo_cpu.PARTIAL_ATTENTION
IN_PARTS = replace(choose("cpu"), partial_attention=PART)
MASKED = replace(IN_PARTS, partial_attention=None)  # as on devices that have no attention in parts
WAYS = {
    "in parts": {"kernel": scaled_dot_product_attention, "part": PART},
    "masked": {"kernel": scaled_dot_product_attention, "part": None},
    "masked, eager": {"kernel": eager_attention, "part": None},
}
TOLERANCE = 1e-10  # in float64


def alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one sequence, (L, H, D) each, written out."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def one_by_one(
    prompts: Sequence[int], responses: Sequence[Sequence[int]], *tensors: Tensor
) -> Tensor:
    """What each prompt, and each response after its prompt, attends to by itself; (L, H, D)."""
    attended, later, start, end = [], [], 0, sum(prompts)
    for prompt, lengths in zip(prompts, responses, strict=True):
        context = slice(start, start + prompt)
        attended.append(alone(*(x[context] for x in tensors)))
        start += prompt
        for length in lengths:
            own = slice(end, end + length)
            later.append(alone(*(torch.cat([x[context], x[own]]) for x in tensors))[prompt:])
            end += length
    return torch.cat([*attended, *later])


groups = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=30, deadline=None)
@given(groups=groups, heads=st.sampled_from([(4, 2), (3, 3), (4, 1)]))
@example(groups=[(530, [70, 33]), (40, [260])], heads=(4, 2))  # several blocks of any kernel
def test_a_response_attends_to_its_prompt_and_itself(
    way: str, groups: list[tuple[int, list[int]]], heads: tuple[int, int]
) -> None:
    prompts, responses = [p for p, _ in groups], [r for _, r in groups]
    length = sum(prompts) + sum(map(sum, responses))
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(length, count, 8, dtype=torch.float64, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    )
    packed = [x.transpose(0, 1)[None] for x in (query, key, value)]
    kernel, part = WAYS[way]["kernel"], WAYS[way]["part"]
    layout = Layout(prompts=prompts, responses=responses, part=part)
    attended = layout.attend(*packed, layer=0, scale=8**-0.5, kernel=kernel)[0]
    truth = one_by_one(prompts, responses, query, key, value)
    # The eager softmax is computed in float32, as in transformers' models.
    tolerance = 1e-5 if kernel is eager_attention else TOLERANCE
    torch.testing.assert_close(attended, truth, atol=tolerance, rtol=tolerance)
    upstream = torch.randn_like(truth)
    inputs = (query, key, value)
    for found, true in zip(
        torch.autograd.grad(attended, inputs, upstream),
        torch.autograd.grad(truth, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, true, atol=tolerance, rtol=tolerance)


def test_parts_are_merged_wide_where_attention_is_narrow() -> None:
    """As under autocast, rotations having left queries and keys wide."""
    torch.manual_seed(0)
    prompts, responses = (40, 7), ((30, 9), (12,))
    length = sum(prompts) + sum(map(sum, responses))
    inputs = [torch.randn(length, heads, 64, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(length, 4, 64)

    def given(*tensors: Tensor) -> list[Tensor]:
        return [x.transpose(0, 1)[None] for x in (*tensors[:2], tensors[2].bfloat16())]

    layout = Layout(prompts=prompts, responses=responses, part=PART)
    attended = layout.attend(
        *given(*inputs), layer=0, scale=0.125, kernel=scaled_dot_product_attention
    )[0]
    assert attended.dtype == torch.bfloat16
    wide = [x.detach().bfloat16().double().requires_grad_() for x in inputs]
    truth = one_by_one(prompts, responses, *wide)
    pairs = zip(
        (attended, *torch.autograd.grad(attended, inputs, upstream.bfloat16())),
        (truth, *torch.autograd.grad(truth, wide, upstream.bfloat16().double())),
        strict=True,
    )
    for found, true in pairs:
        assert (found - true).norm() < 0.01 * true.norm()


@pytest.fixture(scope="module", params=PACKED)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_family(request.param, tmp_path_factory.mktemp(request.param), tokenizer)


def make_rows(policy: Policy, responses: int) -> list[Row]:
    """Every item of the tests, one of which has several images, with ragged responses."""
    return [
        Row(
            prompt=prompt,
            response=random_response(policy, 1 + (5 * number) % 9, seed=number),
        )
        for prompt in [make_prompt(policy, item) for item in ITEMS]
        for number in range(responses)
    ]


def scores_and_gradients(
    policy: Policy, calls: Sequence[Sequence[Row]], scorer: Scorer | None = None
) -> list[Tensor]:
    """Log-probabilities and entropies of all tokens, and each parameter's gradient of a mix."""
    scorer = scorer or Scorer(policy, IN_PARTS, temperature=0.7)
    found: dict[str, list[Tensor]] = {"logprobs": [], "entropy": []}
    for rows in calls:
        scores = scorer(rows)
        for name, kept in found.items():
            kept += [t[: len(r.response)] for t, r in zip(getattr(scores, name), rows, strict=True)]
    logprobs, entropy = (torch.cat(kept) for kept in found.values())
    loss = (logprobs * torch.linspace(-1, 1, len(logprobs))).sum() + entropy.square().sum()
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    # Some towers have parts that no feature passes.
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    used = [gradient for gradient in gradients if gradient is not None]
    assert len(used) > 20
    return [logprobs, entropy, *used]


@pytest.mark.parametrize(
    ("responses", "adapted"),
    [(1, False), (3, True), (16, False)],
    ids=["1", "3, lora, checkpointing", "16"],
)
def test_a_group_of_any_size_scores_as_its_responses_do_alone(
    folder: Path, responses: int, adapted: bool
) -> None:
    lora = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    options: dict[str, Any] = {"lora": lora, "gradient_checkpointing": True} if adapted else {}
    policy = load(str(folder), dtype=torch.float64, attention="sdpa", **options)
    rows = make_rows(policy, responses)
    together = scores_and_gradients(policy, [rows])
    assert_same(together, scores_and_gradients(policy, [[row] for row in rows]))
    # And as under a mask, and in transformers' own attention, over padded rows.
    masked = Scorer(policy, MASKED, temperature=0.7)
    assert_same(together, scores_and_gradients(policy, [rows], masked))
    padded = Scorer(policy, choose("cpu"), temperature=0.7)
    padded._arrange = pad_rows
    with as_loaded(policy):
        assert_same(together, scores_and_gradients(policy, [rows], padded))


def assert_same(found: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Each tensor by itself; norms and rotations are in float32."""
    largest = max(float(true.norm()) for true in truth)
    for one, true in zip(found, truth, strict=True):
        assert (one - true).norm() <= 1e-6 * true.norm() + 1e-9 * largest


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prompt_passes_the_language_model_once_a_view(folder: Path, attention: str) -> None:
    policy = load(str(folder), dtype=torch.float32, attention=attention)
    rows = make_rows(policy, 4)
    prompts = {id(row.prompt): len(row.prompt.ids) for row in rows}
    other = replace(rows[0].prompt, pixels=rows[0].prompt.pixels.clone())
    rows += [Row(prompt=other, response=r.response) for r in rows[:2]]
    lengths = []
    hook = policy.language.layers[0].register_forward_pre_hook(
        lambda _, given: lengths.append(given[0].shape[:2])
    )
    Scorer(policy, choose("cpu"), temperature=1.0)(rows)
    hook.remove()
    responses = sum(len(row.response) for row in rows)
    once = sum(prompts.values()) + prompts[id(rows[0].prompt)]
    assert lengths == [(1, once + responses)]


def test_scores_are_made_in_parts_unless_attention_is_to_be_eager(folder: Path) -> None:
    """The prompt and two responses each to itself, then both responses to the prompt; in a
    precision that the parts do not take, under a mask."""
    calls = []

    def told(*given: Tensor, queries: Segments, keys: Segments, **options: Any) -> Any:
        calls.append((tuple(queries.lengths), tuple(keys.lengths), options["causal"]))
        return PART.forward(*given, queries=queries, keys=keys, **options)

    part = replace(PART, forward=told)
    for attention, precision, used in (
        ("sdpa", PART.precision, True),
        ("sdpa", (torch.bfloat16,), False),
        ("eager", PART.precision, False),
    ):
        policy = load(str(folder), dtype=torch.float32, attention=attention)
        prompt = make_prompt(policy, ITEMS[0])
        rows = [Row(prompt=prompt, response=random_response(policy, n, seed=n)) for n in (3, 5)]
        backend = replace(IN_PARTS, partial_attention=replace(part, precision=precision))
        calls.clear()
        Scorer(policy, backend, temperature=1.0)(rows)
        length = len(prompt.ids)
        own = (length, 3, 5)
        each_layer = [(own, own, True), ((8,), (length,), False)]
        assert calls == each_layer * used * len(policy.language.layers)


def test_a_gradient_that_is_one_number_for_all_goes_back_like_any_other() -> None:
    """A sum's is expanded: it has no strides."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 21, 8, requires_grad=True) for heads in (4, 2, 2)]
    layout = Layout(prompts=(9,), responses=((5, 7),), part=PART)
    options: dict[str, Any] = {"layer": 0, "scale": 0.3, "kernel": scaled_dot_product_attention}
    attended = layout.attend(*inputs, **options)
    found = torch.autograd.grad(attended.sum(), inputs, retain_graph=True)
    assert all(
        torch.equal(one, true)
        for one, true in zip(
            found, torch.autograd.grad(attended, inputs, torch.ones_like(attended)), strict=True
        )
    )
