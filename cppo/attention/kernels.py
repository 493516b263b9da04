"""Attention as transformers dispatches it: one call of it, and whether that works here.

Shapes: B rows, H query heads, h key and value heads (H is a multiple of h), L positions, D of a
head. Attention is causal; rows may be padded on the right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cppo.device import Unavailable, claim_device, first_line

Kernel = Callable[..., Tensor]  # called as PyTorch's scaled_dot_product_attention is
KNOWN = ("flash_attention_3", "flash_attention_2", "sdpa", "eager")
# Packages that bring flash attention, best first: import name by transformers' name for it.
FLASH_PACKAGES = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}

log = logging.getLogger(__name__)


def attend(
    name: str, query: Tensor, key: Tensor, value: Tensor, *, lengths: Tensor | None = None
) -> Tensor:
    """What transformers computes under `attn_implementation=name`; (B, L, H, D).

    `query` (B, H, L, D); `key` and `value` (B, h, L, D); `lengths` (B,) tokens of each row, None
    where none is padded. What padded positions give is undefined.
    """
    length = query.shape[2]
    mask: Tensor | None = None
    if lengths is not None:
        positions = torch.arange(length, device=query.device)
        mask = positions < lengths[:, None]  # (B, L)
    scale = query.shape[-1] ** -0.5
    if "flash" in name:
        from transformers.integrations.flash_attention import flash_attention_forward as forward
    else:
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = None if mask is None else causal & mask[:, None, None]
        if name == "sdpa":
            from transformers.integrations.sdpa_attention import sdpa_attention_forward as forward
        elif name == "eager":
            mask = causal if mask is None else mask
            grouped = query.shape[1] != key.shape[1]
            return eager_attention(
                query, key, value, mask, scale=scale, enable_gqa=grouped
            ).transpose(1, 2)
        else:
            raise ValueError(f"attention {name!r} is not known: give one of {', '.join(KNOWN)}")
    layer: Any = nn.Module()
    layer.config = SimpleNamespace(_attn_implementation=name)
    layer.is_causal, layer.num_key_value_groups = True, query.shape[1] // key.shape[1]
    attended: Tensor = forward(layer, query, key, value, mask, scaling=scale)[0]
    return attended


def trial(name: str, device: str, dtype: torch.dtype) -> str:
    """Attends on a few tokens, forward and backward, on full rows and on padded ones, which some
    libraries have kernels of their own for. Why that fails here; empty where it works."""
    if "flash" in name and dtype.itemsize != 2:
        return f"it takes 16-bit numbers only, not {dtype}"
    try:
        for lengths in (None, torch.tensor([16, 9], device=device)):
            query, key, value = (
                torch.randn(2, heads, 16, 64, device=device, dtype=dtype, requires_grad=True)
                for heads in (4, 2, 2)
            )
            with torch.enable_grad():  # whatever the caller is doing
                total = attend(name, query, key, value, lengths=lengths)[:, :9].float().sum()
            total.backward()  # type: ignore[no-untyped-call]
            gradients = (query.grad, key.grad, value.grad)
            if not all(tensor is not None and tensor.isfinite().all() for tensor in gradients):
                return "its gradients are not finite"
    except Exception as error:  # noqa: BLE001 - a foreign kernel may fail in any way
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def usable(candidates: tuple[str, ...], device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The candidates that a trial on this process's device shows to work, in their order; why
    others do not is logged. Unavailable where none works.

    Without transformers, which everything but PyTorch's own goes through, that is taken on trust.
    """
    if find_spec("transformers") is None:
        return tuple(name for name in candidates if name in ("sdpa", "eager"))
    claim_device(device)
    failures = {name: trial(name, device, dtype) for name in candidates}
    working = tuple(name for name, reason in failures.items() if not reason)
    if not working:
        raise Unavailable(
            f"no attention works on {device} ({candidates[-1]}: {failures[candidates[-1]]}): check "
            f"that the device is free, and that PyTorch {torch.__version__} is built for it"
        )
    for name, reason in failures.items():
        if reason:
            log.warning(
                "attention %s fails a trial on %s, and is not used: %s", name, device, reason
            )
    return working


def installed_flash_attention() -> tuple[str, ...]:
    """Flash attention whose package is installed, best first; a trial tells whether it works."""
    return tuple(name for name, package in FLASH_PACKAGES.items() if find_spec(package) is not None)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """What transformers' models write out, called as PyTorch's scaled_dot_product_attention is: the
    softmax in float32, products in the inputs' dtype."""
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    weights = query @ key.transpose(2, 3) * scale
    if is_causal:
        attn_mask = torch.ones(weights.shape[2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        weights = weights.masked_fill(~attn_mask, torch.finfo(weights.dtype).min)
    return weights.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
