"""NVIDIA GPUs through PyTorch's CUDA build."""

from __future__ import annotations

import os

import torch

from cppo.device import Backend, Unavailable, accelerator_memory, flash_attention_usable


def probe() -> Backend:
    """The CUDA backend; Unavailable with the reason where PyTorch or the machine lacks it."""
    if torch.version.hip is not None:
        raise Unavailable(
            f"PyTorch {torch.__version__} is built for ROCm, not CUDA: use --backend rocm, or "
            "install a CUDA build from https://pytorch.org/get-started/locally"
        )
    if torch.version.cuda is None:
        raise Unavailable(
            f"PyTorch {torch.__version__} is built without CUDA: install a CUDA build from "
            "https://pytorch.org/get-started/locally"
        )
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise Unavailable(
            f"PyTorch {torch.__version__} sees no NVIDIA GPU: check that nvidia-smi lists one, "
            f"that its driver supports CUDA {torch.version.cuda}, and CUDA_VISIBLE_DEVICES "
            f"({visible})"
        )
    # From compute capability 8.0 on; below, bfloat16 is emulated and flash-attn 2 does not run.
    real_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    flash = real_bfloat16 and flash_attention_usable()
    return Backend(
        device="cuda",
        attention=("flash_attention_2", "sdpa", "eager") if flash else ("sdpa", "eager"),
        precision=(
            (torch.bfloat16, torch.float32, torch.float16)
            if real_bfloat16
            else (torch.float32, torch.float16)
        ),
        collectives="nccl",
        memory=accelerator_memory("cuda"),
    )
