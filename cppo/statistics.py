"""Hidden states to log-probability and entropy per token, without ever holding the logits whole.

Shapes: T tokens, V vocabulary, D hidden size; a lower-case v or t is one block of V or T; R the
tokens that a gradient comes back for.

The vocabulary is walked in blocks and the tokens in chunks, forward and backward alike, so that the
largest intermediate is one chunk of tokens by one block of the vocabulary. What a token needs of a
block is the largest logit and a few sums relative to it; blocks merge as in an online softmax.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

VOCABULARY_BLOCK = 8192
VOCABULARY_BLOCK_ON_CPU = 1024  # what its caches hold; other devices want large products


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

    Beyond results and gradients, memory holds a few tensors of `chunk_tokens` by a block of the
    vocabulary (1024 entries on a CPU, 8192 elsewhere) and a block's widened rows of the weight,
    whatever T and V; the gradient of the hidden states is summed in one float32 tensor (T, D).
    Returns (logprobs_T, entropy_T), float32 or float64. Raises ValueError for shapes that do not
    fit, or a temperature or a chunk that is not positive.
    """
    check_inputs(
        hidden_TD, weight_VD, targets_T, temperature=temperature, chunk_tokens=chunk_tokens
    )
    logprobs_T, entropy_T = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weight_VD, targets_T, temperature, chunk_tokens
    )
    return logprobs_T, entropy_T


token_statistics = chunked_token_statistics


