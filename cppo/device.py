"""The device interface: what one machine can do, and the choice of a backend at launch.

This file knows no vendor. Each backend is a module with `probe() -> Backend`, found through the
entry-point group `cppo.backends`; an outside package uses the same door as the first-party ones.
Importing this file imports no torch, so that the command line answers `--help` at once.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP = "cppo.backends"
PRECISIONS = ("float32", "bfloat16", "float16")

log = logging.getLogger(__name__)


class Unavailable(RuntimeError):  # noqa: N818 - the contract's name
    """A backend cannot run on this machine; the message says why and what a person can do."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """How a backend counts this process's memory on the current device; all values in bytes."""

    peak_bytes: Callable[[], int]
    """The most held at one time since `reset_peak`, or since the process began."""
    reset_peak: Callable[[], None]
    """Starts the peak anew at what is held now. Where the system cannot, logs a warning once and
    the peak goes on counting from the process's start."""
    release: Callable[[], None]
    """Hands what PyTorch holds in reserve, and no tensor uses, back to the system. On accelerators
    a run does so between rollout and update, whose allocations have other sizes."""
    headroom_bytes: Callable[[], int]
    """What can still be allocated, PyTorch's own reserve included; a snapshot, other processes
    move it."""


@dataclass(frozen=True, kw_only=True)
class PartialAttention:
    """Attention that tells its log-sum-exp, by which attention to parts of the keys can be merged.

    Queries are of N segments that lie end to end, and so are keys: the n-th of the queries attends
    to the n-th of the keys, and to no other; `queries` and `keys` tell their lengths
    (`cppo.attention.pieces.Segments`). `causal` where they are the same segments.

    Shapes: query (1, H, Q, D), key and value (1, h, K, D), H a multiple of h; attended
    (1, H, Q, D), logsumexp (1, H, Q), of the scaled scores, in nats, float32 or wider. Tensors may
    be strided in all dimensions but the last.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    """(query, key, value, *, queries, keys, causal, scale) to attended and logsumexp, which are
    the caller's to change."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(gradient of attended, query, key, value, attended, logsumexp, *, queries, keys, causal,
    scale) to the gradients of query, key and value, which are the caller's to change. `attended`
    and `logsumexp` may be those of more keys: then the gradients are these keys' share."""
    precision: tuple[torch.dtype, ...]
    """What it takes."""


def _default_token_statistics() -> Callable[..., tuple[Tensor, Tensor]]:
    from cppo.statistics import chunked_token_statistics

    return chunked_token_statistics


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What one machine can do. Sequences run from best to safest; `auto` takes the first.

    Where float16 is offered it stands last: it needs loss scaling, so only who names it gets it.
    """

    device: str
    """torch device type, which tensors and models move to."""
    attention: tuple[str, ...]
    """Names that transformers accepts as `attn_implementation`; the last is "eager"."""
    precision: tuple[torch.dtype, ...]
    collectives: str
    """torch.distributed backend name."""
    memory: Memory
    token_statistics: Callable[..., tuple[Tensor, Tensor]] = field(
        default_factory=_default_token_statistics
    )
    """The hot kernel, as `cppo.statistics.token_statistics`; a vendor may bring a faster one."""
    partial_attention: PartialAttention | None = None
    """With it the group layout is attended to in parts, without padding, in the precisions that it
    takes, unless attention is to be eager; else under a mask."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One installed backend entry point after probing: a backend, or the error that stands in
    its way."""

    name: str
    origin: str
    """The distribution it comes from, with its version and the entry point's module."""
    backend: Backend | None = None
    error: Exception | None = None

    @property
    def reason(self) -> str:
        """Why it is not usable; empty where it is."""
        if self.error is None:
            return ""
        if isinstance(self.error, Unavailable):
            return str(self.error)
        return f"{self.origin} failed with {type(self.error).__name__}: {self.error}"


def installed() -> list[EntryPoint]:
    """Every installed backend entry point, by name; nothing is imported."""
    return sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))


