"""Attention as transformers dispatches it, and the trial that decides what a backend offers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import cppo_cpu
import cppo_cuda
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cppo.attention import choice
from cppo.attention import kernels as attention
from cppo.attention.choice import faster, verified
from cppo.attention.groups import Layout
from cppo.attention.pieces import Segments
from cppo.device import Unavailable, choose

Attend = Callable[..., Tensor]


def exact(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """One row, one head, one position after the other, in float64: (B, L, H, D)."""
    rows, heads, length, size = query.shape
    query, key, value = query.double(), key.double(), value.double()
    result = torch.zeros(rows, length, heads, size, dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            source = head * key.shape[1] // heads
            for position in range(int(lengths[row])):
                seen = slice(0, position + 1)
                scores = key[row, source, seen] @ query[row, head, position] / size**0.5
                result[row, position, head] = scores.softmax(0) @ value[row, source, seen]
    return result


@pytest.mark.parametrize("lengths", [None, (7, 4)])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention_is_what_it_is_defined_to_be(name: str, lengths: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 8) for heads in (4, 2, 2))
    given = None if lengths is None else torch.tensor(lengths)
    attended = attention.attend(name, query, key, value, lengths=given)
    held = torch.tensor(lengths or (7, 7))
    valid = torch.arange(7) < held[:, None]
    truth = exact(query, key, value, held)
    torch.testing.assert_close(attended[valid].double(), truth[valid], atol=1e-6, rtol=1e-5)


def test_an_attention_that_nobody_knows_is_refused_with_what_is_known() -> None:
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="'flex' is not known: give one of flash_attention_3"):
        attention.attend("flex", query, query, query)


def test_a_trial_says_why_an_attention_does_not_work() -> None:
    assert attention.trial("sdpa", "cpu", torch.float32) == ""
    with torch.no_grad():
        assert attention.trial("eager", "cpu", torch.float32) == ""
    assert "16-bit numbers only" in attention.trial("flash_attention_2", "cpu", torch.float32)
    reason = attention.trial("flash_attention_2", "cpu", torch.bfloat16)
    assert "Error" in reason
    assert "\n" not in reason


def test_a_trial_sees_gradients_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return (query + key.mean() + value.mean()) * torch.inf

    monkeypatch.setattr(attention, "attend", broken)
    assert attention.trial("sdpa", "cpu", torch.float32) == "its gradients are not finite"


def test_an_attention_that_imports_but_fails_its_trial_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole: Attend = attention.attend

    def attend(name: str, *tensors: Tensor, lengths: Tensor | None) -> Tensor:
        if name == "flash_attention_3" and lengths is not None:  # a kernel of its own
            raise RuntimeError("no kernel image is available\nand a stack that nobody reads")
        return whole("sdpa", *tensors, lengths=lengths)

    monkeypatch.setattr(attention, "attend", attend)
    candidates = ("flash_attention_3", "flash_attention_2", "sdpa", "eager")
    working = attention.usable(candidates, "cpu", torch.bfloat16)
    assert working == ("flash_attention_2", "sdpa", "eager")
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "attention flash_attention_3 fails a trial on cpu" in record.getMessage()
    assert "no kernel image is available" in record.getMessage()
    assert "nobody reads" not in record.getMessage()


def test_hardware_where_no_attention_works_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*given: Any, **options: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(attention, "attend", attend)
    with pytest.raises(Unavailable, match=r"no attention works on cpu \(eager: .*out of memory"):
        attention.usable(("sdpa", "eager"), "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_attention_is_offered_where_a_trial_agrees_with_attention_written_out(
    caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    part = cppo_cpu.PARTIAL_ATTENTION  # a failure here: what it stands on has changed in PyTorch
    assert verified(part, "cpu", part.precision) == part
    assert verified(part, "cpu", (dtype, torch.float16)) == replace(part, precision=(dtype,))

    def in_bits(*given: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        attended, logsumexp = part.forward(*given, **options)
        return attended, logsumexp / math.log(2)  # the base that some kernels have

    def of_its_own(gradient: Tensor, *given: Tensor, **options: Any) -> tuple[Tensor, ...]:
        inputs = given[:3]
        return part.backward(gradient, *inputs, *part.forward(*inputs, **options), **options)

    def with_one_more(*given: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return (*part.backward(*given, **options), given[0])

    def gone(*given: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        raise AttributeError("no such operator\nand a stack that nobody reads")

    for broken, reason in (
        (replace(part, forward=in_bits), "it differs from attention written out"),
        (replace(part, backward=of_its_own), "it differs from attention written out"),
        (replace(part, backward=with_one_more), "ValueError: "),
        (replace(part, forward=gone), "AttributeError: no such operator"),
    ):
        caplog.clear()
        assert verified(broken, "cpu", (dtype,)) is None
        [message] = caplog.messages
        said = f"attention in parts fails a trial on cpu in {dtype}, and is not used: "
        assert message.startswith(said + reason)
        assert "nobody reads" not in message


@pytest.mark.parametrize(("threads", "offered"), [(1, True), (2, True), (3, False)])
def test_the_cpu_attends_in_parts_where_that_is_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, threads: int, offered: bool
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert (choose("cpu").partial_attention is not None) == offered


def test_attention_in_parts_is_taken_in_the_precisions_in_which_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def seconds(layouts: Any, dtype: torch.dtype) -> list[float]:
        under_mask, in_parts = layouts
        assert (under_mask.part, in_parts.part) == (None, part)
        return [0.002, 0.001 if dtype == torch.float32 else 0.003]

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(choice, "_seconds", seconds)
    part = replace(cppo_cpu.PARTIAL_ATTENTION, precision=(torch.float32, torch.bfloat16))
    found = faster(part, "cpu")
    assert found == replace(part, precision=(torch.float32,))
    assert faster(replace(part, precision=(torch.bfloat16,)), "cpu") is None
    assert "in torch.float32: 1.00 ms in parts, 2.00 ms under a mask" in caplog.text
    assert "in torch.bfloat16: 3.00 ms in parts, 2.00 ms under a mask" in caplog.text


def test_attention_in_parts_that_is_slow_or_breaks_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is really timed."""
    monkeypatch.setattr(choice, "PROMPT", 9)
    monkeypatch.setattr(choice, "RESPONSES", (5, 7))
    part = replace(cppo_cpu.PARTIAL_ATTENTION, precision=(torch.float32,))
    calls = []

    def slow(*given: Tensor, **options: Any) -> Any:
        calls.append(time.sleep(0.05))
        return part.forward(*given, **options)

    def broken(*given: Tensor, **options: Any) -> Any:
        raise RuntimeError("out of memory\nand a stack that nobody reads")

    assert faster(replace(part, forward=slow), "cpu") is None
    assert len(calls) == 2 * (1 + choice.ROUNDS)  # to themselves, and to the prompt
    assert faster(replace(part, backward=broken), "cpu") is None
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    said = "attention in parts cannot be timed on cpu in torch.float32: RuntimeError: out of memory"
    assert record.getMessage() == said
    assert faster(None, "cpu") is None


