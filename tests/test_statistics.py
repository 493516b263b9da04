"""Laws of the chunked log-probability and entropy. T tokens, V vocabulary, D hidden size."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cppo.statistics
from cppo.statistics import chunked_token_statistics, token_divergence, token_statistics

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("tensors_on_device")]
seeds = st.integers(0, 2**31 - 1)


def set_block(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(cppo.statistics, "VOCABULARY_BLOCK", size)
    monkeypatch.setattr(cppo.statistics, "VOCABULARY_BLOCK_ON_CPU", size)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several vocabulary blocks, the last one cut short, at sizes a test can afford."""
    set_block(monkeypatch, 7)


def random_inputs(
    seed: int, T: int, V: int, D: int, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    hidden_TD = torch.randn(T, D, generator=generator, dtype=torch.float64) * scale
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(0, V, (T,), generator=generator)
    return hidden_TD.to(dtype), weight_VD.to(dtype), targets_T


def materialised(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The plain way, with all logits at once, in the dtype of the inputs."""
    logprobs_TV = (hidden_TD @ weight_VD.T / temperature).log_softmax(-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return logprobs_TV.gather(1, targets_T[:, None])[:, 0], entropy_T


def results_and_gradients(function: Any, hidden_TD: Tensor, weight_VD: Tensor, *args: Any) -> Any:
    """Log-probability, entropy, and the gradients of a loss that weighs both unevenly."""
    hidden_TD, weight_VD = (x.detach().clone().requires_grad_() for x in (hidden_TD, weight_VD))
    logprobs_T, entropy_T = function(hidden_TD, weight_VD, *args)
    ramp_T = torch.linspace(-1, 2, len(hidden_TD), dtype=logprobs_T.dtype)
    loss = (ramp_T * logprobs_T).sum() + (ramp_T.flip(0) * entropy_T).sum()
    gradients = torch.autograd.grad(loss, [hidden_TD, weight_VD])
    return [logprobs_T.detach(), entropy_T.detach(), *gradients]


def largest_error(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth).abs().max().item()


def test_both_names_are_one_function() -> None:
    assert token_statistics is chunked_token_statistics


def test_statistics_of_a_hand_worked_token() -> None:
    # Logits 0, ln 2, ln 5 give probabilities 1/8, 2/8, 5/8.
    hidden_TD = torch.tensor([[1.0]], dtype=torch.float64)
    weight_VD = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    logprobs_T, entropy_T = token_statistics(hidden_TD, weight_VD, torch.tensor([1]))
    assert logprobs_T.item() == pytest.approx(math.log(1 / 4), abs=1e-14)
    entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert entropy_T.item() == pytest.approx(entropy, abs=1e-14)


def test_equal_logits_have_the_entropy_of_the_uniform() -> None:
    logprobs_T, entropy_T = token_statistics(
        torch.zeros(3, 4), torch.ones(20_000, 4), torch.tensor([0, 9_000, 19_999])
    )
    torch.testing.assert_close(entropy_T, torch.full((3,), math.log(20_000)))
    torch.testing.assert_close(logprobs_T, -torch.full((3,), math.log(20_000)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
@settings(max_examples=10, deadline=None)
@given(seed=seeds, chunk_tokens=st.integers(1, 12))
def test_float64_equals_the_materialised_truth(
    temperature: float, seed: int, chunk_tokens: int
) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(seed, 9, 25, 5)

    def chunked(*args: Tensor) -> tuple[Tensor, Tensor]:
        return token_statistics(*args, temperature=temperature, chunk_tokens=chunk_tokens)

    actual = results_and_gradients(chunked, hidden_TD, weight_VD, targets_T)
    truth = results_and_gradients(materialised, hidden_TD, weight_VD, targets_T, temperature)
    for a, b in zip(actual, truth, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_gradients_are_the_finite_differences(trained: tuple[bool, bool]) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(0, 5, 16, 3)
    hidden_TD.requires_grad_(trained[0])
    weight_VD.requires_grad_(trained[1])
    assert torch.autograd.gradcheck(
        lambda h, w: token_statistics(h, w, targets_T, temperature=0.7, chunk_tokens=2),
        (hidden_TD, weight_VD),
    )


@pytest.mark.parametrize("scale", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("V", [500, 20_000])
def test_float32_errs_no_more_than_the_materialised_float32(scale: float, V: int) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(1, 33, V, 16, torch.float32, scale)

    def chunked(*args: Tensor) -> tuple[Tensor, Tensor]:
        return token_statistics(*args, chunk_tokens=10)

    truth = results_and_gradients(materialised, hidden_TD.double(), weight_VD.double(), targets_T)
    plain = results_and_gradients(materialised, hidden_TD, weight_VD, targets_T)
    actual = results_and_gradients(chunked, hidden_TD, weight_VD, targets_T)
    for a, p, t in zip(actual, plain, truth, strict=True):
        assert a.dtype == torch.float32
        assert largest_error(a, t) <= largest_error(p, t) + 1e-6 * (1 + t.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_are_as_exact_as_float32_ones(autocast: bool) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(2, 17, 9_000, 32, torch.bfloat16)
    truth = results_and_gradients(materialised, hidden_TD.double(), weight_VD.double(), targets_T)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = results_and_gradients(token_statistics, hidden_TD, weight_VD, targets_T)
    for a, t in zip(actual[:2], truth[:2], strict=True):
        assert a.dtype == torch.float32
        assert largest_error(a, t) <= 1e-5
    for a, t in zip(actual[2:], truth[2:], strict=True):
        assert a.dtype == torch.bfloat16
        # Exact up to the one rounding to bfloat16 at the end.
        torch.testing.assert_close(a.double(), t, atol=1e-5, rtol=2**-8)


def test_autocast_does_not_round_float32_logits() -> None:
    inputs = random_inputs(3, 8, 50, 16, torch.float32)
    expected = results_and_gradients(token_statistics, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results_and_gradients(token_statistics, *inputs)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=15, deadline=None)
@given(seed=seeds, chunk_tokens=st.integers(1, 40))
def test_the_chunk_size_moves_nothing(seed: int, chunk_tokens: int) -> None:
    inputs = random_inputs(seed, 23, 30, 4)
    whole = results_and_gradients(token_statistics, *inputs)
    cut = results_and_gradients(
        lambda *args: token_statistics(*args, chunk_tokens=chunk_tokens), *inputs
    )
    for a, b in zip(cut, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_permuting_tokens_permutes_their_statistics(seed: int) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(seed, 12, 20, 4)
    order = torch.randperm(
        12, generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    )
    straight = token_statistics(hidden_TD, weight_VD, targets_T)
    permuted = token_statistics(hidden_TD[order], weight_VD, targets_T[order])
    for a, b in zip(permuted, straight, strict=True):
        torch.testing.assert_close(a, b[order], atol=1e-12, rtol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, temperature=st.floats(0.1, 10))
def test_temperature_is_a_division_of_the_logits(seed: int, temperature: float) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(seed, 6, 20, 4)
    actual = token_statistics(hidden_TD, weight_VD, targets_T, temperature=temperature)
    expected = token_statistics(hidden_TD / temperature, weight_VD, targets_T)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_give_numbers_of_the_right_sign(dtype: torch.dtype, scale: float) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(4, 20, 40, 8, dtype, scale)
    actual = results_and_gradients(token_statistics, hidden_TD, weight_VD, targets_T)
    assert all(tensor.isfinite().all() for tensor in actual)
    assert (actual[0] <= 0).all()
    assert (actual[1] >= 0).all()
    assert (actual[1] <= math.log(40) + 1e-6).all()


def test_a_certain_token_keeps_its_precision_beside_large_logits() -> None:
    # Logits 5000 and 5000 - 3: the plain lse - sum(p z) would lose the entropy to rounding at 5000.
    weight_VD = torch.tensor([[5000.0], [4997.0], [-5000.0]])
    logprobs_T, entropy_T = token_statistics(torch.ones(1, 1), weight_VD, torch.tensor([0]))
    p = 1 / (1 + math.exp(-3))
    assert logprobs_T.item() == pytest.approx(math.log(p), rel=1e-5)
    assert entropy_T.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-5)


def test_no_tokens_give_empty_results_and_zero_gradients() -> None:
    logprobs_T, entropy_T, *gradients = results_and_gradients(
        token_statistics, torch.zeros(0, 4), torch.ones(9, 4), torch.zeros(0, dtype=torch.long)
    )
    assert logprobs_T.shape == entropy_T.shape == (0,)
    assert gradients[0].shape == (0, 4)
    assert (gradients[1] == 0).all()


@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e30])
def test_tokens_left_out_of_the_loss_move_no_gradient(fill: float) -> None:
    kept_T = torch.tensor([True, True, False, True, False])
    inputs = random_inputs(5, 5, 12, 3)

    def gradients(hidden_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, ...]:
        hidden_TD, weight_VD = hidden_TD.clone().requires_grad_(), inputs[1].clone()
        weight_VD.requires_grad_()
        logprobs_T, entropy_T = token_statistics(hidden_TD, weight_VD, targets_T)
        loss = torch.where(kept_T, logprobs_T + entropy_T, 0.0).sum()
        return torch.autograd.grad(loss, [hidden_TD, weight_VD])

    filled_TD = torch.where(kept_T[:, None], inputs[0], fill)
    filled_targets_T = torch.where(kept_T, inputs[2], -100)
    for a, b in zip(
        gradients(filled_TD, filled_targets_T), gradients(inputs[0], inputs[2]), strict=True
    ):
        assert torch.equal(a, b)


def test_a_target_outside_the_vocabulary_is_nan_beside_its_entropy() -> None:
    hidden_TD, weight_VD, _ = random_inputs(6, 3, 12, 3)
    logprobs_T, entropy_T = token_statistics(hidden_TD, weight_VD, torch.tensor([-100, 3, 12]))
    assert logprobs_T.isnan().tolist() == [True, False, True]
    assert entropy_T.isfinite().all()


@pytest.mark.parametrize("output", [0, 1], ids=["log-probability", "entropy"])
def test_one_output_alone_can_be_trained(output: int) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(7, 6, 15, 4)
    hidden_TD.requires_grad_()
    actual = torch.autograd.grad(
        token_statistics(hidden_TD, weight_VD, targets_T)[output].sum(), hidden_TD
    )
    expected = torch.autograd.grad(
        materialised(hidden_TD, weight_VD, targets_T)[output].sum(), hidden_TD
    )
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


class LargestFloat32(TorchDispatchMode):
    """Notes the size of the largest float32 tensor that any operation allocates, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views of an input are no allocation.
        inputs = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if torch.is_tensor(leaf)
        }
        for leaf in tree_leaves(result):
            if (
                torch.is_tensor(leaf)
                and leaf.dtype == torch.float32
                and leaf.untyped_storage().data_ptr() not in inputs
            ):
                self.elements = max(self.elements, leaf.numel())
        return result


def largest_allocation(T: int, V: int, D: int, chunk_tokens: int, train_weight: bool) -> int:
    hidden_TD, weight_VD, targets_T = random_inputs(8, T, V, D, torch.bfloat16)
    hidden_TD.requires_grad_()
    weight_VD.requires_grad_(train_weight)
    with LargestFloat32() as largest:
        logprobs_T, entropy_T = token_statistics(
            hidden_TD, weight_VD, targets_T, chunk_tokens=chunk_tokens
        )
        (logprobs_T.sum() + entropy_T.sum()).backward()
    return largest.elements


@pytest.mark.parametrize("train_weight", [True, False])
def test_no_allocation_grows_with_the_vocabulary_or_with_tokens_times_it(
    train_weight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, chunk_tokens, D = 128, 32, 16
    set_block(monkeypatch, block)
    for T, V in ((64, 512), (256, 512), (64, 1024), (256, 1024)):
        # Neither the logits nor a float32 copy of the weight, (V, D), or of its gradient.
        limit = max(chunk_tokens * block, T * D)
        assert limit < V * D
        assert largest_allocation(T, V, D, chunk_tokens, train_weight) <= limit


def test_the_largest_allocation_is_seen_where_logits_are_whole() -> None:
    with LargestFloat32() as largest:
        materialised(*random_inputs(8, 64, 128, 4, torch.float32))
    assert largest.elements == 64 * 128


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3), (5, 3), (3,)), {}, r"hidden_TD \(2, 3\) and targets_T \(3,\) do not fit"),
        (((2, 2, 3), (5, 3), (2,)), {}, r"pass \(T, D\) and \(T,\)"),
        (((2, 3), (5, 4), (2,)), {}, r"weight_VD \(5, 4\) does not fit"),
        (((2, 3), (5, 3), (2,)), {"temperature": 0.0}, "temperature=0.0 must be positive"),
        (((2, 3), (5, 3), (2,)), {"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
    ],
)
def test_errors_say_what_was_given_and_what_to_pass(
    shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], message: str
) -> None:
    hidden, weight, targets = shapes
    with pytest.raises(ValueError, match=message):
        token_statistics(
            torch.zeros(hidden),
            torch.zeros(weight),
            torch.zeros(targets, dtype=torch.long),
            **options,
        )