def token_divergence(
    hidden_TD: Tensor,
    other_TD: Tensor,
    weight_VD: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Tensor:
    """KL(p || q) of each token over the whole vocabulary, (T,), in nats.

    p is softmax(hidden @ weight.T / temperature), and q the same of `other_TD`: the policy on two
    views of an image, after the same tokens. Differentiable once, with respect to both states and
    the weight; precision, memory and errors are those of `chunked_token_statistics`.
    """
    if hidden_TD.dim() != 2 or other_TD.shape != hidden_TD.shape:
        raise ValueError(
            f"hidden_TD {tuple(hidden_TD.shape)} and other_TD {tuple(other_TD.shape)} do not fit: "
            "pass (T, D) twice"
        )
    _check(hidden_TD, weight_VD, temperature, chunk_tokens)
    divergence_T: Tensor = _TokenDivergence.apply(  # type: ignore[no-untyped-call]
        hidden_TD, other_TD, weight_VD, temperature, chunk_tokens
    )
    return divergence_T


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
    _check(hidden_TD, weight_VD, temperature, chunk_tokens)


def _check(hidden_TD: Tensor, weight_VD: Tensor, temperature: float, chunk_tokens: int) -> None:
    if weight_VD.dim() != 2 or weight_VD.shape[1] != hidden_TD.shape[1]:
        raise ValueError(
            f"weight_VD {tuple(weight_VD.shape)} does not fit hidden_TD {tuple(hidden_TD.shape)}: "
            "pass (V, D) with the same D"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")


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
        dtype = _wide(hidden_TD, weight_VD)
        tokens = len(hidden_TD)
        # With m the largest logit, mass = sum e^(z-m) and moment = sum e^(z-m) (z-m). The entropy,
        # log(mass) - moment / mass, then adds two numbers that are never negative.
        peak_T = hidden_TD.new_full((tokens,), torch.finfo(dtype).min, dtype=dtype)
        mass_T, moment_T = torch.zeros_like(peak_T), torch.zeros_like(peak_T)
        target_logit_T = torch.full_like(peak_T, torch.nan)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for block, weight_vD in _vocabulary_blocks(weight_VD, dtype):
                for chunk in _chunks(tokens, chunk_tokens):
                    logits_tv = _logits(hidden_TD[chunk], weight_vD, temperature)
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
        hidden_TD, weight_VD, *others = ctx.saved_tensors
        # A token that the loss leaves out costs nothing, and whatever it holds cannot spread.
        rows_R = ((grad_logprobs_T != 0) | (grad_entropy_T != 0)).nonzero()[:, 0]
        hidden_RD = _select(hidden_TD, rows_R)
        targets_R, peak_R, log_mass_R, entropy_R, grad_logprobs_R, grad_entropy_R = (
            _select(tensor_T, rows_R) for tensor_T in (*others, grad_logprobs_T, grad_entropy_T)
        )
        through_entropy = bool((grad_entropy_R != 0).any())
        dtype, heat = peak_R.dtype, ctx.temperature
        grad_hidden_RD = _zeros_if(ctx.needs_input_grad[0], hidden_RD, dtype)
        grad_weight_VD = _zeros_if(ctx.needs_input_grad[1], weight_VD)
        for block, weight_vD in _vocabulary_blocks(weight_VD, dtype):
            with (
                torch.autocast(hidden_TD.device.type, enabled=False),
                _gradient_of(grad_weight_VD, block, dtype) as grad_weight_vD,
            ):
                for chunk in _chunks(len(rows_R), ctx.chunk_tokens):
                    # d log p_y / dz = [y] - p;  dH / dz = -p (log p + H)
                    hidden_tD = hidden_RD[chunk]
                    logprobs_tv = _logits(hidden_tD, weight_vD, heat)
                    # One by one: their sum would be rounded at the size of the largest logit.
                    logprobs_tv -= peak_R[chunk, None]
                    logprobs_tv -= log_mass_R[chunk, None]
                    inside_t, column_t = _locate_targets(targets_R[chunk], block)
                    grad_t = grad_logprobs_R[chunk]
                    if through_entropy:
                        grad_tv = logprobs_tv.exp()
                        logprobs_tv += entropy_R[chunk, None]
                        logprobs_tv *= -grad_entropy_R[chunk, None]
                        grad_tv *= logprobs_tv.sub_(grad_t[:, None])
                    else:
                        grad_tv = logprobs_tv.exp_().mul_(-grad_t[:, None])
                    at_target_t = torch.where(inside_t, grad_t, 0.0)
                    grad_tv.scatter_add_(1, column_t[:, None], at_target_t[:, None])
                    grad_hidden_tD = _part(grad_hidden_RD, chunk)
                    _pass_on(grad_tv, hidden_tD, weight_vD, grad_hidden_tD, grad_weight_vD, heat)
        return _spread(grad_hidden_RD, hidden_TD, rows_R), grad_weight_VD, None, None, None


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        other_TD: Tensor,
        weight_VD: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        dtype = _wide(hidden_TD, weight_VD)
        tokens = len(hidden_TD)
        # KL = sum p (z - z') - log sum e^z + log sum e^z', with z the logits and z' the other's.
        peak_T = hidden_TD.new_full((tokens,), torch.finfo(dtype).min, dtype=dtype)
        other_peak_T = peak_T.clone()
        mass_T, other_mass_T, gap_T = (torch.zeros_like(peak_T) for _ in range(3))
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for _, weight_vD in _vocabulary_blocks(weight_VD, dtype):
                for chunk in _chunks(tokens, chunk_tokens):
                    logits_tv = _logits(hidden_TD[chunk], weight_vD, temperature)
                    other_tv = _logits(other_TD[chunk], weight_vD, temperature)
                    gap_tv = logits_tv - other_tv

                    peak_t = torch.maximum(peak_T[chunk], logits_tv.amax(1))
                    shrink_t = (peak_T[chunk] - peak_t).exp()
                    mass_tv = logits_tv.sub_(peak_t[:, None]).exp_()
                    mass_T[chunk] = shrink_t * mass_T[chunk] + mass_tv.sum(1)
                    gap_T[chunk] = shrink_t * gap_T[chunk] + mass_tv.mul_(gap_tv).sum(1)
                    peak_T[chunk] = peak_t

                    peak_t = torch.maximum(other_peak_T[chunk], other_tv.amax(1))
                    shrink_t = (other_peak_T[chunk] - peak_t).exp()
                    mass_tv = other_tv.sub_(peak_t[:, None]).exp_()
                    other_mass_T[chunk] = shrink_t * other_mass_T[chunk] + mass_tv.sum(1)
                    other_peak_T[chunk] = peak_t
        log_mass_T, other_log_mass_T = mass_T.log(), other_mass_T.log()
        divergence_T = gap_T / mass_T - (peak_T - other_peak_T) - (log_mass_T - other_log_mass_T)
        norms = (peak_T, log_mass_T, other_peak_T, other_log_mass_T)
        ctx.save_for_backward(hidden_TD, other_TD, weight_VD, *norms, divergence_T)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return divergence_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_T: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden_TD, other_TD, weight_VD, *others = ctx.saved_tensors
        rows_R = (grad_T != 0).nonzero()[:, 0]
        hidden_RD, other_RD = _select(hidden_TD, rows_R), _select(other_TD, rows_R)
        peak_R, log_mass_R, other_peak_R, other_log_mass_R, divergence_R, grad_R = (
            _select(tensor_T, rows_R) for tensor_T in (*others, grad_T)
        )
        dtype, heat = peak_R.dtype, ctx.temperature
        grad_hidden_RD = _zeros_if(ctx.needs_input_grad[0], hidden_RD, dtype)
        grad_other_RD = _zeros_if(ctx.needs_input_grad[1], other_RD, dtype)
        grad_weight_VD = _zeros_if(ctx.needs_input_grad[2], weight_VD)
        for block, weight_vD in _vocabulary_blocks(weight_VD, dtype):
            with (
                torch.autocast(hidden_TD.device.type, enabled=False),
                _gradient_of(grad_weight_VD, block, dtype) as grad_weight_vD,
            ):
                for chunk in _chunks(len(rows_R), ctx.chunk_tokens):
                    # dKL / dz = p (log p - log q - KL);  dKL / dz' = q - p
                    hidden_tD, other_tD = hidden_RD[chunk], other_RD[chunk]
                    grad_tv = _logits(hidden_tD, weight_vD, heat)
                    grad_tv.sub_(peak_R[chunk, None]).sub_(log_mass_R[chunk, None])
                    other_tv = _logits(other_tD, weight_vD, heat)
                    other_tv.sub_(other_peak_R[chunk, None]).sub_(other_log_mass_R[chunk, None])
                    probs_tv = grad_tv.exp()
                    grad_tv.sub_(other_tv).sub_(divergence_R[chunk, None])
                    grad_tv.mul_(probs_tv).mul_(grad_R[chunk, None])
                    other_tv.exp_().sub_(probs_tv).mul_(grad_R[chunk, None])
                    grad_hidden_tD = _part(grad_hidden_RD, chunk)
                    _pass_on(grad_tv, hidden_tD, weight_vD, grad_hidden_tD, grad_weight_vD, heat)
                    grad_other_tD = _part(grad_other_RD, chunk)
                    _pass_on(other_tv, other_tD, weight_vD, grad_other_tD, grad_weight_vD, heat)
        return (
            _spread(grad_hidden_RD, hidden_TD, rows_R),
            _spread(grad_other_RD, other_TD, rows_R),
            grad_weight_VD,
            None,
            None,
        )


@contextlib.contextmanager
def _gradient_of(
    grad_VD: Tensor | None, block: slice, dtype: torch.dtype
) -> Iterator[Tensor | None]:
    """A block of the weight's gradient to add to, wide; rounded to the weight's type at the end."""
    if grad_VD is None or grad_VD.dtype == dtype:
        yield grad_VD if grad_VD is None else grad_VD[block]
        return
    wide_vD = torch.zeros_like(grad_VD[block], dtype=dtype)
    yield wide_vD
    grad_VD[block] = wide_vD


def _pass_on(
    grad_tv: Tensor,
    hidden_tD: Tensor,
    weight_vD: Tensor,
    grad_hidden_tD: Tensor | None,
    grad_weight_vD: Tensor | None,
    temperature: float,
) -> None:
    """Adds what a tile of the logits' gradient gives to those that are wanted."""
    if grad_hidden_tD is not None:
        grad_hidden_tD.addmm_(grad_tv, weight_vD, alpha=1 / temperature)
    if grad_weight_vD is not None:
        grad_weight_vD.addmm_(grad_tv.T, hidden_tD.to(grad_tv.dtype), alpha=1 / temperature)


def _zeros_if(needed: bool, like: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    return torch.zeros_like(like, dtype=dtype) if needed else None


def _part(grad_RD: Tensor | None, chunk: slice) -> Tensor | None:
    return None if grad_RD is None else grad_RD[chunk]


def _wide(hidden_TD: Tensor, weight_VD: Tensor) -> torch.dtype:
    """To compute in. Products of bfloat16 numbers are exact in float32; in bfloat16 they would
    round the logits themselves to 8 bits, and so would an autocast around the caller."""
    return torch.promote_types(torch.promote_types(hidden_TD.dtype, weight_VD.dtype), torch.float32)


def _logits(hidden_tD: Tensor, weight_vD: Tensor, temperature: float) -> Tensor:
    """A new tile, to be written over."""
    nothing = weight_vD.new_empty(())
    return torch.addmm(
        nothing, hidden_tD.to(weight_vD.dtype), weight_vD.T, beta=0, alpha=1 / temperature
    )


def _vocabulary_blocks(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the projection, each widened alone: the whole is never copied."""
    size = VOCABULARY_BLOCK_ON_CPU if weight_VD.device.type == "cpu" else VOCABULARY_BLOCK
    for block in _chunks(len(weight_VD), size):
        yield block, weight_VD[block].to(dtype)


def _chunks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _locate_targets(targets_t: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in a block, and their columns there (0 for those that do not)."""
    inside_t = (targets_t >= block.start) & (targets_t < block.stop)
    return inside_t, torch.where(inside_t, targets_t - block.start, 0)


def _select(tensor_T: Tensor, rows_R: Tensor) -> Tensor:
    """Without a copy where all are wanted."""
    return tensor_T if len(rows_R) == len(tensor_T) else tensor_T[rows_R]


def _spread(grad_RD: Tensor | None, hidden_TD: Tensor, rows_R: Tensor) -> Tensor | None:
    """What was summed for the selected, in the states' own type, and zero for the others."""
    if grad_RD is None:
        return None
    narrow_RD = grad_RD.to(hidden_TD.dtype)
    if len(rows_R) == len(hidden_TD):
        return narrow_RD
    return torch.zeros_like(hidden_TD).index_copy_(0, rows_R, narrow_RD)
