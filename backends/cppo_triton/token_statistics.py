"""Token statistics whose logits are made tile by tile and never reach memory.

Shapes: T tokens, V vocabulary, D hidden size, S splits of the vocabulary; a lower-case v is one
block of V.

Forward, a kernel reduces each token's logits in splits of the vocabulary, which are merged here as
in an online softmax. Backward, the vocabulary is walked in blocks: a kernel makes the block's
logits again, since they cannot be kept, and writes their gradient in the inputs' type; multiplied
by the hidden states it is the block's rows of the weight's gradient, rounded once; multiplied by
the weight it is added, in float32, to the gradient of the hidden states. These four products are
all that there is to do.
"""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from cppo.statistics import check_inputs, chunked_token_statistics
from cppo_triton import kernels
from cppo_triton.tiling import Tiling

# Of what float32 logits would take: what the backward pass may hold beside results and gradients.
MEMORY_SHARE = 0.03
# Whatever that share is: with few tokens, only a wide block gives every processor some work.
LEAST_BLOCK_BYTES = 2**26
# Tiles that one program makes in turn: of a split, and of a block.
SPLIT_TILES, BLOCK_TILES = 8, 2


def block_entries(T: int, V: int, D: int) -> int:
    """Vocabulary entries of a block: what memory leaves room for in 16 bits, beside the float32
    gradient of the hidden states."""
    spare_bytes = MEMORY_SHARE * 4 * T * V - 4 * T * D
    entries = int(max(spare_bytes, LEAST_BLOCK_BYTES)) // (2 * T)
    return min(max(1, entries // 1024) * 1024, -(-V // 16) * 16)


def _launch(
    kernel: Any, programs: int, tiling: Tiling, arguments: Sequence[Any], **options: Any
) -> None:
    """Starts a kernel on the device of its first argument."""
    device = arguments[0].device

    def launch() -> None:
        # Where the hardware reads descriptors from memory, Triton asks for that memory.
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
        )
        kernel[(programs,)](
            *arguments,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            DEPTH=tiling.depth,
            GROUP=max(1, 2048 // tiling.rows),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **options,
        )

    with torch.accelerator.device_index(device.index):
        contextvars.copy_context().run(launch)  # nobody else's allocator is replaced


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        temperature: float,
        tiling: Tiling,
        block: int,
    ) -> tuple[Tensor, Tensor]:
        (T, D), V = hidden_TD.shape, len(weight_VD)
        inside_T = (targets_T >= 0) & (targets_T < V)
        targets_T = torch.where(inside_T, targets_T, -1).to(torch.int32)
        S = triton.cdiv(V, SPLIT_TILES * tiling.columns)
        peak_ST, mass_ST, moment_ST = hidden_TD.new_empty(3, S, T, dtype=torch.float32)
        target_logit_T = hidden_TD.new_full((T,), torch.nan, dtype=torch.float32)
        found = (peak_ST, mass_ST, moment_ST, target_logit_T)
        _launch(
            kernels.reduce_logits,
            triton.cdiv(T, tiling.rows) * S,
            tiling,
            (hidden_TD, weight_VD, targets_T, *found, T, V, D, 1 / temperature),
            RUN=SPLIT_TILES,
        )
        peak_T = peak_ST.amax(0)
        drop_ST = peak_ST - peak_T
        mass_ST *= drop_ST.exp()
        moment_ST *= drop_ST.exp()
        moment_ST += mass_ST * drop_ST
        mass_T = mass_ST.sum(0)
        log_mass_T = mass_T.log()
        entropy_T = log_mass_T - moment_ST.sum(0) / mass_T
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, peak_T, log_mass_T, entropy_T)
        ctx.temperature, ctx.tiling, ctx.block = temperature, tiling, block
        return target_logit_T - peak_T - log_mass_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_T: Tensor, grad_entropy_T: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        whole_TD, weight_VD, *statistics = ctx.saved_tensors
        hidden_needed, weight_needed = ctx.needs_input_grad[:2]
        # A token that the loss leaves out costs nothing, and whatever it holds cannot spread.
        rows_T = ((grad_logprobs_T != 0) | (grad_entropy_T != 0)).nonzero()[:, 0]
        if len(rows_T) == 0:
            nothing_TD = torch.zeros_like(whole_TD) if hidden_needed else None
            nothing_VD = torch.zeros_like(weight_VD) if weight_needed else None
            return nothing_TD, nothing_VD, None, None, None, None
        # Logit gradients are in units of a thousandth of the largest upstream one: what float16
        # would round to zero is then nothing beside it. In bfloat16 it is all the same.
        largest = torch.maximum(grad_logprobs_T.abs().amax(), grad_entropy_T.abs().amax())
        unit = (largest / 1024).clamp(min=torch.finfo(torch.float32).tiny)
        given = [whole_TD, *statistics, grad_logprobs_T / unit, grad_entropy_T / unit]
        if len(rows_T) < len(whole_TD):
            given = [tensor[rows_T] for tensor in given]
        hidden_TD, *per_token = (tensor.contiguous() for tensor in given)

        tiling, block, (T, D), V = ctx.tiling, ctx.block, hidden_TD.shape, len(weight_VD)
        scale, unscale = 1 / ctx.temperature, unit / ctx.temperature
        token_tiles, width_tiles = triton.cdiv(T, tiling.rows), triton.cdiv(D, tiling.columns)
        grad_logits_Tv = hidden_TD.new_empty(T, block)
        grad_hidden_TD = hidden_TD.new_empty(T, D, dtype=torch.float32) if hidden_needed else None
        grad_weight_VD = torch.empty_like(weight_VD) if weight_needed else None
        for first in range(0, V, block):
            weight_vD = weight_VD[first : first + block]
            v = len(weight_vD)
            sizes = (T, v, D, block)
            _launch(
                kernels.differentiate_logits,
                token_tiles * triton.cdiv(v, BLOCK_TILES * tiling.columns),
                tiling,
                (hidden_TD, weight_vD, grad_logits_Tv, *per_token, *sizes, first, scale),
                RUN=BLOCK_TILES,
            )
            if grad_weight_VD is not None:
                _launch(
                    kernels.multiply,
                    triton.cdiv(v, tiling.rows) * width_tiles,
                    tiling,
                    (grad_logits_Tv, hidden_TD, grad_weight_VD[first : first + v], *sizes, unscale),
                    TRANSPOSED=True,
                    ADDED=False,
                )
            if grad_hidden_TD is not None:
                _launch(
                    kernels.multiply,
                    token_tiles * width_tiles,
                    tiling,
                    (grad_logits_Tv, weight_vD, grad_hidden_TD, *sizes, unscale),
                    TRANSPOSED=False,
                    ADDED=first > 0,
                )
        del grad_logits_Tv  # before the result is made beside its float32 sum
        if grad_hidden_TD is not None:
            grad_hidden_TD = grad_hidden_TD.to(whole_TD.dtype)
            if len(rows_T) < len(whole_TD):
                grad_hidden_TD = torch.zeros_like(whole_TD).index_copy_(0, rows_T, grad_hidden_TD)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None