# --- divergence over the whole vocabulary --------------------------------------------------------


def materialised_divergence(hidden_TD: Tensor, other_TD: Tensor, weight_VD: Tensor) -> Tensor:
    logprobs_TV, others_TV = ((x @ weight_VD.T).log_softmax(-1) for x in (hidden_TD, other_TD))
    return (logprobs_TV.exp() * (logprobs_TV - others_TV)).sum(-1)


def divergence_and_gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    divergence_T = function(*leaves)
    ramp_T = torch.linspace(-1, 2, len(divergence_T), dtype=divergence_T.dtype)
    return [divergence_T.detach(), *torch.autograd.grad((ramp_T * divergence_T).sum(), leaves)]


def two_views(seed: int, T: int, V: int, D: int, dtype: torch.dtype, scale: float = 1.0) -> Any:
    hidden_TD, weight_VD, _ = random_inputs(seed, T, V, D, dtype, scale)
    other_TD, _, _ = random_inputs(seed + 1, T, V, D, dtype, scale)
    return hidden_TD, hidden_TD + 0.3 * other_TD, weight_VD


def test_divergence_of_a_hand_worked_token() -> None:
    # Probabilities 1/8, 2/8, 5/8 against 1/3 each.
    hidden_TD, weight_VD = torch.eye(1).double(), torch.tensor([[1.0], [2.0], [5.0]]).double().log()
    found_T = token_divergence(hidden_TD, torch.zeros(1, 1).double(), weight_VD)
    expected = sum(p * math.log(3 * p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert found_T.item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=10, deadline=None)
@given(seed=seeds, chunk_tokens=st.integers(1, 12))
def test_divergence_in_float64_equals_the_materialised_truth(seed: int, chunk_tokens: int) -> None:
    inputs = two_views(seed, 9, 25, 5, torch.float64)
    actual = divergence_and_gradients(
        lambda *args: token_divergence(*args, chunk_tokens=chunk_tokens), *inputs
    )
    for a, t in zip(
        actual, divergence_and_gradients(materialised_divergence, *inputs), strict=True
    ):
        torch.testing.assert_close(a, t, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, True)])
