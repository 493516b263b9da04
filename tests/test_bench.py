"""Laws of the bench: what is timed against each other computes the same, and rows are there."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cppo.device import Backend, choose

sys.path.append(str(Path(__file__).parents[1] / "ci" / "benchmarks"))
import scale
from measure import Row, compare
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


def test_what_fails_has_a_row_that_says_so_and_the_rest_is_measured() -> None:
    def breaks() -> None:
        raise RuntimeError("out of memory")

    ours, other = compare(
        "update", {"ours": int, "other": breaks, "peer": int}, peer="peer", repeats=2
    )
    assert (len(ours.ratios), ours.not_run) == (2, "")
    assert (other.ratio, other.not_run) == (None, "other: RuntimeError: out of memory")
    (alone,) = compare("update", {"ours": int, "peer": breaks}, peer="peer", repeats=2)
    assert len(alone.subject_values) == 2
    assert (alone.ratio, alone.not_run) == (None, "peer: RuntimeError: out of memory")


def test_a_section_that_breaks_is_reported_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_from_file_location("bench", Path(scale.__file__).parent / "__main__.py")
    assert spec is not None
    bench = module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(bench)

    def measure(section: str, *_: object) -> list[Row]:
        if section == "update":
            raise MemoryError("16 GiB asked for")
        return compare(section, {"ours": int, "peer": int}, peer="peer", repeats=1)

    monkeypatch.setattr(bench, "measure_apart", measure)
    report = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "update", "growth", "--json", str(report)])
    with pytest.raises(SystemExit, match="not measured: update"):
        bench.main()
    rows = json.loads(report.read_text())["rows"]
    assert [row["what"] for row in rows] == ["update", "growth"]
    assert rows[0]["not_run"] == "MemoryError: 16 GiB asked for"
    assert rows[1]["ratio"] > 0
    assert "not run: MemoryError" in capsys.readouterr().out


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
