"""Laws of the token statistics in Triton, whose kernels are interpreted here, on the CPU.

T tokens, V vocabulary, D hidden size. What a device makes of the kernels, tests/test_device.py and
the doctor see.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import cppo_triton.trial
import pytest
import torch
from conftest import skip_or_fail
from cppo_triton import Tiling, token_statistics_for
from torch import Tensor

from cppo.statistics import chunked_token_statistics

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
SMALL = Tiling(rows=32, columns=64, depth=32, warps=4, stages=2)
# Relative rounding of a gradient: of logit gradients and at the end. bfloat16: the interpreter cuts
# the surplus bits off, which on average errs twice as much as rounding does, and to one side.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-11}

Function = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, under an interpreter that multiplies bfloat16 numbers, not their bit patterns
    (triton-lang/triton#11584)."""
    if find_spec("triton") is None:
        skip_or_fail("triton is not installed")
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widen(operand: Any) -> Any:
        if operand.dtype != tl.bfloat16 or operand.data.dtype != np.uint16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, left: Any, right: Any, *others: Any) -> Any:
        return multiply(self, widen(left), widen(right), *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    import cppo_triton.token_statistics as module

    return module


@pytest.fixture
def fused(interpreted: Any) -> Function:
    """In small tiles, and 192 vocabulary entries a block."""
    return partial(
        interpreted.token_statistics, tiling=SMALL, device="cpu", dtypes=SIXTEEN_BITS, block=192
    )


@pytest.fixture
def launched(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Each kernel that is started, by name, with its first matrix."""
    launches: list[tuple[str, Any]] = []
    launch = interpreted._launch

    def note(
        kernel: Any, programs: int, tiling: Tiling, arguments: Sequence[Any], **options: Any
    ) -> None:
        launches.append((kernel.fn.__name__, arguments[0]))
        launch(kernel, programs, tiling, arguments, **options)

    monkeypatch.setattr(interpreted, "_launch", note)
    return launches


def random_inputs(
    seed: int, T: int, V: int, D: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(T, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator) * D**-0.5
    targets_T = torch.randint(0, V, (T,), generator=generator)
    return hidden_TD.to(dtype), weight_VD.to(dtype), targets_T


def results_and_gradients(
    function: Function,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    kept_T: Tensor | None = None,
    scale: float = 1.0,
    **options: Any,
) -> list[Tensor]:
    """Log-probability, entropy, and the gradients of a loss that weighs both unevenly, of the kept
    tokens alone."""
    inputs = [x.detach().clone().requires_grad_() for x in (hidden_TD, weight_VD)]
    logprobs_T, entropy_T = function(*inputs, targets_T, **options)
    ramp_T = torch.linspace(-1, 2, len(hidden_TD), dtype=logprobs_T.dtype) * scale
    per_token_T = ramp_T * logprobs_T + ramp_T.flip(0) * entropy_T
    if kept_T is not None:
        per_token_T = torch.where(kept_T, per_token_T, 0.0)
    gradients = torch.autograd.grad(per_token_T.sum(), inputs)
    return [logprobs_T.detach(), entropy_T.detach(), *gradients]


def relative_error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(
    ("T", "V", "D", "temperature"),
    [
        (37, 301, 40, 0.7),  # nothing is a multiple of a tile; two blocks, the last cut short
        (1, 1200, 72, 1.0),  # two splits, seven blocks
        (32, 64, 32, 2.0),  # one tile
        (65, 7, 8, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_it_errs_no_more_than_float32_logits_but_for_rounding_gradients(
    fused: Function, dtype: torch.dtype, T: int, V: int, D: int, temperature: float
) -> None:
    inputs = random_inputs(0, T, V, D, dtype)
    wide = [tensor.double() for tensor in inputs[:2]]
    truth = results_and_gradients(
        chunked_token_statistics, *wide, inputs[2], temperature=temperature
    )
    plain = results_and_gradients(
        chunked_token_statistics, *(x.float() for x in wide), inputs[2], temperature=temperature
    )
    actual = results_and_gradients(fused, *inputs, temperature=temperature)
    for a, p, t in zip(actual[:2], plain[:2], truth[:2], strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, t) <= relative_error(p, t) + 1e-6
    for a, t in zip(actual[2:], truth[2:], strict=True):
        assert a.dtype == dtype
        assert relative_error(a, t) <= ROUNDING[dtype]


def test_it_runs_through_the_kernels(fused: Function, launched: list[tuple[str, Any]]) -> None:
    results_and_gradients(fused, *random_inputs(0, 5, 301, 8, torch.float16))
    block = ["differentiate_logits", "multiply", "multiply"]
    assert [name for name, _ in launched] == ["reduce_logits", *block, *block]


def test_how_the_vocabulary_is_cut_moves_gradients_by_rounding_alone(fused: Function) -> None:
    inputs = random_inputs(1, 20, 301, 40, torch.float16)
    cut = results_and_gradients(partial(fused, block=64), *inputs)
    whole = results_and_gradients(partial(fused, block=304), *inputs)
    for a, b in zip(cut[:2], whole[:2], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(cut[3], whole[3])  # each row of the weight's gradient is one product
    torch.testing.assert_close(cut[2], whole[2], atol=1e-6, rtol=2**-10)


@pytest.mark.parametrize("trained", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_a_frozen_input_costs_no_product_and_leaves_the_others_gradient(
    fused: Function, launched: list[tuple[str, Any]], trained: tuple[bool, bool]
) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(2, 9, 301, 40, torch.float16)

    def gradient(*needed: bool) -> tuple[Tensor, ...]:
        inputs = [x.clone() for x in (hidden_TD, weight_VD)]
        asked = [x.requires_grad_() for x, wanted in zip(inputs, needed, strict=True) if wanted]
        logprobs_T, entropy_T = fused(*inputs, targets_T)
        return torch.autograd.grad((logprobs_T + 2 * entropy_T).sum(), asked)

    both = gradient(True, True)
    launched.clear()
    [alone] = gradient(*trained)
    assert torch.equal(alone, both[trained.index(True)])
    assert [name for name, _ in launched].count("multiply") == 2  # one a block


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, 1e4])
def test_tokens_left_out_of_the_loss_cost_nothing_and_move_no_gradient(
    fused: Function, launched: list[tuple[str, Any]], fill: float
) -> None:
    kept_T = torch.tensor([True, True, False, True, False, False])
    inputs = random_inputs(3, 6, 301, 40, torch.float16)
    filled_TD = torch.where(kept_T[:, None], inputs[0], fill)
    filled_targets_T = torch.where(kept_T, inputs[2], -100)
    expected = results_and_gradients(fused, *inputs, kept_T=kept_T)
    launched.clear()
    actual = results_and_gradients(fused, filled_TD, inputs[1], filled_targets_T, kept_T=kept_T)
    for a, b in zip(actual[2:], expected[2:], strict=True):
        assert torch.equal(a, b)
    assert (actual[2][~kept_T] == 0).all()
    forward, *backward = [len(first) for _, first in launched]
    assert forward == 6
    assert set(backward) == {3}


def test_a_loss_of_no_tokens_has_gradients_of_zero_and_no_backward_work(
    fused: Function, launched: list[tuple[str, Any]]
) -> None:
    inputs = random_inputs(4, 3, 301, 8, torch.float16)
    nothing_T = torch.zeros(3, dtype=torch.bool)
    _, _, *gradients = results_and_gradients(fused, *inputs, kept_T=nothing_T)
    assert all((gradient == 0).all() for gradient in gradients)
    assert [name for name, _ in launched] == ["reduce_logits"]


def test_a_token_that_holds_nan_leaves_the_others_statistics(fused: Function) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(5, 4, 301, 8, torch.float16)
    expected = fused(hidden_TD, weight_VD, targets_T)
    hidden_TD[2] = torch.nan
    for a, b in zip(fused(hidden_TD, weight_VD, targets_T), expected, strict=True):
        assert a.isnan().tolist() == [False, False, True, False]
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])


def test_a_target_outside_the_vocabulary_is_nan_beside_its_entropy(fused: Function) -> None:
    hidden_TD, weight_VD, _ = random_inputs(6, 4, 301, 8, torch.float16)
    targets_T = torch.tensor([-100, 300, 301, 2**32 + 5])  # the last is 5 in 32 bits
    logprobs_T, entropy_T = fused(hidden_TD, weight_VD, targets_T)
    assert logprobs_T.isnan().tolist() == [True, False, True, True]
    assert entropy_T.isfinite().all()


@pytest.mark.parametrize("scale", [2.0**-18, 2.0**6])
def test_the_weights_gradient_scales_with_a_loss_that_float16_hardly_resolves(
    fused: Function, scale: float
) -> None:
    # At 2^-18 a logit's gradient has six bits in float16; hidden states of 64 lift the product.
    hidden_TD, weight_VD, targets_T = random_inputs(7, 30, 301, 8, torch.float16)
    inputs = (64 * hidden_TD, weight_VD / 64, targets_T)
    expected = results_and_gradients(fused, *inputs)[3].double()
    actual = results_and_gradients(fused, *inputs, scale=scale)[3].double()
    assert relative_error(actual / scale, expected) <= 1e-3


def test_large_logits_give_numbers_of_the_right_sign(fused: Function) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(8, 20, 200, 8, torch.float16)
    actual = results_and_gradients(fused, hidden_TD * 1000, weight_VD, targets_T)
    assert all(tensor.isfinite().all() for tensor in actual)
    assert (actual[0] <= 0).all()
    assert (actual[1] >= 0).all()


# ---------------------------------------------------------------- what the kernels do not serve


def as_they_are(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return hidden, weight


@pytest.mark.parametrize(
    ("D", "change"),
    [
        (8, lambda hidden, weight: (hidden.float(), weight.float())),
        (8, lambda hidden, weight: (hidden.double(), weight.double())),
        (8, lambda hidden, weight: (hidden, weight.float())),
        (8, lambda hidden, weight: (hidden, weight.T.contiguous().T)),
        (8, lambda hidden, weight: (hidden[:0], weight)),
        (12, as_they_are),
    ],
    ids=["float32", "float64", "two types", "transposed", "no tokens", "D not a multiple of 8"],
)
def test_what_the_kernels_do_not_serve_is_chunked(
    fused: Function, launched: list[tuple[str, Any]], D: int, change: Any
) -> None:
    hidden_TD, weight_VD, targets_T = random_inputs(9, 5, 30, D, torch.bfloat16)
    hidden_TD, weight_VD = change(hidden_TD, weight_VD)
    inputs = (hidden_TD, weight_VD, targets_T[: len(hidden_TD)])
    options = {"temperature": 0.7, "chunk_tokens": 2}
    actual = results_and_gradients(fused, *inputs, **options)
    expected = results_and_gradients(chunked_token_statistics, *inputs, **options)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert launched == []


def test_tensors_of_another_device_are_chunked(
    fused: Function, launched: list[tuple[str, Any]]
) -> None:
    inputs = random_inputs(9, 5, 30, 8, torch.bfloat16)
    expected = chunked_token_statistics(*inputs)
    for a, b in zip(fused(*inputs, device="meta"), expected, strict=True):
        assert torch.equal(a, b)
    assert launched == []


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 8), (5, 8), (3,)), {}, r"hidden_TD \(2, 8\) and targets_T \(3,\) do not fit"),
        (((2, 8), (5, 16), (2,)), {}, r"weight_VD \(5, 16\) does not fit"),
        (((2, 8), (5, 8), (2,)), {"temperature": 0.0}, "temperature=0.0 must be positive"),
        (((2, 8), (5, 8), (2,)), {"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
    ],
)
def test_errors_are_those_of_the_chunked_function(
    fused: Function, shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], message: str
) -> None:
    hidden, weight, targets = (torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        fused(hidden, weight, targets.long(), **options)


@pytest.mark.parametrize(
    ("V", "D", "expected"),
    [
        (151_936, 2048, 4096),  # Qwen2.5-VL-3B: at most 0.06 V - 2 D, in units of 1024
        (128_256, 4096, 2048),  # Llama-3-8B: 3 % has room for none, 64 MiB for 2048
        (301, 64, 304),
    ],
)
def test_a_block_is_as_wide_as_its_share_of_memory(
    interpreted: Any, V: int, D: int, expected: int
) -> None:
    T = 16_384
    v = interpreted.block_entries(T, V, D)
    assert v == expected
    held_bytes = 2 * T * v + 4 * T * D
    assert held_bytes <= max(0.03 * 4 * T * V, 2**26 + 4 * T * D)


def test_few_tokens_are_taken_through_wider_blocks(interpreted: Any) -> None:
    assert interpreted.block_entries(512, 151_936, 2048) == 2**26 // (2 * 512)
    assert interpreted.block_entries(1, 151_936, 2048) == 151_936


# ---------------------------------------------------------------- the choice


@pytest.fixture
def short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"TOKENS": 5, "VOCABULARY": 200, "HIDDEN": 24, "BLOCK": 128}.items():
        monkeypatch.setattr(cppo_triton.trial, name, size)


@pytest.mark.usefixtures("short_trial")
def test_kernels_that_agree_in_a_trial_are_used(
    interpreted: Any, launched: list[tuple[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    function = token_statistics_for("cpu", SIXTEEN_BITS, [SMALL])
    assert caplog.text == ""
    launched.clear()
    inputs = random_inputs(10, 5, 30, 8, torch.bfloat16)
    for a, b in zip(function(*inputs), chunked_token_statistics(*inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert [name for name, _ in launched] == ["reduce_logits"]


@pytest.mark.usefixtures("short_trial")
def test_the_first_tiling_that_works_is_taken(interpreted: Any) -> None:
    impossible = Tiling(rows=32, columns=48, depth=32, warps=4, stages=2)  # no power of two
    function = token_statistics_for("cpu", SIXTEEN_BITS, [impossible, SMALL])
    assert isinstance(function, partial)
    assert function.keywords["tiling"] == SMALL


@pytest.mark.usefixtures("short_trial")
def test_a_kernel_that_fails_leaves_one_warning_and_the_chunked_function(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*given: Any, **options: Any) -> None:
        raise RuntimeError("out of resource: shared memory\nand a stack that nobody reads")

    monkeypatch.setattr(interpreted, "_launch", refuse)
    function = token_statistics_for("cpu", SIXTEEN_BITS, [SMALL])
    assert function is chunked_token_statistics
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert "token statistics in Triton fail a trial on cpu, and are not used: RuntimeError" in said
    assert "out of resource: shared memory (Tiling(rows=32" in said
    assert "nobody" not in said


@pytest.mark.parametrize(
    ("result", "factor", "reason"),
    [
        (0, 1.01, "its log-probability is 0.01 off, relative to float64; 1e-05 is allowed"),
        (1, torch.nan, "its entropy is nan off"),
    ],
)
def test_a_kernel_that_computes_something_else_fails_its_trial(
    result: int, factor: float, reason: str
) -> None:
    def wrong(*given: Any, **options: Any) -> tuple[Tensor, ...]:
        results = chunked_token_statistics(*given, **options)
        return tuple(x * factor if i == result else x for i, x in enumerate(results))

    assert reason in cppo_triton.trial.trial(wrong, "cpu", torch.bfloat16)
    assert cppo_triton.trial.trial(chunked_token_statistics, "cpu", torch.bfloat16) == ""


def test_a_trial_asks_for_gradients_whatever_the_caller_is_doing() -> None:
    with torch.no_grad(), torch.device("meta"):
        assert cppo_triton.trial.trial(chunked_token_statistics, "cpu", torch.float16) == ""


@pytest.mark.parametrize(
    ("precision", "installed", "reason"),
    [
        (SIXTEEN_BITS, False, "Triton is not installed"),
        ((torch.float32, torch.float16), True, "it has no matrix units for bfloat16"),
    ],
)
def test_where_triton_cannot_serve_statistics_are_chunked_and_a_line_says_why(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: tuple[torch.dtype, ...],
    installed: bool,
    reason: str,
) -> None:
    spec = object() if installed else None
    monkeypatch.setattr(cppo_triton.trial, "find_spec", lambda name: spec)
    with caplog.at_level(logging.INFO):
        assert token_statistics_for("cpu", precision, [SMALL]) is chunked_token_statistics
    assert caplog.messages == [f"token statistics on cpu are chunked: {reason}"]


def test_importing_the_backends_imports_no_triton() -> None:
    code = "import sys, cppo_cuda, cppo_rocm, cppo_xpu; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
