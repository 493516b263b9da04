"""Token statistics against whole logits, TRL's chunked function and Liger's fused loss."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from measure import Row, compare, extra_bytes, not_run
from torch import Tensor

from cppo.device import Backend


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (hidden @ weight.T).float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def trls(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK
    from trl.trainer.utils import _ChunkedLogProbFunction as Function

    logprobs, entropy, *_ = Function.apply(
        hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, ("log_probs", "entropy")
    )
    return logprobs, entropy


def ligers(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Its fused loss gives log-probabilities without entropies: less work than the others do."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    losses = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, None, None, -100, 0.0, 0.0, "none"
    )[0]
    return -losses, torch.zeros_like(losses)


def measure(backend: Backend, repeats: int) -> list[Row]:
    on_cpu, vocabulary = backend.device == "cpu", 151_936
    tokens, hidden, dtype = (
        (1024, 1024, torch.float32) if on_cpu else (16_384, 2048, torch.bfloat16)
    )
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator)
    projection = torch.randn(vocabulary, hidden, generator=generator) * hidden**-0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(backend.device)
    upstream = torch.randn(tokens, generator=generator).to(backend.device)
    inputs = [x.to(backend.device, dtype).requires_grad_() for x in (states, projection)]
    products = (inputs[0].detach(), inputs[1].detach())

    def run(kernel: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], None]:
        def both() -> None:
            for tensor in inputs:
                tensor.grad = None
            logprobs, _ = kernel(*inputs, targets)
            (logprobs * upstream).sum().backward()

        return both

    def unavoidable() -> None:
        """The matrix products that no method can do without: logits, and both gradients."""
        logits = products[0] @ products[1].T
        logits @ products[1]
        logits.T @ products[0]

    def without_keeping() -> None:
        """And those that none can do without which does not keep the logits."""
        products[0] @ products[1].T
        unavoidable()

    kernels = {
        "cppo": backend.token_statistics,
        "TRL's chunked": trls,
        "whole logits": materialised,
    }
    what = f"token statistics, T {tokens}, V {vocabulary}, D {hidden}, {str(dtype)[6:]}"
    rows: list[Row] = []
    if on_cpu:
        why = "its kernels are in Triton, which needs a GPU"
        rows.append(not_run(what, why, "cppo", "Liger's fused"))
    elif find_spec("liger_kernel") is None:
        rows.append(not_run(what, "liger-kernel is not installed", "cppo", "Liger's fused"))
    else:
        kernels["Liger's fused"] = ligers
    for name, kernel in kernels.items():
        if name != "cppo":
            target = 1.1 if name == "whole logits" else 1.0
            rows += compare(
                what,
                {"cppo": run(kernels["cppo"]), name: run(kernel)},
                peer=name,
                repeats=repeats,
                targets={"cppo": target} if on_cpu or target == 1.0 else {},
            )
    for floor, name in ((unavoidable, "three matrix products"), (without_keeping, "four of them")):
        rows += compare(
            what,
            {"cppo": run(kernels["cppo"]), name: floor},
            peer=name,
            repeats=repeats,
            targets={} if on_cpu or floor is unavoidable else {"cppo": 1.25},
        )
    if all(row.not_run for row in rows):
        return rows
    logits_bytes = 4 * tokens * vocabulary
    started = {"cppo"} | {row.peer for row in rows if not row.not_run}
    for name, kernel in kernels.items():
        if name not in started:
            continue
        used = extra_bytes(backend, run(kernel))
        rows.append(
            Row(
                what=f"{what}: extra peak memory",
                subject=name,
                peer="float32 logits",
                subject_values=[max(0, used) / 2**20],
                peer_values=[logits_bytes / 2**20],
                unit="MiB",
                target=(0.1 if on_cpu else 0.03) if name == "cppo" else None,
            )
        )
    return rows
