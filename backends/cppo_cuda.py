"""NVIDIA GPUs through PyTorch's CUDA build.

`release()` returns the caching allocator's unused pages to the driver. With expandable segments it
unmaps them without moving anything, so that an update finds room that a rollout left in pieces.

Attention through cuDNN is switched off for the process, though PyTorch prefers it on recent cards:
with a mask, as the group layout has one, its backward pass gives NaN at some lengths (PyTorch 2.11
to 2.13 at least, github.com/pytorch/pytorch/issues/196678), and it plans anew for each new shape.
"""

from __future__ import annotations

import os

import torch
from cppo_triton import Tiling, token_statistics_for
from torch import Tensor
from torch.nn.functional import pad

from cppo.attention import installed_flash_attention, usable
from cppo.attention.choice import faster, verified
from cppo.attention.pieces import Segments
from cppo.device import (
    Backend,
    PartialAttention,
    Unavailable,
    accelerator_memory,
    claim_device,
    first_line,
)

# The first takes up to 209 KiB of shared memory, as data-centre GPUs have it, the second 97 KiB.
TILINGS = (
    Tiling(rows=128, columns=256, depth=64, warps=8, stages=3),
    Tiling(rows=128, columns=128, depth=64, warps=8, stages=3),
)


def probe() -> Backend:
    """The CUDA backend; Unavailable with the reason where PyTorch or the machine lacks it."""
    _check_build()
    _prepare_process()
    _check_device()
    claim_device("cuda")  # cards of one machine may differ
    # From compute capability 8.0 on; below, bfloat16 is emulated and flash attention does not run.
    real_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    sixteen_bits = torch.bfloat16 if real_bfloat16 else torch.float16
    flash = installed_flash_attention() if real_bfloat16 else ()
    precision = (
        (torch.bfloat16, torch.float32, torch.float16)
        if real_bfloat16
        else (torch.float32, torch.float16)
    )
    return Backend(
        device="cuda",
        attention=usable((*flash, "sdpa", "eager"), "cuda", sixteen_bits),
        precision=precision,
        collectives="nccl",
        memory=accelerator_memory("cuda"),
        token_statistics=token_statistics_for("cuda", precision, TILINGS),
        partial_attention=faster(
            verified(PARTIAL_ATTENTION, "cuda", precision if real_bfloat16 else ()), "cuda"
        ),
    )


# Variable-length flash attention as `torch.nn.attention.varlen` runs it, whose own backward pass
# takes no other log-sum-exp than its forward pass has made.
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
    attended, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        *map(_end_to_end, (query, key, value)),
        *(queries.offsets, keys.offsets, max(queries.lengths), max(keys.lengths)),
        *(0.0, causal, False),
        scale=scale,
    )
    return _by_heads(attended, query), logsumexp[None]


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
    of_nothing = torch.empty(2, dtype=torch.uint64, device=query.device)  # dropout's random state
    of_query, of_key, of_value = torch.ops.aten._flash_attention_backward(
        *map(_end_to_end, (gradient, query, key, value, attended)),
        logsumexp[0].contiguous(),  # it takes a pointer, and asks for no strides
        *(queries.offsets, keys.offsets, max(queries.lengths), max(keys.lengths)),
        *(0.0, causal, of_nothing, of_nothing),
        scale=scale,
    )
    return _by_heads(of_query, query), _by_heads(of_key, key), _by_heads(of_value, value)


def _end_to_end(tensor: Tensor) -> Tensor:
    """(1, H, L, D) to (L, H, D), D filled up to a multiple of 8."""
    sequence = tensor[0].transpose(0, 1)
    return pad(sequence, (0, -sequence.shape[-1] % 8)) if sequence.shape[-1] % 8 else sequence


def _by_heads(sequence: Tensor, like: Tensor) -> Tensor:
    """(L, H, D filled up) to (1, H, L, D)."""
    return sequence[..., : like.shape[-1]].transpose(0, 1)[None]


PARTIAL_ATTENTION = PartialAttention(
    forward=_attend, backward=_go_back, precision=(torch.bfloat16, torch.float16)
)


def _check_build() -> None:
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


def _prepare_process() -> None:
    """What must be set before the first allocation and the first matrix product."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name still counts
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.backends.cuda.enable_cudnn_sdp(False)
    if torch.are_deterministic_algorithms_enabled():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers


def _check_device() -> None:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # what it raises tells a missing driver from one that is too old
    except (RuntimeError, AssertionError) as error:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise Unavailable(
            f"PyTorch {torch.__version__} sees no NVIDIA GPU ({first_line(error)}): check that "
            f"nvidia-smi lists one, that its driver supports CUDA {torch.version.cuda}, and "
            f"CUDA_VISIBLE_DEVICES ({visible})"
        ) from error
