"""Memory: the counters move with what is allocated, and a release gives back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cppo.doctor.finding import Examination, Finding, at_most, holds, not_run

PIECE_BYTES = 2**20  # small enough that allocators keep it for themselves once it is free
BLOCK_BYTES = 256 * PIECE_BYTES
TOLERANCE = 0.1  # of the block: allocators round up, and an operating system counts a little late


def examine(given: Examination) -> Iterator[Finding]:
    memory, device = given.backend.memory, given.device
    headroom_bytes = memory.headroom_bytes()
    gib = headroom_bytes / 2**30
    yield holds("there is headroom", headroom_bytes > 2 * BLOCK_BYTES, f"{gib:.1f} GiB")
    torch.ones(1, device=device)
    memory.release()
    memory.reset_peak()
    before_bytes = memory.peak_bytes()
    pieces = [
        torch.ones(PIECE_BYTES, dtype=torch.uint8, device=device)
        for _ in range(BLOCK_BYTES // PIECE_BYTES)
    ]
    given.synchronize()
    held_bytes = memory.peak_bytes() - before_bytes
    yield _near("the peak rises with what is allocated", held_bytes)
    taken_bytes = headroom_bytes - memory.headroom_bytes()
    reserved_bytes = _reserved_bytes(given)
    del pieces
    memory.release()
    given.synchronize()
    memory.reset_peak()
    returned_bytes = before_bytes + held_bytes - memory.peak_bytes()
    yield _near("a reset peak forgets what was freed", returned_bytes)
    if reserved_bytes is None:
        # On the CPU the peak counts what the process holds, its reserve included: judged above.
        if device.type != "cpu":
            yield not_run("a release gives the reserve back", "PyTorch does not tell it here")
    else:
        released_bytes = reserved_bytes - (_reserved_bytes(given) or 0)
        yield _near("a release gives the reserve back", released_bytes)
    back_bytes = memory.headroom_bytes() - (headroom_bytes - taken_bytes)
    # Other processes on the machine move headroom, so it is only told, not judged.
    yield Finding(
        name="headroom taken by the block, and given back",
        verdict="info",
        detail=f"{taken_bytes / 2**20:.0f} MiB, {back_bytes / 2**20:.0f} MiB",
    )


def _reserved_bytes(given: Examination) -> int | None:
    """What PyTorch's allocator holds of the device, in use or not; None where it does not tell."""
    try:
        return None if given.device.type == "cpu" else torch.accelerator.memory_reserved()
    except RuntimeError:
        return None


def _near(name: str, found_bytes: int) -> Finding:
    error = abs(found_bytes - BLOCK_BYTES) / BLOCK_BYTES
    return at_most(name, error, TOLERANCE, detail=f"{found_bytes / 2**20:.0f} MiB of 256")
