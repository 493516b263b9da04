"""Whether attention in parts is used on a device: it must agree with attention written out, and
where nobody has measured it ahead, be faster than under a mask."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cppo.attention.groups import Layout
from cppo.attention.kernels import eager_attention
from cppo.device import PartialAttention, first_line

# Of the group that is timed: an image of 1,024 tokens, and Qwen2.5-VL-3B's heads.
PROMPT, RESPONSES, HEADS, KEY_HEADS, HEAD_SIZE = 1057, (512,) * 8, 16, 2, 128
ROUNDS = 5

log = logging.getLogger(__name__)


def verified(
    part: PartialAttention, device: str, precision: Sequence[torch.dtype]
) -> PartialAttention | None:
    """`part`, in those of the precisions that it takes in which attention merged from it agrees on
    the device with attention written out; None where there is none. Why others do not is logged:
    operators that PyTorch documents nowhere may change."""
    failures = {d: _disagreement(part, device, d) for d in precision if d in part.precision}
    for dtype, reason in failures.items():
        if reason:
            log.warning(
                "attention in parts fails a trial on %s in %s, and is not used: %s",
                *(device, dtype, reason),
            )
    return _only(part, [dtype for dtype, reason in failures.items() if not reason])


def faster(part: PartialAttention | None, device: str) -> PartialAttention | None:
    """`part`, in those of its precisions in which a group, forward and backward, takes less time by
    it than under a mask, here and now; the times are logged. None where there is none.

    Which of two that are about as fast is chosen may differ between launches, and processes of one,
    and with it the last digits of what is computed: so there is none where algorithms are to be
    deterministic.
    """
    if part is None:
        return None
    if torch.are_deterministic_algorithms_enabled():
        log.info("attention in groups on %s is under a mask: timing is not deterministic", device)
        return None
    masked = Layout(prompts=[PROMPT], responses=[RESPONSES], device=device)
    chosen = []
    for dtype in part.precision:
        try:
            under_mask, in_parts = _seconds([masked, replace(masked, part=part)], dtype)
        except Exception as error:  # noqa: BLE001 - a foreign kernel may fail in any way
            reason = f"{type(error).__name__}: {first_line(error)}"
            log.warning("attention in parts cannot be timed on %s in %s: %s", device, dtype, reason)
            continue
        log.info(
            "attention in groups on %s in %s: %.2f ms in parts, %.2f ms under a mask; the faster "
            "is used",
            *(device, dtype, 1000 * in_parts, 1000 * under_mask),
        )
        if in_parts < under_mask:
            chosen.append(dtype)
    return _only(part, chosen)


def _only(part: PartialAttention, precision: Sequence[torch.dtype]) -> PartialAttention | None:
    return replace(part, precision=tuple(precision)) if precision else None


def _disagreement(part: PartialAttention, device: str, dtype: torch.dtype) -> str:
    """Two prompts, and two responses to each, forward and backward. What is wrong; empty where it
    agrees."""
    prompts, responses = (200, 130), ((150, 7), (70, 9))  # kernels go by 64 or 128 at a time
    length = sum(prompts) + sum(map(sum, responses))
    generator = torch.Generator().manual_seed(0)
    *inputs, upstream = (
        torch.randn(1, length, heads, HEAD_SIZE, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        for heads in (4, 2, 2, 4)
    )
    scale, allowed = HEAD_SIZE**-0.5, 1e-4 if dtype.itemsize > 2 else 0.02
    layout = Layout(prompts=prompts, responses=responses, device=device, part=part)
    contexts, pieces = layout.segments.prompts.places, layout.segments.own.places

    def differentiate(attend: Callable[[Sequence[Tensor]], Tensor]) -> Sequence[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():  # whatever the caller is doing
            attended = attend(leaves)
            return attended, *torch.autograd.grad(attended, leaves, upstream.transpose(1, 2))

    def written_out(given: Sequence[Tensor]) -> Tensor:
        def alone(*places: slice) -> Tensor:
            q, k, v = (torch.cat([x[:, :, place] for place in places], dim=2) for x in given)
            return eager_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=True)

        own = iter(pieces[len(prompts) :])
        behind = [
            alone(context, next(own))[:, :, context.stop - context.start :]
            for context, lengths in zip(contexts, responses, strict=True)
            for _ in lengths
        ]
        return torch.cat([*map(alone, contexts), *behind], dim=2).transpose(1, 2)

    def merged(given: Sequence[Tensor]) -> Tensor:
        return layout.attend(*given, layer=0, scale=scale, kernel=eager_attention)

    try:
        truth = differentiate(written_out)
        pairs = zip(differentiate(merged), truth, strict=True)
        agrees = all((found - true).norm() <= allowed * true.norm() for found, true in pairs)
    except Exception as error:  # noqa: BLE001 - what is PyTorch's own may change in any way
        return f"{type(error).__name__}: {first_line(error)}"
    return "" if agrees else "it differs from attention written out"


def _seconds(layouts: Sequence[Layout], dtype: torch.dtype) -> list[float]:
    """Each layout's least time of several rounds, in turn with the others."""
    device = layouts[0].device
    length = sum(layouts[0].segments.own.lengths)
    *inputs, upstream = (
        torch.zeros(1, length, heads, HEAD_SIZE, device=device, dtype=dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )

    def once(layout: Layout) -> float:
        _finish(device)
        started = time.perf_counter()
        with torch.enable_grad():
            leaves = [tensor.transpose(1, 2).requires_grad_() for tensor in inputs]
            attended = layout.attend(
                *leaves, layer=0, scale=HEAD_SIZE**-0.5, kernel=scaled_dot_product_attention
            )
            torch.autograd.grad(attended, leaves, upstream)
        _finish(device)
        return time.perf_counter() - started

    for layout in layouts:
        once(layout)  # what is compiled or looked up is so now
    rounds = [[once(layout) for layout in layouts] for _ in range(ROUNDS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def _finish(device: torch.device | str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
