"""The floor of an update: the operations that cannot be avoided, against those that are spent.

A parameter costs a token two operations forward and four backward; so, for each pair of positions
that see each other, do a layer's queries, keys and values. What cannot be avoided is one pass of
each prompt and each picture a view, and of each response on the views that its loss needs; and in
the head, the policy's tokens on the image, all tokens on the view that detects, forward, and the
perception tokens on both views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from measure import Row, compare, count_operations, peak_operations
from subjects import Ours, Trl
from update import shapes
from workload import SMALL, Workload, make_workload

from cppo.device import Backend
from cppo.policy import Prompt

WINDOW_PATCHES = 64  # that the vision tower's patches see where they attend in windows


def measure(backend: Backend, repeats: int) -> list[Row]:
    peak = peak_operations(backend, torch.float32)
    rows = []
    for shape, images, responses in shapes():
        work = make_workload(backend, size=SMALL, image_tokens=images, response_tokens=responses)
        ours, peer = Ours(work, backend), Trl(work)
        spent, theirs, least = (
            count_operations(ours.update),
            count_operations(peer.update),
            least_operations(work, perception_tokens=ours.update()["perception_tokens"]),
        )
        timed = compare(shape, {"ours": ours.update, "": lambda: None}, peer="", repeats=repeats)
        seconds = timed[0].subject_values
        name = "cppo, three views"
        rows += [
            _row(f"operations, {shape}", name, "TRL's GRPO, one view", [spent], theirs, "GFLOP"),
            _row(f"operations, {shape}", name, "the least there can be", [spent], least, "GFLOP"),
            _row(
                f"time, {shape}",
                name,
                f"the least there can be, at {peak / 1e9:.0f} GFLOP/s",
                [second * 1e9 for second in seconds],
                least / peak * 1e9,
                "s",
            ),
        ]
    return rows


def _row(what: str, subject: str, peer: str, values: list[float], other: float, unit: str) -> Row:
    return Row(
        what=what,
        subject=subject,
        peer=peer,
        subject_values=[value / 1e9 for value in values],
        peer_values=[other / 1e9] * len(values),
        unit=unit,
    )


def least_operations(work: Workload, *, perception_tokens: float) -> float:
    """Of forward and backward, in a Qwen2.5-VL whose parameters all learn."""
    policy, total = work.policy, 0.0
    views: list[list[tuple[Prompt, int]]] = [[(s.prompt, len(s.ids)) for s in work.samples]]
    for name in work.views:
        views.append([(s.views[name], len(s.ids)) for s in work.samples if name in s.views])
    config, tower = policy.language.config, policy.base.model.visual
    layers = _matrices(policy.language.layers)
    width = 4 * config.num_hidden_layers * config.hidden_size  # operations a pair of positions
    for shown in views:
        prompts = {id(prompt): prompt for prompt, _ in shown}.values()
        responses = [(len(prompt.ids), length) for prompt, length in shown]
        tokens = sum(len(prompt.ids) for prompt in prompts) + sum(own for _, own in responses)
        pairs = sum(len(p.ids) * (len(p.ids) + 1) / 2 for p in prompts)
        pairs += sum(own * prompt + own * (own + 1) / 2 for prompt, own in responses)
        total += 2 * layers * tokens + width * pairs
        patches = [len(prompt.pixels) for prompt in prompts]
        hidden, whole = tower.config.hidden_size, len(tower.config.fullatt_block_indexes)
        windows = (len(tower.blocks) - whole) * WINDOW_PATCHES
        merged = _matrices([tower.merger]) / tower.config.spatial_merge_size**2
        seen = sum(windows * count + whole * count**2 for count in patches)
        total += 2 * (_matrices([tower.patch_embed, *tower.blocks]) + merged) * sum(patches)
        total += 4 * hidden * seen
    learning = sum(len(s.ids) for s in work.samples) + len(work.views) * perception_tokens
    detecting = sum(len(s.ids) for s in work.samples if s.views) - perception_tokens
    return 3 * total + 2 * policy.head.numel() * (3 * learning + detecting)


def _matrices(modules: Sequence[Any]) -> int:
    """Numbers in all matrices of these."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.dim() > 1)
