"""The update: three views against TRL's one and against a plain three, and how it grows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

from measure import Row, compare
from subjects import Naive, Ours, Trl
from workload import SMALL, Size, Workload, make_workload

from cppo.device import Backend

SHAPES = ((576, 128), (256, 128), (256, 256))  # image tokens, response tokens; 33 tokens of words
TRL_TARGETS = (0.6, 0.8, 1.0)
NAIVE_TARGETS = (0.25, 0.3, 0.35)
RAGGED = (128, 16, 64, 96, 32, 112, 48, 80)
SEVERAL = (64, 144, 256)  # image tokens of prompts that are updated on together
A_GROUP = 3000  # tokens: each of their groups fits by itself, no two of them do


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
        (f"97, 177 and 289 + {ragged} tokens each", SEVERAL, RAGGED),
    ]


def measure(backend: Backend, repeats: int) -> list[Row]:
    rows = []
    targets = [*zip(TRL_TARGETS, NAIVE_TARGETS, strict=True), (None, None), (None, None)]
    for (shape, images, responses), (trl, naive) in zip(shapes(), targets, strict=True):
        what = f"update, {shape}"
        rows += one(backend, what, images, responses, repeats, trl=trl, naive=naive)
    rows += _cut(backend, repeats)
    for shape, images, responses in shapes():
        work = make_workload(backend, size=SMALL, image_tokens=images, response_tokens=responses)
        rows += in_parts(work, backend, f"update of {shape}", repeats)
    return rows


def _cut(backend: Backend, repeats: int) -> list[Row]:
    """Each group a micro-batch of ours; the peer, at its best, has them all in one."""
    shape = shapes()[-1][0]
    work = make_workload(backend, size=SMALL, image_tokens=SEVERAL, response_tokens=RAGGED)
    ours, peer = Ours(work, backend, tokens_per_micro_batch=A_GROUP), Trl(work)
    subjects = {"cppo, three views": ours.update, "TRL's GRPO, one view": peer.update}
    what = f"a micro-batch for each group, {shape}"
    return compare(what, subjects, peer="TRL's GRPO, one view", repeats=repeats)


def in_parts(work: Workload, backend: Backend, what: str, repeats: int) -> list[Row]:
    """What attention in parts saves, where the backend has it in the work's precision: without it
    there is a mask."""
    part, name = backend.partial_attention, "cppo, attention under a mask"
    if part is None or work.policy.precision not in part.precision:
        return []
    subjects = {
        "cppo, attention in parts": Ours(work, backend).update,
        name: Ours(work, replace(backend, partial_attention=None)).update,
    }
    return compare(f"attention, {what}", subjects, peer=name, repeats=repeats)


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
