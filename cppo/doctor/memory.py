"""Memory: the counters move with what is allocated, and a release gives back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cppo.doctor.finding import Examination, Finding, at_most, holds

BLOCK_BYTES = 256 * 2**20
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
    block = torch.ones(BLOCK_BYTES, dtype=torch.uint8, device=device)
    given.synchronize()
    held_bytes = memory.peak_bytes() - before_bytes
    yield _near("the peak rises with a block", held_bytes)
    taken_bytes = headroom_bytes - memory.headroom_bytes()
    del block
    memory.release()
    given.synchronize()
    memory.reset_peak()
    returned_bytes = before_bytes + held_bytes - memory.peak_bytes()
    yield _near("a reset peak forgets what was released", returned_bytes)
    back_bytes = memory.headroom_bytes() - (headroom_bytes - taken_bytes)
    # Other processes on the machine move headroom, so it is only told, not judged.
    yield Finding(
        name="headroom taken by the block, and given back",
        verdict="info",
        detail=f"{taken_bytes / 2**20:.0f} MiB, {back_bytes / 2**20:.0f} MiB",
    )


def _near(name: str, found_bytes: int) -> Finding:
    error = abs(found_bytes - BLOCK_BYTES) / BLOCK_BYTES
    return at_most(name, error, TOLERANCE, detail=f"{found_bytes / 2**20:.0f} MiB of 256")
