"""Huawei Ascend NPUs through torch-npu, which registers device type "npu" with PyTorch."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from cppo.device import Backend, Unavailable, accelerator_memory


def probe() -> Backend:
    """The NPU backend; Unavailable with the reason where torch-npu or the machine lacks it."""
    if find_spec("torch_npu") is None:
        raise Unavailable(
            "torch-npu is not installed: install CANN, then the torch-npu whose version begins "
            f"with that of PyTorch ({torch.__version__}), see https://github.com/Ascend/pytorch"
        )
    try:
        import torch_npu
    except (ImportError, OSError) as error:
        raise Unavailable(
            f"torch-npu is installed but does not import ({error}): source CANN's set_env.sh, and "
            f"check that torch-npu's version begins with that of PyTorch ({torch.__version__})"
        ) from error
    if not torch_npu.npu.is_available():
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "not set")
        raise Unavailable(
            f"torch-npu {torch_npu.__version__} sees no NPU: check that npu-smi info lists one, "
            f"that the driver matches CANN, and ASCEND_RT_VISIBLE_DEVICES ({visible})"
        )
    # transformers maps flash_attention_2 to this fused kernel, without the flash-attn package.
    fused = hasattr(torch_npu, "npu_fusion_attention")
    real_bfloat16 = torch_npu.npu.is_bf16_supported()
    return Backend(
        device="npu",
        attention=("flash_attention_2", "sdpa", "eager") if fused else ("sdpa", "eager"),
        precision=(
            (torch.bfloat16, torch.float32, torch.float16)
            if real_bfloat16
            else (torch.float32, torch.float16)
        ),
        collectives="hccl",
        memory=accelerator_memory("npu"),
    )
