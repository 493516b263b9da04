"""Intel GPUs through PyTorch itself; Intel's discontinued extension is not needed.

`release()` returns the caching allocator's unused blocks to the driver.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from cppo_triton import Tiling, token_statistics_for

from cppo.attention import usable
from cppo.device import (
    Backend,
    Memory,
    Unavailable,
    accelerator_memory,
    claim_device,
    first_line,
)

# A warp is 16 lanes wide here.
TILINGS = (Tiling(rows=128, columns=128, depth=32, warps=16, stages=2),)


def probe() -> Backend:
    """The XPU backend; Unavailable with the reason where PyTorch or the machine lacks it."""
    if torch.version.xpu is None:
        raise Unavailable(
            f"PyTorch {torch.__version__} is built without XPU: install an XPU build with "
            "pip install torch --index-url https://download.pytorch.org/whl/xpu"
        )
    try:
        torch.xpu.init()
    except (RuntimeError, AssertionError) as error:
        visible = os.environ.get("ZE_AFFINITY_MASK", "not set")
        raise Unavailable(
            f"PyTorch {torch.__version__} sees no Intel GPU ({first_line(error)}): check that its "
            "driver is installed (clinfo lists it), that this user may open /dev/dri (group "
            f"render), and ZE_AFFINITY_MASK ({visible})"
        ) from error
    device = claim_device("xpu")  # cards of one machine may differ
    real_bfloat16 = torch.xpu.is_bf16_supported(including_emulation=False)
    sixteen_bits = torch.bfloat16 if real_bfloat16 else torch.float16
    # Scaling a loss takes float64, in PyTorch's own code, which client GPUs may lack.
    scales_losses = torch.xpu.get_device_properties(device).has_fp64
    offered = {
        torch.bfloat16: real_bfloat16,
        torch.float32: True,
        torch.float16: scales_losses,
    }
    precision = tuple(dtype for dtype, works in offered.items() if works)
    return Backend(
        device="xpu",
        attention=usable(("sdpa", "eager"), "xpu", sixteen_bits),
        precision=precision,
        collectives="xccl",
        memory=_memory(),
        token_statistics=token_statistics_for("xpu", precision, TILINGS),
    )


def _memory() -> Memory:
    """Some client GPUs do not tell their free memory: there all that PyTorch does not hold counts
    as free."""
    memory = accelerator_memory("xpu")
    try:
        memory.headroom_bytes()
    except RuntimeError:
        total_bytes = torch.xpu.get_device_properties().total_memory
        return replace(memory, headroom_bytes=lambda: total_bytes - torch.xpu.memory_allocated())
    return memory
