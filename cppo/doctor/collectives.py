"""Collectives between the processes: what they compute, that they wait, and that they give up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from cppo.doctor.finding import Examination, Finding, at_most, holds, not_run

LATE_SECONDS = 2.0
TIMEOUT_SECONDS = 10.0
GRACE_SECONDS = 50.0  # some libraries look for overdue work once in a while only
GIVEN_UP = "a missing process is given up"
ONE_PROCESS = "one process alone: start the doctor with --processes 2 or more"


def examine(given: Examination) -> Iterator[Finding]:
    rank, world, device = given.processes.rank, given.processes.world, given.device
    if world == 1:
        yield not_run("collectives", ONE_PROCESS)
        return
    everyone = torch.arange(world, dtype=torch.float32, device=device)
    own = torch.full((1000,), float(rank), device=device)

    reduced = given.processes.sum(own)
    yield holds("all-reduce", bool((reduced == everyone.sum()).all()))

    gathered = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(gathered, own)
    expected = everyone[:, None].expand(world, 1000)
    yield holds("all-gather", torch.equal(torch.stack(gathered), expected))

    sent = own.clone()
    dist.broadcast(sent, src=world - 1)
    yield holds("broadcast", bool((sent == world - 1).all()))

    share = torch.empty(1000, device=device)
    dist.reduce_scatter_tensor(share, own.repeat(world))
    yield holds("reduce-scatter", bool((share == everyone.sum()).all()))

    told = given.processes.gather([f"process {rank}"])
    yield holds("gathering objects", told == [f"process {each}" for each in range(world)])

    given.processes.gather([])
    started = time.monotonic()
    if rank == world - 1:
        time.sleep(LATE_SECONDS)
    # Objects travel between CPUs, and so would a barrier that is told no device.
    dist.barrier(device_ids=None if device.type == "cpu" else [device.index])
    given.synchronize()
    waited = time.monotonic() - started
    yield holds(
        "a barrier waits for a late process", waited > 0.9 * LATE_SECONDS, f"{waited:.1f} s"
    )


def examine_timeout(given: Examination) -> Iterator[Finding]:
    """The last process does not take part; the others must not wait for ever.

    Some libraries end the process instead of raising: `command.py` counts that as giving up.
    """
    rank, world = given.processes.rank, given.processes.world
    if world == 1:
        yield not_run("time-out", ONE_PROCESS)
        return
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_SECONDS))
    tensor = torch.ones(1, device=given.device)
    dist.all_reduce(tensor, group=group)  # connected before anybody is missing
    given.synchronize()
    if rank == world - 1:
        time.sleep(TIMEOUT_SECONDS + GRACE_SECONDS)  # until it is ended
        return
    started = time.monotonic()
    try:
        dist.all_reduce(tensor, group=group)
        given.synchronize()
        yield holds("time-out", False, "the missing process was not missed")
    except RuntimeError:
        waited = time.monotonic() - started
        limit = TIMEOUT_SECONDS + GRACE_SECONDS
        yield at_most(GIVEN_UP, waited, limit, unit="s")
