"""Intel GPUs through PyTorch itself; Intel's discontinued extension is not needed."""

from __future__ import annotations

import os

import torch

from cppo.device import Backend, Unavailable, accelerator_memory


def probe() -> Backend:
    """The XPU backend; Unavailable with the reason where PyTorch or the machine lacks it."""
    if torch.version.xpu is None:
        raise Unavailable(
            f"PyTorch {torch.__version__} is built without XPU: install an XPU build with "
            "pip install torch --index-url https://download.pytorch.org/whl/xpu"
        )
    if not torch.xpu.is_available():
        visible = os.environ.get("ZE_AFFINITY_MASK", "not set")
        raise Unavailable(
            f"PyTorch {torch.__version__} sees no Intel GPU: check that its driver is installed "
            f"(clinfo lists it), that this user may open /dev/dri (group render), and "
            f"ZE_AFFINITY_MASK ({visible})"
        )
    real_bfloat16 = torch.xpu.is_bf16_supported(including_emulation=False)
    return Backend(
        device="xpu",
        attention=("sdpa", "eager"),
        precision=(
            (torch.bfloat16, torch.float32, torch.float16)
            if real_bfloat16
            else (torch.float32, torch.float16)
        ),
        collectives="xccl",
        memory=accelerator_memory("xpu"),
    )
