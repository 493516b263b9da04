"""Hidden states to log-probability and entropy per token, without ever holding the logits whole.

Shapes: T tokens, V vocabulary, D hidden size; a lower-case v or t is one block of V or T.

The vocabulary is walked in blocks and the tokens in chunks, forward and backward alike, so that the
largest intermediate is one chunk of tokens by one block of the vocabulary. What a token needs of a
block is the largest logit and two sums, relative to it; blocks are merged as in an online softmax.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

VOCABULARY_BLOCK = 8192


def _vocabulary_blocks(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the projection, each widened alone: the whole is never copied."""
    for start in range(0, len(weight_VD), VOCABULARY_BLOCK):
        block = slice(start, min(start + VOCABULARY_BLOCK, len(weight_VD)))
        yield block, weight_VD[block].to(dtype)


def _locate_targets(targets_t: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in a block, and their columns there (0 for those that do not)."""
    inside_t = (targets_t >= block.start) & (targets_t < block.stop)
    return inside_t, torch.where(inside_t, targets_t - block.start, 0)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        # float32 products of bfloat16 numbers are exact; a bfloat16 product would round the logits
        # themselves to 8 bits, and so would an autocast around the caller.
        dtype = torch.promote_types(
            torch.promote_types(hidden_TD.dtype, weight_VD.dtype), torch.float32
        )
        tokens = len(hidden_TD)
        # With m the largest logit, mass = sum e^(z-m) and moment = sum e^(z-m) (z-m). The entropy,
        # log(mass) - moment / mass, then adds two numbers that are never negative.
        peak_T = hidden_TD.new_full((tokens,), torch.finfo(dtype).min, dtype=dtype)
        mass_T = torch.zeros_like(peak_T)
        moment_T = torch.zeros_like(peak_T)
        target_logit_T = torch.full_like(peak_T, torch.nan)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for block, weight_vD in _vocabulary_blocks(weight_VD, dtype):
                for start in range(0, tokens, chunk_tokens):
                    chunk = slice(start, start + chunk_tokens)
                    logits_tv = (hidden_TD[chunk].to(dtype) / temperature) @ weight_vD.T
                    inside_t, column_t = _locate_targets(targets_T[chunk], block)
                    found_t = logits_tv.gather(1, column_t[:, None])[:, 0]
                    target_logit_T[chunk] = torch.where(inside_t, found_t, target_logit_T[chunk])

                    old_peak_t = peak_T[chunk]
                    peak_t = torch.maximum(old_peak_t, logits_tv.amax(1))
                    drop_t = old_peak_t - peak_t
                    logits_tv -= peak_t[:, None]
                    old_mass_t = drop_t.exp() * mass_T[chunk]
                    old_moment_t = drop_t.exp() * moment_T[chunk] + old_mass_t * drop_t
                    mass_tv = logits_tv.exp()
                    mass_T[chunk] = old_mass_t + mass_tv.sum(1)
                    moment_T[chunk] = old_moment_t + logits_tv.mul_(mass_tv).sum(1)
                    peak_T[chunk] = peak_t
        log_mass_T = mass_T.log()
        entropy_T = log_mass_T - moment_T / mass_T
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, peak_T, log_mass_T, entropy_T)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return target_logit_T - peak_T - log_mass_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_T: Tensor, grad_entropy_T: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_TD, weight_VD, targets_T, peak_T, log_mass_T, entropy_T = ctx.saved_tensors
        dtype = entropy_T.dtype
        hidden_needed, weight_needed = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.zeros_like(hidden_TD, dtype=dtype) if hidden_needed else None
        grad_weight_VD = torch.zeros_like(weight_VD) if weight_needed else None
        # A token that the loss leaves out costs nothing, and whatever it holds cannot spread.
        rows_T = ((grad_logprobs_T != 0) | (grad_entropy_T != 0)).nonzero()[:, 0]
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for block, weight_vD in _vocabulary_blocks(weight_VD, dtype):
                grad_weight_vD = torch.zeros_like(weight_vD)
                for rows_t in torch.split(rows_T, ctx.chunk_tokens):
                    hidden_tD = hidden_TD[rows_t].to(dtype) / ctx.temperature
                    logprobs_tv = hidden_tD @ weight_vD.T
                    logprobs_tv -= peak_T[rows_t, None]
                    logprobs_tv -= log_mass_T[rows_t, None]
                    grad_logprobs_t = grad_logprobs_T[rows_t]
                    # d log p_y / dz = [y] - p;  dH / dz = -p (log p + H)
                    probs_tv = logprobs_tv.exp()
                    grad_logits_tv = logprobs_tv.add_(entropy_T[rows_t, None])
                    grad_logits_tv *= -grad_entropy_T[rows_t, None]
                    grad_logits_tv -= grad_logprobs_t[:, None]
                    grad_logits_tv *= probs_tv
                    inside_t, column_t = _locate_targets(targets_T[rows_t], block)
                    grad_logits_tv.scatter_add_(
                        1, column_t[:, None], torch.where(inside_t, grad_logprobs_t, 0.0)[:, None]
                    )
                    if grad_hidden_TD is not None:
                        grad_hidden_TD[rows_t] += grad_logits_tv @ weight_vD / ctx.temperature
                    if grad_weight_VD is not None:
                        grad_weight_vD.addmm_(grad_logits_tv.T, hidden_tD)
                if grad_weight_VD is not None:
                    grad_weight_VD[block] = grad_weight_vD
        if grad_hidden_TD is not None:
            grad_hidden_TD = grad_hidden_TD.to(hidden_TD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None


def check_inputs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
) -> None:
    """ValueError for what no implementation of the statistics takes."""
    if hidden_TD.dim() != 2 or targets_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"hidden_TD {tuple(hidden_TD.shape)} and targets_T {tuple(targets_T.shape)} do not "
            "fit: pass (T, D) and (T,)"
        )
    if weight_VD.dim() != 2 or weight_VD.shape[1] != hidden_TD.shape[1]:
        raise ValueError(
            f"weight_VD {tuple(weight_VD.shape)} does not fit hidden_TD {tuple(hidden_TD.shape)}: "
            "pass (V, D) with the same D"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")


def chunked_token_statistics(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """The log-probability of each target and the entropy of its distribution, in nats.

    The distribution is softmax(hidden @ weight.T / temperature). `hidden_TD` (T, D) are the states
    that predict `targets_T` (T,), `weight_VD` (V, D) the output projection. Inputs below float32
    are widened block by block before the product, and gradients are summed in float32 before they
    are rounded to their input's type; float64 stays float64. Both results are differentiable once,
    with respect to hidden states and weight; a frozen input costs no gradient work, nor does a
    token whose results get no gradient. A target outside the vocabulary has a log-probability of
    NaN.

    Beyond results and gradients, memory holds a few tensors of `chunk_tokens` by at most 8192
    vocabulary entries and as many widened rows of the weight, whatever T and V; the gradient of the
    hidden states is summed in one float32 tensor (T, D). Returns (logprobs_T, entropy_T), float32
    or float64. Raises ValueError for shapes that do not fit, or a temperature or a chunk that is
    not positive.
    """
    check_inputs(
        hidden_TD, weight_VD, targets_T, temperature=temperature, chunk_tokens=chunk_tokens
    )
    logprobs_T, entropy_T = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weight_VD, targets_T, temperature, chunk_tokens
    )
    return logprobs_T, entropy_T


token_statistics = chunked_token_statistics
