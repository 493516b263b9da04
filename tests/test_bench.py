"""Laws of the bench: what is timed against each other computes the same, and rows are there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cppo.device import Backend, choose

sys.path.append(str(Path(__file__).parents[1] / "ci" / "benchmarks"))
import scale
from subjects import Naive, Ours, Trl
from workload import SMALL, Workload, make_workload

TINY = replace(
    SMALL,
    layers=2,
    hidden=64,
    intermediate=96,
    vision_layers=2,
    vision_hidden=80,
    vision_intermediate=64,
    vision_whole=(1,),
)


@pytest.fixture(scope="module")
def backend() -> Backend:
    return choose("cpu")


def work(backend: Backend, image_tokens: Sequence[int] = (16,)) -> Workload:
    lengths = (7, 3, 5, 1, 6, 2)
    return make_workload(backend, size=TINY, image_tokens=image_tokens, response_tokens=lengths)


def direction(subject: Any) -> Tensor:
    """Of the gradient that an update leaves: some clip it, and some do not."""
    subject.update()
    gradient = torch.cat([parameter.grad.flatten() for parameter in subject.model.parameters()])
    return gradient / gradient.norm()


@pytest.mark.parametrize("image_tokens", [(16,), (4, 16)])
def test_a_plain_update_goes_where_ours_goes(backend: Backend, image_tokens: Sequence[int]) -> None:
    given = work(backend, image_tokens)
    ours, plain = direction(Ours(given, backend)), direction(Naive(given))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    bare = direction(Ours(given, backend, views=False))
    assert (bare - ours).norm() > 1e-4  # the views have their part in it


@pytest.mark.parametrize("image_tokens", [(16,), (4, 16)])
def test_trls_update_goes_where_our_grpo_goes(
    backend: Backend, image_tokens: Sequence[int]
) -> None:
    pytest.importorskip("trl", reason="the peer comes with the extra 'bench'")
    given = work(backend, image_tokens)
    ours, peer = direction(Ours(given, backend, views=False)), direction(Trl(given))
    torch.testing.assert_close(ours, peer, atol=1e-5, rtol=0)


def test_the_rows_at_scale_are_made_in_small(backend: Backend) -> None:
    pytest.importorskip("trl", reason="the peer comes with the extra 'bench'")
    rows = scale.measure(backend, 1, size=TINY, image_tokens=16, response_tokens=8)
    part = backend.partial_attention
    in_parts = part is not None and torch.bfloat16 in part.precision
    units = ["s", "1/s", "TFLOP/s", "GiB", "GiB", *["s"] * in_parts]  # the last over a mask
    assert [row.unit for row in rows] == units
    seconds, rate = rows[0], rows[1]
    assert rate.subject_values == [8 * 8 / seconds.subject_values[0]]
    assert all(value > 0 for row in rows[:4] for value in row.subject_values + row.peer_values)