def survey() -> list[Candidate]:
    """Probes every installed backend. One that cannot run, or breaks, is listed with its error;
    two that share a name are both listed as unusable, each naming the other."""
    entries = installed()
    clashes = _clashes(entries)
    clashing = [
        Candidate(name=entry.name, origin=_origin(entry), error=Unavailable(clashes[entry.name]))
        for entry in entries
        if entry.name in clashes
    ]
    probed = _probe_all(entry for entry in entries if entry.name not in clashes)
    return sorted([*clashing, *probed], key=lambda candidate: candidate.name)


def choose(name: str) -> Backend:
    """The backend that `--backend` names; see `resolve`."""
    backend = resolve(name).backend
    assert backend is not None
    return backend


def resolve(name: str) -> Candidate:
    """Resolves `--backend`, once, at launch, to what can run; the choice is logged with its reason.

    "auto" takes the one usable accelerator, or the cpu backend where there is none. ValueError
    where several accelerators are usable, where the named backend is unknown or cannot run (with
    its reason), and where two installed backends share a name.
    """
    entries = installed()
    if name != "auto":
        entries = [entry for entry in entries if entry.name == name]
        if not entries:
            raise ValueError(_unknown(name))
    for clash in _clashes(entries).values():
        raise ValueError(clash)
    candidates = _probe_all(entries)
    if name == "auto":
        chosen, why = _pick(candidates)
    else:
        chosen, why = candidates[0], "asked for by name"
    if chosen.backend is None:
        raise ValueError(
            f"backend '{chosen.name}' cannot run here: {chosen.reason}"
        ) from chosen.error
    log.info("backend %s from %s: %s", chosen.name, chosen.origin, why)
    return chosen


def resolve_precision(backend: Backend, name: str) -> torch.dtype:
    """The dtype that `name` stands for: "auto" (the backend's best, logged) or one of PRECISIONS.

    ValueError where the name is unknown or the backend does not offer it.
    """
    offered = {str(dtype).removeprefix("torch."): dtype for dtype in backend.precision}
    if name == "auto":
        best = next(iter(offered))
        log.info("precision %s: best of %s on %s", best, ", ".join(offered), backend.device)
        return offered[best]
    if name not in PRECISIONS:
        raise ValueError(
            f"precision '{name}' is not known: give auto, {' or '.join(PRECISIONS)} "
            "(full names only)"
        )
    if name not in offered:
        raise ValueError(
            f"precision '{name}' is not available on {backend.device} here: "
            f"give auto or {' or '.join(offered)}"
        )
    return offered[name]


def resolve_attention(backend: Backend, name: str, *, precision: torch.dtype | None = None) -> str:
    """The attention that `name` stands for: "auto" (the backend's best, logged) or one it offers.

    Given the precision that training computes in, flash attention counts as offered only in 16
    bits: its kernels take nothing wider. ValueError where the backend does not offer the name.
    """
    offered = [
        attention
        for attention in backend.attention
        if precision is None or precision.itemsize == 2 or "flash" not in attention
    ]
    where = backend.device if precision is None else f"{backend.device} in {precision}"
    if name == "auto":
        log.info("attention %s: best of %s on %s", offered[0], ", ".join(offered), where)
        return offered[0]
    if name not in offered:
        raise ValueError(
            f"attention '{name}' is not available on {where} here: "
            f"give auto or {' or '.join(offered)}{_why_not(backend, name, precision)}"
        )
    return name


