"""Each attention choice against a float64 reference, forward and gradient.

The shapes are a vision-language model's: grouped-query heads, an image's worth of prefix before a
short response, and rows of different lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cppo.attention import Kernel, attend, eager_attention
from cppo.attention.groups import Layout
from cppo.device import first_line
from cppo.doctor.finding import (
    Examination,
    Finding,
    at_most,
    holds,
    not_run,
    relative_error,
    short,
)

ROWS, HEADS, KEY_HEADS, HEAD_SIZE = 2, 8, 2, 64
LENGTHS = (1088, 700)  # of the rows: 1,024 image tokens and a response, and a smaller image
PROMPTS, RESPONSES = (640, 500), ((64, 40, 12), (33,))  # of groups
# Relative errors, by norm. Of what is computed in 16 bits, rounding alone is 2^-9 and 2^-12.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# What PyTorch says where none of the kernels that are allowed fits; anything else is a failure.
NO_KERNEL = ("No available kernel", "No viable backend", "No execution plans support the graph")


def examine(given: Examination) -> Iterator[Finding]:
    for dtype in given.backend.precision:
        case = _Case(dtype)
        for name in given.backend.attention:
            if "flash" in name and dtype.itemsize != 2:
                continue  # its kernels take nothing wider; `auto` knows
            yield from case.compare(name, name, given.device)
        if "sdpa" in given.backend.attention:
            yield from _kernels(case, given.device)
        yield from _in_groups(given, dtype)


def _kernels(case: _Case, device: torch.device) -> Iterator[Finding]:
    """PyTorch's own choice among its kernels is `sdpa`; here each of them by itself."""
    if not _heeds_choice(device, case.dtype):
        yield not_run(f"sdpa's kernels {short(case.dtype)}", "this device leaves no choice of them")
        return
    for name, kernel in SDPBackend.__members__.items():
        if kernel is SDPBackend.ERROR:
            continue
        label = f"sdpa's {name.lower()}"
        what = f"{label} {short(case.dtype)}"
        try:
            with sdpa_kernel(kernel):
                yield from case.compare(label, "sdpa", device)
        except RuntimeError as error:
            if any(reason in str(error) for reason in NO_KERNEL):
                yield not_run(what, "not for these shapes, or not on this device")
            else:
                yield holds(what, False, first_line(error))