def test_gradients_of_divergence_are_the_finite_differences(trained: tuple[bool, ...]) -> None:
    inputs = two_views(0, 4, 16, 3, torch.float64)
    for tensor, wanted in zip(inputs, trained, strict=True):
        tensor.requires_grad_(wanted)
    assert torch.autograd.gradcheck(
        lambda *args: token_divergence(*args, temperature=0.7, chunk_tokens=2), inputs
    )


@pytest.mark.parametrize("scale", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divergence_errs_no_more_than_the_materialised_float32(
    scale: float, dtype: torch.dtype
) -> None:
    inputs = two_views(1, 33, 9_000, 16, dtype, scale)
    truth = divergence_and_gradients(materialised_divergence, *(x.double() for x in inputs))
    plain = divergence_and_gradients(materialised_divergence, *(x.float() for x in inputs))
    actual = divergence_and_gradients(token_divergence, *inputs)
    rounding = 0 if dtype == torch.float32 else 2**-8  # of gradients, to their inputs' type
    for number, (a, p, t) in enumerate(zip(actual, plain, truth, strict=True)):
        largest = t.abs().max().item()
        tolerance = 1e-6 * (1 + largest) + (rounding * largest if number else 0)
        assert largest_error(a, t) <= largest_error(p, t) + tolerance


def test_divergence_is_zero_between_equals_and_left_out_tokens_move_no_gradient() -> None:
    hidden_TD, other_TD, weight_VD = two_views(3, 5, 12, 3, torch.float64)
    assert token_divergence(hidden_TD, hidden_TD, weight_VD).abs().max() < 1e-14
    kept_T = torch.tensor([True, True, False, True, False])

    def gradients(fill: float) -> tuple[Tensor, ...]:
        leaves = [torch.where(kept_T[:, None], x, fill) for x in (hidden_TD, other_TD)]
        leaves = [leaf.requires_grad_() for leaf in [*leaves, weight_VD.clone()]]
        loss = torch.where(kept_T, token_divergence(*leaves), 0.0).sum()
        return torch.autograd.grad(loss, leaves)

    for a, b in zip(gradients(math.nan), gradients(0.0), strict=True):
        assert torch.equal(a, b)


def test_divergence_of_unequal_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"other_TD \(3, 3\) do not fit: pass \(T, D\) twice"):
        token_divergence(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(5, 3))
