"""What the kernels are tried with before they are used, and the choice that follows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from cppo.device import first_line
from cppo.statistics import chunked_token_statistics
from cppo_triton.tiling import Tiling

TokenStatistics = Callable[..., tuple[Tensor, Tensor]]

# Several tiles, splits and blocks, each cut short at its end.
TOKENS, VOCABULARY, HIDDEN, BLOCK = 200, 5008, 144, 2560
NAMES = ("log-probability", "entropy", "gradient of hidden states", "gradient of the weight")
LIMITS = (1e-5, 1e-5, 0.01, 0.01)  # relative; gradients are rounded to 16 bits, twice

log = logging.getLogger(__name__)


def token_statistics_for(
    device: str, precision: Sequence[torch.dtype], tilings: Sequence[Tiling]
) -> TokenStatistics:
    """Token statistics for a device: by kernels, in the first of the tilings that a trial in all of
    the 16-bit types of `precision` shows to work; or else chunked, and why is logged."""
    dtypes = tuple(dtype for dtype in precision if dtype.itemsize == 2)
    if find_spec("triton") is None:
        log.info("token statistics on %s are chunked: Triton is not installed", device)
        return chunked_token_statistics
    # Triton multiplies on such hardware too, but one element at a time.
    if torch.bfloat16 not in dtypes:
        log.info("token statistics on %s are chunked: it has no matrix units for bfloat16", device)
        return chunked_token_statistics
    from cppo_triton.token_statistics import token_statistics

    reasons = []
    for tiling in tilings:
        kernel = partial(token_statistics, tiling=tiling, device=device, dtypes=dtypes)
        failures = {dtype: trial(partial(kernel, block=BLOCK), device, dtype) for dtype in dtypes}
        if not any(failures.values()):
            return kernel
        reasons += [f"{reason} ({tiling}, {dtype})" for dtype, reason in failures.items() if reason]
    log.warning(
        "token statistics in Triton fail a trial on %s, and are not used: %s",
        device,
        "; ".join(reasons),
    )
    return chunked_token_statistics


def trial(kernel: TokenStatistics, device: str, dtype: torch.dtype) -> str:
    """Runs `kernel` on a few tokens, forward and backward. Why that fails here, or how far it is
    from float64 on the CPU; empty where they agree."""
    with torch.device("cpu"):  # whatever the caller's default is
        generator = torch.Generator().manual_seed(0)
        hidden_TD = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
        weight_VD = (torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype)
        targets_T = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
        upstream_2T = torch.randn(2, TOKENS, generator=generator)

    def differentiate(function: TokenStatistics, where: str, wide: torch.dtype) -> list[Tensor]:
        inputs = [x.to(where, wide).requires_grad_() for x in (hidden_TD, weight_VD)]
        with torch.enable_grad():  # whatever the caller is doing
            results = function(*inputs, targets_T.to(where), temperature=0.7)
            upstream = [row_T.to(where, results[0].dtype) for row_T in upstream_2T]
            gradients = torch.autograd.grad(results, inputs, upstream)
        return [tensor.detach().to("cpu", torch.float64) for tensor in (*results, *gradients)]

    truth = differentiate(chunked_token_statistics, "cpu", torch.float64)
    try:
        found = differentiate(kernel, device, dtype)
    except Exception as error:  # noqa: BLE001 - a foreign compiler may fail in any way
        return f"{type(error).__name__}: {first_line(error)}"
    for name, limit, a, b in zip(NAMES, LIMITS, found, truth, strict=True):
        error_share = ((a - b).norm() / b.norm()).item()
        if not error_share <= limit:  # NaN is no agreement
            return f"its {name} is {error_share:.2g} off, relative to float64; {limit} is allowed"
    return ""
