"""Huawei Ascend NPUs through torch-npu, which registers device type "npu" with PyTorch.

`release()` returns the caching allocator's unused memory to the driver; with expandable segments
(Ascend HDK 23.0 or later) it unmaps pages without moving anything. The
`cppo` command keeps PyTorch from importing torch-npu by itself: where CANN is not set up, that
import fails, and here a reason can be given.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import torch

from cppo.attention import usable
from cppo.device import Backend, Memory, Unavailable


def probe() -> Backend:
    """The NPU backend; Unavailable with the reason where torch-npu or the machine lacks it."""
    _check_versions()
    _prepare_process()
    try:
        import torch_npu
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(
            f"torch-npu is installed but does not import ({error}): source CANN's set_env.sh, and "
            "check that CANN's version is one that this torch-npu supports"
        ) from error
    if not torch_npu.npu.is_available():
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "not set")
        raise Unavailable(
            f"torch-npu {torch_npu.__version__} sees no NPU: check that npu-smi info lists one, "
            f"that the driver matches CANN, and ASCEND_RT_VISIBLE_DEVICES ({visible})"
        )
    real_bfloat16 = torch_npu.npu.is_bf16_supported()
    sixteen_bits = torch.bfloat16 if real_bfloat16 else torch.float16
    # transformers maps flash_attention_2 to torch_npu.npu_fusion_attention, without flash-attn.
    fused = ("flash_attention_2",) if hasattr(torch_npu, "npu_fusion_attention") else ()
    return Backend(
        device="npu",
        attention=usable((*fused, "sdpa", "eager"), "npu", sixteen_bits),
        precision=(
            (torch.bfloat16, torch.float32, torch.float16)
            if real_bfloat16
            else (torch.float32, torch.float16)
        ),
        collectives="hccl",
        memory=_memory(),
    )


def _memory() -> Memory:
    """Through torch-npu itself: before 2.13 its allocator does not answer `torch.accelerator`."""
    import torch_npu

    def headroom_bytes() -> int:
        free_bytes, _ = torch_npu.npu.mem_get_info()
        kept_bytes = torch_npu.npu.memory_reserved() - torch_npu.npu.memory_allocated()
        return int(free_bytes + kept_bytes)

    return Memory(
        peak_bytes=torch_npu.npu.max_memory_allocated,
        reset_peak=torch_npu.npu.reset_peak_memory_stats,
        release=torch_npu.npu.empty_cache,
        headroom_bytes=headroom_bytes,
    )


def _check_versions() -> None:
    """torch-npu X.Y.Z works with PyTorch X.Y.Z alone; otherwise its import fails obscurely."""
    try:
        installed = version("torch-npu")
    except PackageNotFoundError as error:
        raise Unavailable(
            "torch-npu is not installed: install CANN, then the torch-npu of the same version as "
            f"PyTorch ({torch.__version__}), see https://github.com/Ascend/pytorch"
        ) from error
    if installed.split(".")[:3] != torch.__version__.split("+")[0].split(".")[:3]:
        raise Unavailable(
            f"torch-npu {installed} does not fit PyTorch {torch.__version__}: install the "
            "torch-npu, or the PyTorch, of the same version"
        )


def _prepare_process() -> None:
    """What must be set before the first allocation and before processes are joined."""
    os.environ.setdefault("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
    if torch.are_deterministic_algorithms_enabled():
        os.environ.setdefault("HCCL_DETERMINISTIC", "true")