def token_statistics(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    tiling: Tiling,
    device: str,
    dtypes: Sequence[torch.dtype],
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `cppo.statistics.chunked_token_statistics`, for inputs of one 16-bit type.

    The kernels serve hidden states and weight of the same type, one of `dtypes`, on `device`, both
    contiguous and aligned to 16 bytes, with D a multiple of 8: what the copy engines of GPUs can
    address. All else, float32 and float64 included, goes to the chunked function, whose products
    in those types are the vendor's own; `chunk_tokens` counts there alone.

    `block` is how many vocabulary entries, a multiple of 16, the backward pass takes at a time; by
    default as many as 3 % of the size of float32 logits has room for (see `block_entries`).
    """
    check_inputs(
        hidden_TD, weight_VD, targets_T, temperature=temperature, chunk_tokens=chunk_tokens
    )
    (T, D), V = hidden_TD.shape, len(weight_VD)
    served = (
        hidden_TD.dtype == weight_VD.dtype
        and hidden_TD.dtype in dtypes
        and hidden_TD.device == weight_VD.device == targets_T.device
        and hidden_TD.device.type == device
        and T * V * D > 0
        and D % 8 == 0
        and all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (hidden_TD, weight_VD))
    )
    if not served:
        return chunked_token_statistics(
            hidden_TD, weight_VD, targets_T, temperature=temperature, chunk_tokens=chunk_tokens
        )
    logprobs_T, entropy_T = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weight_VD, targets_T, temperature, tiling, block or block_entries(T, V, D)
    )
    return logprobs_T, entropy_T
