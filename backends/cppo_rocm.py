"""AMD GPUs through PyTorch's ROCm build, which presents itself as device type "cuda".

`release()` returns the caching allocator's unused blocks to the driver (hipFree). Expandable
segments stay off: not every ROCm release has them.
"""

from __future__ import annotations

import os

import torch
from cppo_triton import Tiling, token_statistics_for

from cppo.attention import installed_flash_attention, usable
from cppo.device import Backend, Unavailable, accelerator_memory, claim_device, first_line

# Architectures whose matrix units take bfloat16: CDNA, RDNA 3 and later. PyTorch itself says yes
# on every GPU.
REAL_BFLOAT16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
# 64 KiB of local memory is all there is on most.
TILINGS = (Tiling(rows=128, columns=128, depth=64, warps=8, stages=2),)


def probe() -> Backend:
    """The ROCm backend; Unavailable with the reason where PyTorch or the machine lacks it."""
    _check_build()
    if torch.are_deterministic_algorithms_enabled():
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers
    _check_device()
    device = claim_device("cuda")  # cards of one machine may differ
    real_bfloat16 = torch.cuda.get_device_properties(device).gcnArchName.startswith(REAL_BFLOAT16)
    sixteen_bits = torch.bfloat16 if real_bfloat16 else torch.float16
    precision = (
        (torch.bfloat16, torch.float32, torch.float16)
        if real_bfloat16
        else (torch.float32, torch.float16)
    )
    return Backend(
        device="cuda",
        attention=usable((*installed_flash_attention(), "sdpa", "eager"), "cuda", sixteen_bits),
        precision=precision,
        # RCCL, under the name that torch.distributed knows it by.
        collectives="nccl",
        memory=accelerator_memory("cuda"),
        token_statistics=token_statistics_for("cuda", precision, TILINGS),
    )


def _check_build() -> None:
    if torch.version.cuda is not None:
        raise Unavailable(
            f"PyTorch {torch.__version__} is built for CUDA, not ROCm: use --backend cuda, or "
            "install a ROCm build from https://pytorch.org/get-started/locally"
        )
    if torch.version.hip is None:
        raise Unavailable(
            f"PyTorch {torch.__version__} is built without ROCm: install a ROCm build from "
            "https://pytorch.org/get-started/locally"
        )


def _check_device() -> None:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        visible = os.environ.get("HIP_VISIBLE_DEVICES", "not set")
        raise Unavailable(
            f"PyTorch {torch.__version__} sees no AMD GPU ({first_line(error)}): check that "
            "rocminfo lists one, that this user may open /dev/kfd (groups render and video), "
            f"and HIP_VISIBLE_DEVICES ({visible})"
        ) from error
