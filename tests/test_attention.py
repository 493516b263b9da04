"""Attention as transformers dispatches it, and the trial that decides what a backend offers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cppo_cpu
import pytest
import torch
from torch import Tensor

from cppo.attention import kernels as attention
from cppo.attention.merged import partial_or_none
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
    assert partial_or_none(part, "cpu", (torch.float32, torch.bfloat16)) is part

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
        assert partial_or_none(broken, "cpu", (dtype,)) is None
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