def _in_groups(given: Examination, dtype: torch.dtype) -> Iterator[Finding]:
    """The group layout: two prompts with their responses in one packed sequence, attended to in
    each way there is."""
    generator = torch.Generator().manual_seed(0)
    length = sum(PROMPTS) + sum(map(sum, RESPONSES))
    inputs = [
        torch.randn(1, heads, length, HEAD_SIZE, generator=generator).to(dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    upstream = torch.randn(1, length, HEADS, HEAD_SIZE, generator=generator).to(dtype)

    def differentiate(
        attend: Callable[..., Tensor], device: torch.device | str, precision: torch.dtype
    ) -> tuple[Tensor, ...]:
        leaves = [x.to(device, precision, copy=True).requires_grad_() for x in inputs]
        attended = attend(*leaves)
        return attended, *torch.autograd.grad(attended, leaves, upstream.to(device, precision))

    masked = Layout(prompts=PROMPTS, responses=RESPONSES, device=given.device)
    ways: dict[str, tuple[Layout, Kernel]] = {
        "sdpa": (masked, scaled_dot_product_attention),
        "eager": (masked, eager_attention),
    }
    if (part := given.backend.partial_attention) and dtype in part.precision:
        ways["merged attention"] = (replace(masked, part=part), scaled_dot_product_attention)
    truth, *true_gradients = differentiate(_exact_in_groups, "cpu", torch.float64)
    for name, (layout, kernel) in ways.items():
        attend = partial(layout.attend, layer=0, scale=HEAD_SIZE**-0.5, kernel=kernel)
        attended, *gradients = differentiate(attend, given.device, dtype)
        what, limit = f"{name} in groups {short(dtype)}", LIMITS[dtype]
        yield at_most(f"{what}, forward", relative_error(attended, truth), limit)
        worst = max(map(relative_error, gradients, true_gradients))
        yield at_most(f"{what}, gradient", worst, limit)


def _exact_in_groups(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each prompt, and each response behind its prompt, by itself; (1, L, H, D)."""
    prompts, responses, start, end = [], [], 0, sum(PROMPTS)
    for prompt, lengths in zip(PROMPTS, RESPONSES, strict=True):
        for number, length in enumerate((0, *lengths)):
            places = [*range(start, start + prompt), *range(end, end + length)]
            q, k, v = (x[:, :, places] for x in (query, key, value))
            attended = _exact(q, k, v, torch.ones(1, len(places), dtype=torch.bool))
            if number:
                responses.append(attended[:, prompt:])
            else:
                prompts.append(attended)
            end += length
        start += prompt
    return torch.cat([*prompts, *responses], dim=1)


def _heeds_choice(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device asks which kernels are allowed: with none, it must refuse."""
    tensor = torch.ones(1, 1, 8, 8, device=device, dtype=dtype)
    try:
        with sdpa_kernel(SDPBackend.ERROR):
            scaled_dot_product_attention(tensor, tensor, tensor)
    except RuntimeError as error:
        if not any(reason in str(error) for reason in NO_KERNEL):
            raise
        return True
    return False


class _Case:
    """Inputs in one precision, and what is true of them."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(heads: int) -> Tensor:
            shape = (ROWS, heads, max(LENGTHS), HEAD_SIZE)
            return torch.randn(shape, generator=generator).to(dtype)

        self.dtype = dtype
        self.inputs = (draw(HEADS), draw(KEY_HEADS), draw(KEY_HEADS))
        self.upstream = draw(HEADS).transpose(1, 2)
        self.lengths = torch.tensor(LENGTHS)
        self.valid = torch.arange(max(LENGTHS)) < self.lengths[:, None]
        self._truths: dict[bool, list[Tensor]] = {}

    def compare(self, label: str, name: str, device: torch.device) -> Iterator[Finding]:
        """Two findings on rows of one length, and two on ragged ones."""
        for ragged in (False, True):
            if ragged not in self._truths:
                self._truths[ragged] = self._differentiate("exact", torch.device("cpu"), ragged)
            forward, *gradients = self._differentiate(name, device, ragged)
            true_forward, *true_gradients = self._truths[ragged]
            rows = "ragged rows" if ragged else "full rows"
            limit = LIMITS[self.dtype]
            what = f"{label} {short(self.dtype)}, {rows}"
            yield at_most(f"{what}, forward", relative_error(forward, true_forward), limit)
            worst = max(map(relative_error, gradients, true_gradients))
            yield at_most(f"{what}, gradient", worst, limit)

    def _differentiate(self, name: str, device: torch.device, ragged: bool) -> list[Tensor]:
        """The result on valid positions, and the gradients of the inputs."""
        wide = torch.float64 if name == "exact" else self.dtype
        inputs = [x.detach().to(device, wide).requires_grad_() for x in self.inputs]
        query, key, value = inputs
        lengths = self.lengths.to(device) if ragged else None
        valid = self.valid.to(device) if ragged else torch.ones_like(self.valid).to(device)
        if name == "exact":
            attended = _exact(query, key, value, valid)
        else:
            attended = attend(name, query, key, value, lengths=lengths)
        kept = attended[valid]
        kept.backward(self.upstream.to(device, wide)[valid])  # type: ignore[no-untyped-call]
        return [kept, *(x.grad for x in inputs if x.grad is not None)]


def _exact(query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    """Attention as it is defined, (B, L, H, D); shares nothing with what it is the truth for."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / HEAD_SIZE**0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~(causal & valid[:, None, None]), -torch.inf)
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value)
