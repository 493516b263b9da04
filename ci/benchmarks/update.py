"""The update: three views against TRL's one and against a plain three, and how it grows."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from measure import Row, compare, extra_bytes
from subjects import Naive, Ours, Trl
from workload import SMALL, Size, make_workload

from cppo.device import Backend

SHAPES = ((576, 128), (256, 128), (256, 256))  # image tokens, response tokens; 33 tokens of words
TRL_TARGETS = (0.6, 0.8, 1.0)
NAIVE_TARGETS = (0.25, 0.3, 0.35)
RAGGED = (128, 16, 64, 96, 32, 112, 48, 80)


def shapes() -> list[tuple[str, Sequence[int], Sequence[int]]]:
    """Sizes that targets are stated for, responses of unequal lengths, and several groups of
    unequal prompts: image tokens of each prompt, and lengths of each group's responses."""
    ragged = f"8 x {min(RAGGED)} to {max(RAGGED)}"
    return [
        *(
            (f"{image + 33} + 8 x {tokens} tokens", (image,), (tokens,) * 8)
            for image, tokens in SHAPES
        ),
        (f"289 + {ragged} tokens", (256,), RAGGED),
        (f"97, 177 and 289 + {ragged} tokens each", (64, 144, 256), RAGGED),
    ]


def measure(backend: Backend, repeats: int) -> list[Row]:
    rows = []
    targets = [*zip(TRL_TARGETS, NAIVE_TARGETS, strict=True), (None, None), (None, None)]
    for (shape, images, responses), (trl, naive) in zip(shapes(), targets, strict=True):
        what = f"update, {shape}"
        rows += one(backend, what, images, responses, repeats, trl=trl, naive=naive)
    return rows


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
    work = make_workload(backend, size=size, image_tokens=image_tokens, response_tokens=responses)
    ours, bare = Ours(work, backend), Ours(work, backend, views=False)
    peer, plain = Trl(work), Naive(work)
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
    del ours, bare, peer, plain
    gc.collect()
    return rows


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
    work = make_workload(
        backend,
        size=size,
        image_tokens=(1024,),
        response_tokens=(512,) * 8,
        dtype=torch.bfloat16,
        checkpointing=True,
    )
    what = "update, 3B shape, bf16, 1057 + 8 x 512 tokens"
    ours = Ours(work, backend)
    peer = Trl(work, checkpointing=True)
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
