"""The update: three views against TRL's one and against a plain three, and how it grows."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from measure import Row, compare, count_operations, extra_bytes, peak_operations
from subjects import SMALL, Naive, Ours, Size, Trl, make_batch

from cppo.device import Backend

SHAPES = ((576, 128), (256, 128), (256, 256))  # image tokens, response tokens; 33 tokens of words
TRL_TARGETS = (0.6, 0.8, 1.0)
NAIVE_TARGETS = (0.25, 0.3, 0.35)
RAGGED = (128, 16, 64, 96, 32, 112, 48, 80)


def measure(backend: Backend, repeats: int) -> list[Row]:
    """At the sizes that targets are stated for, with responses of unequal lengths, and with several
    groups of unequal prompts."""
    rows = []
    for (image, response), trl, naive in zip(SHAPES, TRL_TARGETS, NAIVE_TARGETS, strict=True):
        what = f"update, {image + 33} + 8 x {response} tokens"
        rows += one(backend, what, (image,), (response,) * 8, repeats, trl=trl, naive=naive)
    what = f"update, 289 + 8 x {min(RAGGED)} to {max(RAGGED)} tokens"
    rows += one(backend, what, (256,), RAGGED, repeats)
    what = f"update, 97, 177 and 289 + 8 x {min(RAGGED)} to {max(RAGGED)} tokens each"
    return rows + one(backend, what, (64, 144, 256), RAGGED, repeats)


def one(
    backend: Backend,
    what: str,
    image_tokens: Sequence[int],
    responses: Sequence[int],
    repeats: int,
    *,
    trl: float | None = None,
    naive: float | None = None,
    size: Size = SMALL,
) -> list[Row]:
    batch = make_batch(backend, size=size, image_tokens=image_tokens, response_tokens=responses)
    ours, bare = Ours(batch, backend), Ours(batch, backend, views=False)
    peer, plain = Trl(batch), Naive(batch)
    subjects = {
        "cppo, three views": ours.update,
        "cppo's grpo, one view": bare.update,
        "TRL's GRPO, one view": peer.update,
    }
    rows = compare(
        what,
        subjects,
        peer="TRL's GRPO, one view",
        repeats=repeats,
        targets={} if trl is None else {"cppo, three views": trl},
    )
    rows += compare(
        what,
        {"cppo, three views": ours.update, "plain padded, three views": plain.update},
        peer="plain padded, three views",
        repeats=repeats,
        targets={} if naive is None else {"cppo, three views": naive},
    )
    rows += _spent(backend, what, ours, peer, rows[0])
    del ours, bare, peer, plain
    gc.collect()
    return rows


def _spent(backend: Backend, what: str, ours: Ours, peer: Trl, timed: Row) -> list[Row]:
    """Operations against the peer's, and time against what our operations take at least."""
    mine, theirs = count_operations(ours.update), count_operations(peer.update)
    peak = peak_operations(backend, ours.dtype)
    return [
        Row(
            what=f"{what}: operations",
            subject=timed.subject,
            peer=timed.peer,
            ratios=[mine / theirs],
            subject_values=[mine / 1e9],
            peer_values=[theirs / 1e9],
            unit="GFLOP",
        ),
        Row(
            what=f"{what}: time",
            subject=timed.subject,
            peer=f"its operations at {peak / 1e9:.0f} GFLOP/s",
            ratios=[seconds / (mine / peak) for seconds in timed.subject_values],
            subject_values=timed.subject_values,
            peer_values=[mine / peak] * len(timed.subject_values),
            unit="s",
        ),
    ]


def grow(backend: Backend, repeats: int) -> list[Row]:
    """With the size of a group, the length of the prompt, and of the responses."""
    rows = []
    for responses in (2, 4, 8, 16):
        rows += one(backend, f"group of {responses}", (256,), (64,) * responses, repeats)
    for image in (64, 256, 576, 1024):
        rows += one(backend, f"prompt of {image + 33} tokens", (image,), (64,) * 8, repeats)
    for response in (32, 128, 512):
        rows += one(backend, f"responses of {response} tokens", (256,), (response,) * 8, repeats)
    return rows


def at_scale(backend: Backend, repeats: int, size: Size) -> list[Row]:
    """Qwen2.5-VL-3B's shape in bf16 with gradient checkpointing: time and peak memory."""
    batch = make_batch(
        backend,
        size=size,
        image_tokens=(1024,),
        response_tokens=(512,) * 8,
        dtype=torch.bfloat16,
        checkpointing=True,
    )
    what = "update, 3B shape, bf16, 1057 + 8 x 512 tokens"
    ours = Ours(batch, backend)
    peer = Trl(batch, checkpointing=True)
    name, other = "cppo, three views", "TRL's GRPO, one view"
    rows = compare(
        what,
        {name: ours.update, other: peer.update},
        peer=other,
        repeats=repeats,
        targets={name: 0.6},
    )
    mine, theirs = (float(extra_bytes(backend, s.update)) for s in (ours, peer))
    memory = Row(
        what=f"{what}: peak memory above the weights",
        subject=name,
        peer=other,
        ratios=[mine / theirs],
        subject_values=[mine / 2**20],
        peer_values=[theirs / 2**20],
        unit="MiB",
        target=0.7,
    )
    return [*rows, memory]
