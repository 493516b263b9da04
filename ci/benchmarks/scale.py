"""The update at Qwen2.5-VL-3B's size, in bf16 with gradient checkpointing: what a GPU is for."""

from __future__ import annotations

import gc

import torch
from floor import least_operations
from measure import Row, compare, peak_bytes, peak_operations
from subjects import Ours, Trl
from update import in_parts
from workload import THREE_BILLION, Size, make_workload

from cppo.device import Backend
from cppo.policy.loading import place

NAME, PEER = "cppo, three views", "TRL's GRPO, one view"


def measure(
    backend: Backend,
    repeats: int,
    *,
    size: Size = THREE_BILLION,
    image_tokens: int = 1024,
    response_tokens: int = 512,
) -> list[Row]:
    """Time, tokens a second, utilisation, and peak memory with either side by itself."""
    work = make_workload(
        backend,
        size=size,
        image_tokens=(image_tokens,),
        response_tokens=(response_tokens,) * 8,
        dtype=torch.bfloat16,
        checkpointing=True,
    )
    what = f"update, bf16, {len(work.samples[0].prompt.ids)} + 8 x {response_tokens} tokens"
    ours = Ours(work, backend)
    perception_tokens = ours.update()["perception_tokens"]
    our_peak = peak_bytes(backend, ours.update)
    peer = Trl(work, checkpointing=True)
    timed = compare(
        what,
        {NAME: ours.update, PEER: peer.update},
        peer=PEER,
        repeats=repeats,
        targets={NAME: 0.6},
    )
    if timed[0].not_run:
        return timed
    del ours  # its optimizer holds weights too
    attention = in_parts(work, backend, what, repeats)
    held = 2 * sum(p.numel() * p.element_size() for p in work.policy.model.parameters())
    work.policy.model.zero_grad()
    place(work.policy.model, "meta")  # to leave the peer by itself
    gc.collect()
    peer_peak = peak_bytes(backend, peer.update)
    seconds, peer_seconds = timed[0].subject_values, timed[0].peer_values
    least = least_operations(work, perception_tokens=perception_tokens)
    product = peak_operations(backend, torch.bfloat16)
    return [
        *timed,
        Row(
            what=f"{what}: response tokens a second",
            subject=NAME,
            peer=PEER,
            subject_values=[work.tokens / each for each in seconds],
            peer_values=[work.tokens / each for each in peer_seconds],
            unit="1/s",
        ),
        Row(
            what=f"{what}: utilisation, counting what cannot be avoided",
            subject=NAME,
            peer="a large matrix product",
            subject_values=[least / each / 1e12 for each in seconds],
            peer_values=[product / 1e12] * len(seconds),
            unit="TFLOP/s",
        ),
        Row(
            what=f"{what}: peak memory, weights and gradients included",
            subject=NAME,
            peer=PEER,
            subject_values=[our_peak / 2**30],
            peer_values=[peer_peak / 2**30],
            unit="GiB",
            target=0.7,
        ),
        Row(
            what=f"{what}: peak memory above weights and gradients",
            subject=NAME,
            peer=PEER,
            subject_values=[(our_peak - held) / 2**30],
            peer_values=[(peer_peak - held) / 2**30],
            unit="GiB",
        ),
        *attention,
    ]
