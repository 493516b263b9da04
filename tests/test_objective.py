"""Laws of the per-token losses and their aggregates. B responses, T tokens."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softplus

import cppo.doctor
from cppo.objective import (
    aggregate,
    clipped_surrogate,
    contrast_divergences,
    contrastive_perception_loss,
    count_units,
    divergence,
    group_advantages,
    sequence_surrogate,
)

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("tensors_on_device")]
GOLDEN = json.loads((Path(cppo.doctor.__file__).with_name("golden.json")).read_text())
MODES = ["token-mean", "sequence-mean", "sequence-sum-norm"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
FILLS = [math.nan, math.inf, -math.inf, 1e30, -1e30, 0.3]
seeds = st.integers(0, 2**31 - 1)
laws = settings(max_examples=25, deadline=None)


def golden_tensor(name: str, response: dict[str, Any], dtype: torch.dtype) -> Tensor:
    return torch.tensor([response[name]], dtype=dtype)


def golden_batch(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All golden responses in one batch with NaN padding, and the mask of their tokens."""
    rows = [torch.tensor(response[name], dtype=dtype) for response in GOLDEN["responses"]]
    mask = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, math.nan), pad(mask, True, False)


def check(actual: Tensor, expected: Tensor | list[float], tolerance: float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64).reshape(actual.shape)
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def random_logprobs(seed: int, B: int, T: int, views: int, spread: float = 0.5) -> list[Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    base = -torch.rand(B, T, generator=generator, dtype=torch.float64) * 2
    noise = torch.randn(views - 1, B, T, generator=generator, dtype=torch.float64) * spread
    return [base, *(base + noise)]


def random_mask(seed: int, B: int, T: int) -> Tensor:
    """Right-padded, and with a hole inside now and then."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed + 1)
    lengths = torch.randint(0, T + 1, (B, 1), generator=generator)
    holes = torch.rand(B, T, generator=generator) < 0.2
    return (torch.arange(T) < lengths) & ~holes


def random_advantages(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed + 2)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# Every loss under one signature, so that one law can be asked of all: log-probabilities of three
# views, advantages (B,) or (B, T) and a mask in, per-token losses out.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "divergence_k3": lambda x, y, z, a, m: divergence(x, y, "k3"),
    "divergence_k1": lambda x, y, z, a, m: divergence(x, y, "k1"),
    "contrastive_k3": lambda x, y, z, a, m: contrastive_perception_loss(x, y, z, m),
    "contrastive_k1": lambda x, y, z, a, m: contrastive_perception_loss(
        x, y, z, m, divergence="k1"
    ),
    "contrast_divergences": lambda x, y, z, a, m: contrast_divergences(
        divergence(x, y), divergence(x, z), m
    ),
    "clipped_surrogate": lambda x, y, z, a, m: clipped_surrogate(x, y, a),
    "sequence_surrogate": lambda x, y, z, a, m: sequence_surrogate(x, y, a, m, low=0.1, high=0.2),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


# --- golden vectors -----------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(
    ("key", "normalize"), [("grpo_advantages", True), ("dr_grpo_advantages", False)]
)
def test_advantages_equal_the_golden_ones(dtype: torch.dtype, key: str, normalize: bool) -> None:
    rewards = torch.tensor(GOLDEN["rewards"], dtype=dtype)
    advantages = group_advantages(rewards, GOLDEN["group_size"], normalize=normalize)
    assert advantages.dtype == dtype
    check(advantages, GOLDEN["expect"][key], TOLERANCE[dtype])


@every_dtype
@pytest.mark.parametrize("response", GOLDEN["responses"], ids=lambda r: f"T{len(r['logprobs'])}")
def test_losses_of_one_response_equal_the_golden_ones(
    dtype: torch.dtype, response: dict[str, Any]
) -> None:
    logprobs, preserved, removed, old = (
        golden_tensor(name, response, dtype)
        for name in ("logprobs", "preserved_logprobs", "removed_logprobs", "old_logprobs")
    )
    advantage = torch.tensor([response["advantage"]], dtype=dtype)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    expect, tolerance = response["expect"], TOLERANCE[dtype]
    check(
        contrastive_perception_loss(logprobs, preserved, removed, mask),
        expect["contrastive_k3"],
        tolerance,
    )
    check(
        contrastive_perception_loss(logprobs, preserved, removed, mask, divergence="k1"),
        expect["contrastive_k1"],
        tolerance,
    )
    check(clipped_surrogate(logprobs, old, advantage), expect["clipped_surrogate"], tolerance)
    sequence = sequence_surrogate(logprobs, old, advantage, mask)
    check(sequence, [expect["gspo_surrogate"]] * logprobs.numel(), tolerance)


@every_dtype
def test_losses_of_the_padded_batch_equal_the_golden_ones(dtype: torch.dtype) -> None:
    logprobs, mask = golden_batch("logprobs", dtype)
    preserved, removed, old = (
        golden_batch(name, dtype)[0]
        for name in ("preserved_logprobs", "removed_logprobs", "old_logprobs")
    )
    responses = GOLDEN["responses"]
    advantages = torch.tensor([response["advantage"] for response in responses], dtype=dtype)
    per_token = {
        "contrastive_k3": contrastive_perception_loss(logprobs, preserved, removed, mask),
        "clipped_surrogate": clipped_surrogate(logprobs, old, advantages),
    }
    for key, losses in per_token.items():
        expected = [value for response in responses for value in response["expect"][key]]
        check(losses[mask], expected, TOLERANCE[dtype])
    sequence = aggregate(sequence_surrogate(logprobs, old, advantages, mask), mask, "sequence-mean")
    expected = [response["expect"]["gspo_surrogate"] for response in responses]
    check(sequence, [sum(expected) / len(expected)], TOLERANCE[dtype])


# --- laws of every loss -------------------------------------------------------------------------


def loss_and_gradients(
    loss: Loss, inputs: list[Tensor], advantages: Tensor, mask: Tensor, mode: Any
) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    total = aggregate(loss(*leaves, advantages, mask), mask, mode)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return total.detach(), list(gradients)


@every_mode
@every_loss
@settings(max_examples=8, deadline=None)
@given(seed=seeds)
def test_padding_moves_neither_value_nor_gradient(loss: Loss, mode: str, seed: int) -> None:
    B, T = 4, 6
    inputs, mask = random_logprobs(seed, B, T, 3), random_mask(seed, B, T)
    advantages = random_advantages(seed, B, T)
    value, gradients = loss_and_gradients(loss, inputs, advantages, mask, mode)
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed + 3)
    for _ in range(4):
        fills = [
            torch.tensor(FILLS, dtype=torch.float64)[
                torch.randint(len(FILLS), (B, T), generator=generator)
            ]
            for _ in range(4)
        ]
        filled = [
            torch.where(mask, tensor, fill)
            for tensor, fill in zip([*inputs, advantages], fills, strict=True)
        ]
        for dtype in (torch.float32, torch.float64):
            new_value, new_gradients = loss_and_gradients(
                loss, [tensor.to(dtype) for tensor in filled[:3]], filled[3].to(dtype), mask, mode
            )
            if dtype == torch.float64:
                assert torch.equal(new_value, value)
            assert new_value.isfinite()
            for gradient, new_gradient in zip(gradients, new_gradients, strict=True):
                assert (new_gradient[~mask] == 0).all()
                if dtype == torch.float64:
                    assert torch.equal(new_gradient, gradient)
                assert new_gradient.isfinite().all()


@every_mode
@every_loss
@settings(max_examples=10, deadline=None)
@given(seed=seeds, cuts=st.sets(st.integers(1, 6)))
def test_no_cut_into_micro_batches_moves_loss_or_gradient(
    loss: Loss, mode: Any, seed: int, cuts: set[int]
) -> None:
    B, T = 7, 5
    inputs, mask = random_logprobs(seed, B, T, 3), random_mask(seed, B, T)
    advantages = random_advantages(seed, B)
    whole, gradients = loss_and_gradients(loss, inputs, advantages, mask, mode)

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    edges = [0, *sorted(cuts), B]
    pieces = [slice(a, b) for a, b in pairwise(edges)]
    denominator = sum((count_units(mask[piece], mode) for piece in pieces), torch.tensor(0))
    total = torch.zeros(())
    for piece in pieces:
        per_token = loss(*(leaf[piece] for leaf in leaves), advantages[piece], mask[piece])
        part = aggregate(per_token, mask[piece], mode, denominator=denominator)
        part.backward(retain_graph=True)
        total = total + part.detach()
    torch.testing.assert_close(total, whole, atol=1e-12, rtol=1e-12, check_dtype=False)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        actual = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(actual, gradient, atol=1e-12, rtol=1e-12)


@every_loss
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_permuting_responses_permutes_the_losses(loss: Loss, seed: int) -> None:
    inputs, mask = random_logprobs(seed, 5, 4, 3), random_mask(seed, 5, 4)
    advantages = random_advantages(seed, 5)
    order = torch.randperm(
        5, generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    )
    losses = loss(*inputs, advantages, mask)
    permuted = loss(*(tensor[order] for tensor in inputs), advantages[order], mask[order])
    torch.testing.assert_close(permuted, losses[order], atol=1e-12, rtol=1e-12)


# A spread of 0.3 keeps log ratios clear of the clamps; the sequence surrogate stops a gradient by
# design and is held against its direct formula below.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sequence_surrogate"])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_the_finite_differences(name: str, seed: int) -> None:
    leaves = [tensor.requires_grad_() for tensor in random_logprobs(seed, 3, 3, 3, spread=0.3)]
    mask, advantages = random_mask(seed, 3, 3), random_advantages(seed, 3)
    assert torch.autograd.gradcheck(lambda *views: LOSSES[name](*views, advantages, mask), leaves)


@every_loss
@every_mode
def test_an_empty_mask_gives_zero_with_zero_gradient(loss: Loss, mode: str) -> None:
    inputs = [torch.full((2, 3), math.nan) for _ in range(3)]
    mask = torch.zeros(2, 3, dtype=torch.bool)
    value, gradients = loss_and_gradients(loss, inputs, torch.ones(2), mask, mode)
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


@every_loss
def test_bfloat16_inputs_are_computed_in_float32(loss: Loss) -> None:
    narrow = [tensor.bfloat16() for tensor in random_logprobs(0, 4, 6, 3)]
    mask, advantages = random_mask(0, 4, 6), random_advantages(0, 4).bfloat16()
    losses = loss(*narrow, advantages, mask)
    assert losses.dtype == torch.float32
    assert torch.equal(
        losses, loss(*(tensor.float() for tensor in narrow), advantages.float(), mask)
    )


@every_loss
def test_losses_refuse_shapes_that_differ(loss: Loss) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        loss(x, torch.zeros(2, 4), x, torch.zeros(2), x.bool())


# --- divergence ---------------------------------------------------------------------------------


def test_divergence_of_a_doubled_and_a_halved_probability() -> None:
    logprobs = torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64)
    other = logprobs + torch.tensor([[0.0, math.log(2), -math.log(2)]], dtype=torch.float64)
    check(divergence(logprobs, other, "k3"), [0, 1 - math.log(2), math.log(2) - 0.5], 1e-12)
    check(divergence(logprobs, other, "k1"), [0, -math.log(2), math.log(2)], 1e-12)


@pytest.mark.parametrize(
    ("kind", "d", "value"),
    [
        ("k3", 2.7, 10.0),
        ("k3", -11.1, 10.0),
        ("k3", 25.0, 10.0),
        ("k3", -25.0, 10.0),
        ("k1", 10.5, -10.0),
        ("k1", -10.5, 10.0),
        ("k1", 30.0, -10.0),
    ],
)
def test_divergence_is_constant_where_a_clamp_binds(kind: Any, d: float, value: float) -> None:
    logprobs = torch.tensor([[-0.5]], requires_grad=True)
    other = torch.tensor([[-0.5 + d]], requires_grad=True)
    estimate = divergence(logprobs, other, kind)
    assert estimate.item() == value
    assert [g.item() for g in torch.autograd.grad(estimate, [logprobs, other])] == [0, 0]


@pytest.mark.parametrize("d", [2.6, -10.9])
def test_k3_still_has_its_gradient_just_inside_the_clamp(d: float) -> None:
    other = torch.tensor([[d]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(divergence(torch.zeros_like(other), other), other)
    check(gradient, [math.exp(d) - 1], 1e-12)


@laws
@given(exponent=st.floats(-3, 0), sign=st.sampled_from([-1, 1]))
def test_k3_of_close_policies_keeps_its_digits_in_float32(exponent: float, sign: int) -> None:
    d = torch.tensor([[sign * 10**exponent]])
    exact = math.exp(d.item()) - d.item() - 1
    assert divergence(torch.zeros_like(d), d).item() == pytest.approx(exact, rel=1e-3)


# --- contrastive perception loss ----------------------------------------------------------------


def test_contrastive_loss_of_a_hand_worked_token() -> None:
    # k3 to I+ is 1 - ln 2, to I- 1/2 + ... : p+ = 2p, p- = p/2, margin = (3/2 - 2 ln 2) / tau.
    logprobs = torch.tensor([[-1.0]], dtype=torch.float64)
    loss = contrastive_perception_loss(
        logprobs,
        logprobs + math.log(2),
        logprobs - math.log(2),
        torch.tensor([[True]]),
        temperature=0.5,
    )
    margin = (1.5 - 2 * math.log(2)) / 0.5
    check(loss, [math.log(1 + math.exp(margin))], 1e-12)


def test_equal_views_cost_log_two_at_any_temperature() -> None:
    x = torch.full((1, 2), -0.7, dtype=torch.float64)
    loss = contrastive_perception_loss(x, x, x, torch.ones(1, 2, dtype=torch.bool), temperature=3)
    check(loss, [math.log(2)] * 2, 1e-12)


@laws
@given(seed=seeds, temperature=st.sampled_from([0.1, 1.0, 5.0]))
def test_contrastive_gradients_are_the_hand_derived_ones(seed: int, temperature: float) -> None:
    views = random_logprobs(seed, 2, 5, 3, spread=0.3)
    mask = random_mask(seed, 2, 5)
    leaves = [view.clone().requires_grad_() for view in views]
    loss = contrastive_perception_loss(*leaves, mask, temperature=temperature)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    logprobs, preserved, removed = views
    ratio_plus, ratio_minus = (preserved - logprobs).exp(), (removed - logprobs).exp()
    margin = (divergence(logprobs, preserved) - divergence(logprobs, removed)) / temperature
    outer = torch.where(mask, margin.sigmoid() / temperature, 0.0)
    expected = [ratio_minus - ratio_plus, ratio_plus - 1, 1 - ratio_minus]
    for gradient, inner in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, outer * inner, atol=1e-12, rtol=1e-9)


@laws
@given(seed=seeds)
def test_under_k1_the_original_view_cancels(seed: int) -> None:
    views = random_logprobs(seed, 2, 5, 3)
    mask = torch.ones(2, 5, dtype=torch.bool)
    logprobs, preserved, removed = (view.clone().requires_grad_() for view in views)
    loss = contrastive_perception_loss(logprobs, preserved, removed, mask, divergence="k1")
    expected = softplus((removed - preserved) / 0.1, threshold=1000)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-9)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_contrastive_loss_is_zero_outside_its_mask() -> None:
    x, y, z = random_logprobs(3, 2, 4, 3)
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    loss = contrastive_perception_loss(x, y, z, mask)
    assert (loss[~mask] == 0).all()
    assert (loss[mask] > 0).all()


def test_softplus_is_not_cut_at_large_margins() -> None:
    x = torch.zeros(1, 1, dtype=torch.float64)
    loss = contrastive_perception_loss(x, x - 2.1, x, x == 0, temperature=0.1, divergence="k1")
    assert loss.item() - 21 == pytest.approx(math.exp(-21), rel=1e-5)


def test_contrastive_gradient_stops_where_both_views_are_clamped() -> None:
    x = torch.zeros(1, 1, requires_grad=True)
    mask = torch.tensor([[True]])
    preserved, removed = torch.full((1, 1), 4.0), torch.full((1, 1), -30.0)
    loss = contrastive_perception_loss(x, preserved, removed, mask)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert x.grad is not None
    assert x.grad.item() == 0


# --- advantages ---------------------------------------------------------------------------------


def test_advantages_of_a_hand_worked_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    check(group_advantages(rewards, 4, normalize=False), [0, -1, -1, 2], 1e-12)
    check(
        group_advantages(rewards, 4, epsilon=0), [v / math.sqrt(2) for v in (0, -1, -1, 2)], 1e-12
    )
    check(group_advantages(rewards, 2, normalize=False), [0.5, -0.5, -1.5, 1.5], 1e-12)


def test_integer_rewards_are_welcome() -> None:
    advantages = group_advantages(torch.tensor([0, 1]), 2, normalize=False)
    assert advantages.tolist() == [-0.5, 0.5]


@every_dtype
@laws
@given(reward=st.floats(-100, 100), group_size=st.integers(2, 9), normalize=st.booleans())
def test_a_group_without_spread_has_exactly_zero_advantages(
    dtype: torch.dtype, reward: float, group_size: int, normalize: bool
) -> None:
    rewards = torch.full((2 * group_size,), reward, dtype=dtype)
    advantages = group_advantages(rewards, group_size, normalize=normalize)
    assert (advantages == 0).all()


@laws
@given(seed=seeds, scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_normalized_advantages_ignore_scale_and_shift_of_rewards(
    seed: int, scale: float, shift: float
) -> None:
    rewards = random_advantages(seed, 12)
    advantages = group_advantages(rewards, 4, epsilon=0)
    moved = group_advantages(rewards * scale + shift, 4, epsilon=0)
    torch.testing.assert_close(moved, advantages, atol=1e-7, rtol=1e-7)


@laws
@given(seed=seeds, normalize=st.booleans())
def test_permuting_a_group_permutes_its_advantages(seed: int, normalize: bool) -> None:
    rewards = random_advantages(seed, 2, 5)
    order = torch.randperm(
        5, generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    )
    advantages = group_advantages(rewards.flatten(), 5, normalize=normalize).view(2, 5)
    permuted = group_advantages(rewards[:, order].flatten(), 5, normalize=normalize).view(2, 5)
    torch.testing.assert_close(permuted, advantages[:, order], atol=1e-12, rtol=1e-12)


def test_groups_do_not_touch_one_another() -> None:
    rewards = random_advantages(0, 8)
    alone = group_advantages(rewards[4:], 4)
    torch.testing.assert_close(group_advantages(rewards, 4)[4:], alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "group_size", "message"),
    [((4,), 1, "at least 2"), ((5,), 2, "multiple of group_size=2"), ((2, 2), 2, r"\(N,\)")],
)
def test_advantages_refuse_groups_that_cannot_be_compared(
    shape: tuple[int, ...], group_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(shape), group_size)


# --- surrogates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: r A, and d(r A) / d log p is r A as well
        (1.5, 2.0, -2.4, 0.0),  # clipped above
        (0.5, 2.0, -1.0, -1.0),  # below, but the gain is smaller than the clip: kept
        (0.5, -2.0, 1.6, 0.0),  # clipped below
        (1.5, -2.0, 3.0, 3.0),  # a loss above the clip is kept
    ],
)
def test_clipped_surrogate_of_hand_worked_ratios(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    surrogate = clipped_surrogate(logprobs, old, torch.tensor([advantage], dtype=torch.float64))
    check(surrogate, [loss], 1e-12)
    check(torch.autograd.grad(surrogate, logprobs)[0], [slope], 1e-12)


def test_clip_bounds_may_differ() -> None:
    old, advantages = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    logprobs = torch.tensor([[1.0, -1.0]])
    surrogate = clipped_surrogate(logprobs, old, advantages, low=0.2, high=0.28)
    check(surrogate, [-1.28, 0.8], 1e-6)


@laws
@given(seed=seeds)
def test_one_advantage_a_response_is_the_same_for_each_of_its_tokens(seed: int) -> None:
    x, y = random_logprobs(seed, 3, 4, 2)
    advantages, mask = random_advantages(seed, 3), random_mask(seed, 3, 4)
    repeated = advantages[:, None].expand(3, 4)
    assert torch.equal(clipped_surrogate(x, y, advantages), clipped_surrogate(x, y, repeated))
    assert torch.equal(
        sequence_surrogate(x, y, advantages, mask), sequence_surrogate(x, y, repeated, mask)
    )


@every_loss
def test_a_bad_response_token_shows_in_the_loss(loss: Loss) -> None:
    inputs = random_logprobs(0, 2, 3, 3)
    inputs[0][1, 2] = math.nan
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert aggregate(loss(*inputs, torch.ones(2), mask), mask).isnan()


def test_a_bad_advantage_shows_in_the_loss() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    losses = clipped_surrogate(x, x, torch.tensor([1.0, math.nan]))
    assert losses[0].tolist() == [-1, -1, -1]
    assert aggregate(losses, mask).isnan()


def test_an_exploded_ratio_overflows_neither_value_nor_gradient() -> None:
    logprobs = torch.tensor([[500.0]], requires_grad=True)
    loss = clipped_surrogate(logprobs, torch.zeros(1, 1), torch.tensor([-1.0]))
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == 0


@pytest.mark.parametrize("spread", [1e-4, 0.3], ids=["inside the clip", "beyond it"])
@laws
@given(seed=seeds)
def test_sequence_surrogate_is_the_direct_formula_in_value_and_gradient(
    spread: float, seed: int
) -> None:
    B, T = 5, 6
    old, logprobs = random_logprobs(seed, B, T, 2, spread=spread)
    mask, advantages = random_mask(seed, B, T), random_advantages(seed, B)
    ours, direct = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()

    terms = []
    for b in range(B):
        if mask[b].any():
            ratio = (direct - old)[b, mask[b]].mean().exp()
            gain = torch.minimum(
                ratio * advantages[b], ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantages[b]
            )
            terms.append(-gain)
    if not terms:
        return
    expected = torch.stack(terms).mean()
    expected.backward()

    per_token = sequence_surrogate(ours, old, advantages, mask)
    loss = aggregate(per_token, mask, "sequence-mean")
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours.grad, direct.grad, atol=1e-12, rtol=1e-9)


def test_sequence_surrogate_is_zero_outside_its_mask() -> None:
    x, y = random_logprobs(0, 2, 4, 2)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    assert (sequence_surrogate(x, y, torch.ones(2), mask)[~mask] == 0).all()


@laws
@given(seed=seeds)
def test_on_one_token_responses_both_surrogates_agree(seed: int) -> None:
    x, y = random_logprobs(seed, 4, 1, 2)
    advantages, mask = random_advantages(seed, 4), torch.ones(4, 1, dtype=torch.bool)
    by_sequence = sequence_surrogate(x, y, advantages, mask, low=0.2, high=0.2)
    by_token = clipped_surrogate(x, y, advantages)
    torch.testing.assert_close(by_sequence, by_token, atol=1e-12, rtol=1e-12)


def test_surrogates_refuse_advantages_that_fit_neither_responses_nor_tokens() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\(3,\).*per response, \(2,\), or one per token"):
        clipped_surrogate(x, x, torch.zeros(3))


# --- aggregate ----------------------------------------------------------------------------------

PER_TOKEN = torch.tensor([[1.0, 3.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
KEPT = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(
    ("mode", "units", "value", "with_denominator_10"),
    [
        ("token-mean", 3, 8 / 3, 0.8),
        ("sequence-mean", 2, (2 + 4) / 2, 0.6),
        ("sequence-sum-norm", 2, (4 + 4) / 2, 0.8),
    ],
)
def test_aggregates_of_a_hand_worked_batch(
    mode: Any, units: int, value: float, with_denominator_10: float
) -> None:
    per_token, kept = PER_TOKEN.to(torch.get_default_device()), KEPT.to(torch.get_default_device())
    assert count_units(kept, mode) == units
    check(aggregate(per_token, kept, mode), [value], 1e-12)
    check(aggregate(per_token, kept, mode, denominator=10), [with_denominator_10], 1e-12)
    check(
        aggregate(per_token, kept, mode, denominator=torch.tensor(10)), [with_denominator_10], 1e-12
    )


@every_mode
@pytest.mark.parametrize("denominator", [None, 0, 7, torch.tensor(0)], ids=str)
def test_an_empty_mask_aggregates_to_zero_whatever_the_denominator(
    mode: Any, denominator: float | Tensor | None
) -> None:
    per_token = torch.full((2, 3), math.nan, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = aggregate(per_token, mask, mode, denominator=denominator)
    loss.backward()
    assert loss.item() == 0
    assert per_token.grad is not None
    assert (per_token.grad == 0).all()


@every_mode
@laws
@given(seed=seeds, extra=st.integers(1, 4), fill=st.sampled_from(FILLS))
def test_wider_padding_does_not_move_an_aggregate(
    mode: Any, seed: int, extra: int, fill: float
) -> None:
    per_token, mask = random_advantages(seed, 3, 5), random_mask(seed, 3, 5)
    wider = torch.nn.functional.pad(per_token, (0, extra), value=fill)
    wider_mask = torch.nn.functional.pad(mask, (0, extra), value=False)
    torch.testing.assert_close(
        aggregate(wider, wider_mask, mode), aggregate(per_token, mask, mode), atol=1e-12, rtol=1e-12
    )


@every_mode
@laws
@given(seed=seeds)
def test_permuting_responses_does_not_move_an_aggregate(mode: Any, seed: int) -> None:
    per_token, mask = random_advantages(seed, 6, 4), random_mask(seed, 6, 4)
    order = torch.randperm(
        6, generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    )
    torch.testing.assert_close(
        aggregate(per_token[order], mask[order], mode),
        aggregate(per_token, mask, mode),
        atol=1e-12,
        rtol=1e-12,
    )


@every_mode
def test_a_mask_of_numbers_is_read_as_booleans(mode: Any) -> None:
    assert aggregate(PER_TOKEN, KEPT.long(), mode) == aggregate(PER_TOKEN, KEPT, mode)


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: divergence(x, x, "k2"), "kind='k2' is unknown: choose one of k3, k1"),
        (
            lambda x, m: contrastive_perception_loss(x, x, x, m, divergence="kl"),
            "divergence='kl' is unknown: choose one of k3, k1",
        ),
        (
            lambda x, m: contrastive_perception_loss(x, x, x, m, temperature=0),
            "temperature=0 must be positive",
        ),
        (
            lambda x, m: aggregate(x, m, "mean"),
            "mode='mean' is unknown: choose one of token-mean, sequence-mean, sequence-sum-norm",
        ),
        (lambda x, m: aggregate(x, m[:1], "token-mean"), r"per_token \(2, 3\), mask \(1, 3\)"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(
    call: Callable[[Tensor, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
