"""How things are measured: in turn, several times; and the memory they need for a while."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cppo.device import Backend


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: `subject` over `peer`, a value of each for each repeat; or why it was not
    made, with the values of the one that ran."""

    what: str
    subject: str
    peer: str
    subject_values: list[float]
    peer_values: list[float]
    unit: str
    target: float | None = None
    not_run: str = ""

    @property
    def ratios(self) -> list[float]:
        if self.not_run:
            return []
        return [a / b for a, b in zip(self.subject_values, self.peer_values, strict=True)]

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None


def not_run(what: str, why: str, subject: str = "", peer: str = "") -> Row:
    return Row(
        what=what,
        subject=subject,
        peer=peer,
        subject_values=[],
        peer_values=[],
        unit="",
        not_run=why,
    )


def compare(
    what: str,
    subjects: Mapping[str, Callable[[], object]],
    *,
    peer: str,
    repeats: int,
    targets: Mapping[str, float] | None = None,
) -> list[Row]:
    """Runs all in turn, `repeats` times after one to warm up; each against the peer, in seconds.

    What fails while it warms up is left out, and its row holds the error; every row does where
    that is the peer.
    """
    print(f"  {what}", flush=True)
    errors = {name: error for name, run in subjects.items() if (error := _error(run))}
    running = {name: run for name, run in subjects.items() if name not in errors}
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(repeats):
        for name, run in running.items():
            started = now()
            run()
            times[name].append(now() - started)
    return [
        Row(
            what=what,
            subject=name,
            peer=peer,
            subject_values=times.get(name, []),
            peer_values=times.get(peer, []),
            unit="s",
            target=(targets or {}).get(name),
            not_run="; ".join(f"{each}: {errors[each]}" for each in (name, peer) if each in errors),
        )
        for name in subjects
        if name != peer
    ]


def _error(run: Callable[[], object]) -> str:
    """What it fails with; nothing where it runs."""
    try:
        run()
        synchronize()
    except Exception as error:  # noqa: BLE001 - a peer may break in any way; the others go on
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return ""


def count_operations(run: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products and attentions in a run; of causal
    attention, all that a whole square would take."""
    aten = torch.ops.aten
    others = {  # that PyTorch's counter does not know
        aten.addmm_: lambda added, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=others) as counter:
        run()
    return counter.get_total_flops()


def peak_operations(backend: Backend, dtype: torch.dtype) -> float:
    """Operations a second that a large matrix product reaches on this device."""
    size = 2048 if backend.device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=backend.device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        started = now()
        left @ right
        best = max(best, 2 * size**3 / (now() - started))
    return best


def peak_bytes(backend: Backend, run: Callable[[], object]) -> int:
    """The most memory held during a run, whatever was held before included."""
    _settle(backend, run)
    run()
    synchronize()
    return backend.memory.peak_bytes()


def extra_bytes(backend: Backend, run: Callable[[], object]) -> int:
    """The most memory held during a run above what was held before it; what it returns stays."""
    _settle(backend, run)
    before = backend.memory.peak_bytes()
    run()
    synchronize()
    return backend.memory.peak_bytes() - before


def _settle(backend: Backend, run: Callable[[], object]) -> None:
    run()  # what is allocated once and for all
    gc.collect()
    backend.memory.release()
    backend.memory.reset_peak()


def now() -> float:
    """Seconds, all that the device was asked for done."""
    synchronize()
    return time.perf_counter()


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
