"""AMD GPUs through PyTorch's ROCm build, which presents itself as device type "cuda"."""

from __future__ import annotations

import os

import torch

from cppo.device import Backend, Unavailable, accelerator_memory, flash_attention_usable


def probe() -> Backend:
    """The ROCm backend; Unavailable with the reason where PyTorch or the machine lacks it."""
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
    if not torch.cuda.is_available():
        visible = os.environ.get("HIP_VISIBLE_DEVICES", "not set")
        raise Unavailable(
            f"PyTorch {torch.__version__} sees no AMD GPU: check that rocminfo lists one, that "
            f"this user may open /dev/kfd (groups render and video), and HIP_VISIBLE_DEVICES "
            f"({visible})"
        )
    flash = flash_attention_usable()
    return Backend(
        device="cuda",
        attention=("flash_attention_2", "sdpa", "eager") if flash else ("sdpa", "eager"),
        # PyTorch counts bfloat16 as supported on every GPU that a ROCm build runs on.
        precision=(torch.bfloat16, torch.float32, torch.float16),
        # RCCL, under the name that torch.distributed knows it by.
        collectives="nccl",
        memory=accelerator_memory("cuda"),
    )
