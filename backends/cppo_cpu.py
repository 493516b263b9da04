"""The CPU: always there, the reference for every other backend.

torch.accelerator does not count the CPU's memory, so the operating system does: resident memory
of this process, weights, Python and libraries included. `release()` returns what the allocator has
kept of freed memory.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from cppo.attention import usable
from cppo.attention.choice import verified
from cppo.attention.pieces import Segments
from cppo.device import Backend, Memory, PartialAttention, Unavailable

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
# Up to so many, attention in parts was measured to be faster than under a mask. Its backward pass
# is shared out by key heads, of which models have few; that under a mask by those of all responses.
THREADS = 2

log = logging.getLogger(__name__)


def probe() -> Backend:
    """The CPU backend; Unavailable only where memory cannot be measured."""
    _keep_freed_memory()
    # The best is float32 even where bfloat16 is real: only matrix products are faster in it.
    precision = (torch.float32, torch.bfloat16) if _has_bfloat16() else (torch.float32,)
    return Backend(
        device="cpu",
        attention=usable(("sdpa", "eager"), "cpu", torch.float32),
        precision=precision,
        collectives="gloo",
        memory=_memory(),
        partial_attention=_partial_attention(precision),
    )


# These are what scaled_dot_product_attention runs here, whose forward gives the log-sum-exp too.
# They know of no segments, so that each is a call of its own.
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    queries: Segments,
    keys: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if len(queries.places) == 1:
        attended, logsumexp = flash(query, key, value, 0.0, causal, scale=scale)
        return attended, logsumexp
    wide = torch.promote_types(query.dtype, torch.float32)
    attended = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    attended = attended.transpose(1, 2)
    logsumexp = query.new_empty(query.shape[:3], dtype=wide)
    for own, other in zip(queries.places, keys.places, strict=True):
        attended[:, :, own], logsumexp[:, :, own] = flash(
            *(query[:, :, own], key[:, :, other], value[:, :, other], 0.0, causal), scale=scale
        )
    return attended, logsumexp


def _go_back(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    logsumexp: Tensor,
    *,
    queries: Segments,
    keys: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if len(queries.places) == 1:
        of_query, of_key, of_value = flash(
            *(gradient, query, key, value, attended, logsumexp, 0.0, causal), scale=scale
        )
        return of_query, of_key, of_value
    of_query, of_key, of_value = map(torch.empty_like, (query, key, value))
    for own, other in zip(queries.places, keys.places, strict=True):
        of_query[:, :, own], of_key[:, :, other], of_value[:, :, other] = flash(
            *(gradient[:, :, own], query[:, :, own], key[:, :, other], value[:, :, other]),
            *(attended[:, :, own], logsumexp[:, :, own], 0.0, causal),
            scale=scale,
        )
    return of_query, of_key, of_value


PARTIAL_ATTENTION = PartialAttention(
    forward=_attend,
    backward=_go_back,
    precision=(torch.float64, torch.float32, torch.bfloat16),
)


def _partial_attention(precision: Sequence[torch.dtype]) -> PartialAttention | None:
    if torch.get_num_threads() > THREADS:
        log.info("attention in groups is under a mask: more than %d threads share it out", THREADS)
        return None
    return verified(PARTIAL_ATTENTION, "cpu", precision)


def _has_bfloat16() -> bool:
    """Whether this CPU has instructions for it (AVX512-BF16, AMX, Arm's); others emulate it."""
    # PyTorch 2.10 does not tell: there bfloat16 counts as emulated.
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found[name] for name in found if name.endswith("bf16"))


def _memory() -> Memory:
    has_proc = (PROC / "meminfo").exists()
    if not has_proc and find_spec("psutil") is None:
        raise Unavailable(f"measuring memory on {sys.platform} needs psutil: pip install psutil")
    # Some sandboxes have a /proc that counts no peaks.
    counts_peaks = (PROC / "self/clear_refs").exists()
    return Memory(
        peak_bytes=_linux_peak_bytes if counts_peaks else _portable_peak_bytes,
        reset_peak=_linux_reset_peak if counts_peaks else _portable_reset_peak,
        release=_release,
        headroom_bytes=_linux_headroom_bytes if has_proc else _portable_headroom_bytes,
    )


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def _keep_freed_memory() -> None:
    """Lets the allocator keep what PyTorch frees, up to 32 MiB a block, for the next tensor.

    By default glibc hands larger blocks back at once and the kernel clears each new one page by
    page; a training step of the built-in policy took a fifth longer for it.
    """
    if (library := _glibc()) is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        library.mallopt(mmap_threshold, 32 * 2**20)
        library.mallopt(trim_threshold, 2**31 - 1)


def _release() -> None:
    """Hands freed memory that the allocator has kept back to the system."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _linux_peak_bytes() -> int:
    return 1024 * _number(PROC / "self/status", "VmHWM")


def _linux_reset_peak() -> None:
    """Sets VmHWM to what is resident now (proc(5), clear_refs, since Linux 4.0)."""
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError as error:
        _warn_of_lasting_peak(f"the system refuses to reset it ({error})")


def _linux_headroom_bytes() -> int:
    """The least of what the machine has left and what each enclosing control group has left."""
    machine_bytes = 1024 * _number(PROC / "meminfo", "MemAvailable")
    return min([machine_bytes, *_cgroup_headrooms_bytes()])


def _cgroup_headrooms_bytes() -> Iterator[int]:
    """Limit minus usage of each control group around this process, version 2 or 1. File pages not
    in recent use count as free: the kernel drops them before it kills anyone."""
    groups = PROC / "self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, maximum, current, inactive = CGROUP, "max", "current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, inactive = CGROUP / "memory", "total_inactive_file"
            maximum, current = "limit_in_bytes", "usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, of which only the mount's root is visible.
        innermost = root / path.lstrip("/")
        for group in (innermost, *innermost.parents):
            if not group.is_relative_to(root):
                break
            limit = group / f"memory.{maximum}"
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                usage = int((group / f"memory.{current}").read_text())
                yield int(text) - usage + _number(group / "memory.stat", inactive)


def _number(path: Path, name: str) -> int:
    """The number after `name` in a file of "name value" or "name: value unit" lines."""
    for line in path.read_text().splitlines():
        words = line.split()
        if words and words[0].rstrip(":") == name:
            return int(words[1])
    raise OSError(f"{path} has no line {name}")


def _portable_peak_bytes() -> int:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return unit_bytes * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _portable_reset_peak() -> None:
    _warn_of_lasting_peak(f"{sys.platform} here offers no way to reset it")


def _portable_headroom_bytes() -> int:
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)


@cache
def _warn_of_lasting_peak(why: str) -> None:
    log.warning("peak memory counts from the start of the process: %s", why)