def claim_device(device: str) -> torch.device:
    """The device of this type that is this process's own, made the current one.

    Of several processes on a machine, each takes the device of its local rank. Unavailable where
    there are fewer devices, or where PyTorch takes another type for its accelerator.
    """
    import torch

    if device == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    current, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    if current is None:
        raise Unavailable(
            f"PyTorch {torch.__version__} sees no accelerator, so no '{device}' either"
        )
    if current.type != device:
        raise Unavailable(
            f"PyTorch takes '{current}' for this process's accelerator, not '{device}': uninstall "
            "the package that registers the other one, or use the backend for it"
        )
    if index >= count:
        raise Unavailable(
            f"process {index + 1} on this machine has no '{device}' device of its own, {count} "
            f"visible: start at most {count} here (torchrun --nproc-per-node {count})"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(device, index)


def first_line(error: Exception) -> str:
    """What an error says, without the stack that some of PyTorch's append."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _why_not(backend: Backend, name: str, precision: torch.dtype | None) -> str:
    """What goes wrong with an attention that is not offered, where a trial of it tells."""
    from cppo.attention.kernels import KNOWN, trial

    if name not in KNOWN:
        return ""
    if "flash" in name and backend.device == "cpu":
        return f" ({name} needs an accelerator)"
    reason = trial(name, backend.device, precision or backend.precision[0])
    return f" ({name}: {reason})" if reason else ""


def accelerator_memory(device: str) -> Memory:
    """Memory of this process's device, counted by PyTorch's allocator: what tensors hold.

    `torch.accelerator` addresses one device type a process. Unavailable where that is not
    `device`, since another device's counters would be reported.
    """
    import torch

    claim_device(device)
    accelerator = torch.accelerator

    def headroom_bytes() -> int:
        free, _ = accelerator.get_memory_info()
        return free + accelerator.memory_reserved() - accelerator.memory_allocated()

    return Memory(
        peak_bytes=accelerator.max_memory_allocated,
        reset_peak=accelerator.reset_peak_memory_stats,
        release=accelerator.empty_cache,
        headroom_bytes=headroom_bytes,
    )


def _probe_all(entries: Iterable[EntryPoint]) -> list[Candidate]:
    """By name. The cpu backend is probed last: once autograd has run, PyTorch counts devices no
    more, and one that registers itself later could not compute a gradient."""
    in_order = sorted(entries, key=lambda entry: entry.name == "cpu")
    return sorted(map(_probe, in_order), key=lambda candidate: candidate.name)


def _probe(entry: EntryPoint) -> Candidate:
    name, origin = entry.name, _origin(entry)
    try:
        backend = entry.load().probe()
        if not isinstance(backend, Backend):
            raise TypeError(f"probe() returned {backend!r}, not a cppo.device.Backend")
    except Exception as error:  # noqa: BLE001 - a plugin may break in any way; it is named with it
        return Candidate(name=name, origin=origin, error=error)
    return Candidate(name=name, origin=origin, backend=backend)


def _pick(candidates: list[Candidate]) -> tuple[Candidate, str]:
    """The candidate that "auto" stands for, and why."""
    accelerators = [c for c in candidates if c.backend and c.backend.device != "cpu"]
    cpus = [c for c in candidates if c.backend and c.name == "cpu"]
    unusable = [c for c in candidates if c.error]
    for broken in unusable:
        if not isinstance(broken.error, Unavailable):
            log.warning("backend %s is passed over: %s", broken.name, broken.reason)
    others = "; ".join(f"{c.name}: {c.reason}" for c in unusable) or "no other backend is installed"
    if len(accelerators) > 1:
        found = ", ".join(f"{c.name} from {c.origin}" for c in accelerators)
        raise ValueError(
            f"backend 'auto' found several accelerators: {found}; "
            f"choose one with --backend {' or --backend '.join(c.name for c in accelerators)}"
        )
    if accelerators:
        return accelerators[0], f"the only accelerator usable here ({others})"
    if cpus:
        return cpus[0], "no accelerator is usable here (cppo backends says why)"
    raise ValueError(
        f"backend 'auto' found nothing that can run here ({others}): "
        "reinstall cppo, or install a package that provides a backend"
    )


def _clashes(entries: Iterable[EntryPoint]) -> dict[str, str]:
    """For each name that several entry points share, the complaint that names them all."""
    by_name: dict[str, list[str]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(_origin(entry))
    return {
        name: f"several installed backends are named '{name}': {' and '.join(origins)}; "
        "uninstall all but one"
        for name, origins in by_name.items()
        if len(origins) > 1
    }


def _unknown(name: str) -> str:
    known = sorted({entry.name for entry in installed()})
    if not known:
        return f"backend '{name}' is not known: no backend is installed; reinstall cppo"
    nearest = difflib.get_close_matches(name, ["auto", *known], n=1, cutoff=0.5)
    hint = f" (did you mean '{nearest[0]}'?)" if nearest else ""
    return f"backend '{name}' is not known: give auto or one of {', '.join(known)}{hint}"


def _origin(entry: EntryPoint) -> str:
    source = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unnamed distribution"
    return f"{source} ({entry.value})"