def test_what_is_to_be_deterministic_does_not_hang_on_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert faster(cppo_cpu.PARTIAL_ATTENTION, "cpu") is None
    assert "under a mask: timing is not deterministic" in caplog.text


@pytest.fixture
def fake_flash_operators() -> Iterator[None]:
    """What stands in, on the CPU, for the operators behind `torch.nn.attention.varlen`: the CPU's
    own, asking of what they are given what those ask (PyTorch's flash_api.cpp)."""
    real = cppo_cpu.PARTIAL_ATTENTION

    def segments(offsets: Tensor, longest: int) -> Segments:
        assert (offsets.dtype, offsets[0], offsets.is_contiguous()) == (torch.int32, 0, True)
        found = Segments(lengths=offsets.diff().tolist(), device="cpu")
        assert max(found.lengths) == longest
        return found

    def by_heads(sequence: Tensor) -> Tensor:
        assert (sequence.dim(), sequence.stride(-1), sequence.shape[-1] % 8) == (3, 1, 0)
        return sequence.transpose(0, 1)[None]

    def told(given: Sequence[Any]) -> dict[str, Any]:
        of_queries, of_keys, most_queries, most_keys, dropout, causal, *_ = given
        assert dropout == 0.0
        return {
            "queries": segments(of_queries, most_queries),
            "keys": segments(of_keys, most_keys),
            "causal": causal,
        }

    def forward(*given: Any, scale: float) -> tuple[Tensor, ...]:
        inputs = map(by_heads, given[:3])
        attended, logsumexp = real.forward(*inputs, **told(given[3:]), scale=scale)
        unused = (logsumexp.new_empty(0) for _ in range(3))
        return attended[0].transpose(0, 1), logsumexp[0].contiguous(), *unused

    def backward(*given: Any, scale: float) -> tuple[Tensor, ...]:
        tensors, logsumexp = map(by_heads, given[:5]), given[5]
        assert logsumexp.is_contiguous()
        found = real.backward(*tensors, logsumexp[None], **told(given[6:]), scale=scale)
        return tuple(gradient[0].transpose(0, 1) for gradient in found)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("size", [64, 12])  # of a head: what is no multiple of 8 is filled up
def test_flash_attention_in_parts_is_attention_under_a_mask_by_fake_operators(
    fake_flash_operators: None, size: int
) -> None:
    part = replace(cppo_cuda.PARTIAL_ATTENTION, precision=(torch.float64,))
    assert verified(part, "cpu", (torch.float64,)) == part
    masked = Layout(prompts=(9, 5), responses=((5, 1, 7), (1,)))
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, 28, heads, size, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    ]
    upstream = torch.randn(1, 28, 4, size, dtype=torch.float64)

    def differentiate(layout: Layout) -> tuple[Tensor, ...]:
        attended = layout.attend(*inputs, layer=0, scale=0.3, kernel=scaled_dot_product_attention)
        return attended, *torch.autograd.grad(attended, inputs, upstream)

    for found, true in zip(
        differentiate(replace(masked, part=part)), differentiate(masked), strict=True
    ):
        torch.testing.assert_close(found, true, atol=1e-12, rtol=1e-12)


def test_flash_attention_in_parts_gives_and_takes_the_shapes_that_pytorch_says() -> None:
    """By PyTorch's own record of its operators, which computes nothing."""
    part = cppo_cuda.PARTIAL_ATTENTION
    layout = Layout(prompts=(9, 5), responses=((5, 1, 7), (1,)), device="meta", part=part)
    inputs = [
        torch.empty(1, 28, heads, 64, device="meta", dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (4, 2, 2)
    ]
    attended = layout.attend(*inputs, layer=0, scale=0.3, kernel=scaled_dot_product_attention)
    assert (attended.shape, attended.dtype) == ((1, 28, 4, 64), torch.bfloat16)
    for gradient, given in zip(torch.autograd.grad(attended.sum(), inputs), inputs, strict=True):
        assert (gradient.shape, gradient.dtype) == (given.shape, given.dtype)


def test_pytorchs_own_attention_is_all_there_is_without_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    candidates = ("flash_attention_2", "sdpa", "eager")
    assert attention.usable(candidates, "cpu", torch.bfloat16) == ("sdpa", "eager")
    assert attention.installed_flash_attention() == ()


def test_installed_flash_attention_comes_best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    assert attention.installed_flash_attention() == ("flash_attention_3", "flash_attention_2")
