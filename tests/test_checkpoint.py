"""Laws of checkpoints: whole or not there, checked before they are trusted."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cppo import checkpoint

STATE = {"feed": {"epoch": 1, "position": 7}, "before": [[0.0, 0.5], [1.0, 0.25]], "bad_steps": 2}


def save(value: float) -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        torch.save({"weight": torch.full((3,), value)}, folder / "weights.pt")
        torch.save({"moment": torch.full((2,), -value)}, folder / "optimizer.pt")

    return into


def steps_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_state_and_tensors_come_back_as_they_went_in(tmp_path: Path) -> None:
    written = checkpoint.write(tmp_path, 50, STATE, save(1.5))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.folder, found.step, found.state) == (written, 50, STATE)
    weights = torch.load(found.folder / "weights.pt")
    assert torch.equal(weights["weight"], torch.full((3,), 1.5))


@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_where_nothing_was_written_there_is_no_newest(tmp_path: Path, folder: str) -> None:
    assert checkpoint.newest(tmp_path / folder) is None


def test_the_newest_is_that_of_the_latest_step_not_of_the_latest_name(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 999_999, {}, save(1))
    checkpoint.write(tmp_path, 1_000_000, {}, save(2))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1_000_000


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (10, 20, 30, 40):
        checkpoint.write(tmp_path, step, {}, save(step), keep=keep)
    assert steps_in(tmp_path) == [f"step-{step:06d}" for step in (10, 20, 30, 40)[-keep:]]


def test_two_are_kept_unless_one_says_otherwise(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, step, {}, save(step))
    assert steps_in(tmp_path) == ["step-000002", "step-000003"]


def test_a_step_written_again_replaces_what_it_was(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 5, {"n": 1}, save(1))
    checkpoint.write(tmp_path, 5, {"n": 2}, save(2))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.state == {"n": 2}
    assert torch.load(found.folder / "weights.pt")["weight"][0] == 2


def test_damaged_later_checkpoints_never_cost_a_whole_one(tmp_path: Path) -> None:
    for step in (50, 90, 100):
        checkpoint.write(tmp_path, step, {}, save(step), keep=3)
    for step in (90, 100):
        flip_a_byte(tmp_path / f"step-{step:06d}" / "weights.pt")
    for step in (60, 70):  # a run that went on from step 50
        checkpoint.write(tmp_path, step, {}, save(step))
        found = checkpoint.newest(tmp_path)
        assert found is not None
        assert found.step == step
    flip_a_byte(tmp_path / "step-000070" / "weights.pt")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 60


def change_weights(folder: Path) -> None:
    flip_a_byte(folder / "weights.pt")


def cut_weights(folder: Path) -> None:
    content = (folder / "weights.pt").read_bytes()
    (folder / "weights.pt").write_bytes(content[: len(content) // 2])


def lose_weights(folder: Path) -> None:
    (folder / "weights.pt").unlink()


def cut_manifest(folder: Path) -> None:
    text = (folder / checkpoint.MANIFEST).read_text()
    (folder / checkpoint.MANIFEST).write_text(text[: len(text) // 2])


def lose_manifest(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).unlink()


def empty_manifest(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).write_text("{}")


def other_manifest(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).write_text("[]")


def binary_manifest(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).write_bytes(b"\xff\xfe\x00")


def stateless_manifest(folder: Path) -> None:
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    del manifest["state"]
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


DAMAGES = {
    change_weights: "weights.pt has changed",
    cut_weights: "weights.pt has changed",
    lose_weights: "weights.pt is missing",
    cut_manifest: "manifest.json",
    lose_manifest: "manifest.json",
    empty_manifest: "manifest.json",
    other_manifest: "manifest.json",
    binary_manifest: "manifest.json",
    stateless_manifest: "manifest.json",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    checkpoint.write(tmp_path, 1, {"n": 1}, save(1))
    folder = checkpoint.write(tmp_path, 2, {"n": 2}, save(2))
    damage(folder)
    with caplog.at_level(logging.WARNING, "cppo"):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (1, {"n": 1})
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(folder) in warning.getMessage()
    assert DAMAGES[damage] in warning.getMessage()


def test_where_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    for step in (1, 2):
        change_weights(checkpoint.write(tmp_path, step, {}, save(step)))
    assert checkpoint.newest(tmp_path) is None


def test_a_failure_while_saving_leaves_the_one_before_as_the_newest(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 1, {}, save(1))

    def fail(folder: Path) -> None:
        save(2)(folder)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoint.write(tmp_path, 2, {}, fail)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1


WRITER = """
import sys, time
from pathlib import Path
from cppo import checkpoint

def save(folder):
    (folder / "weights.pt").write_bytes(b"w" * 1000)
    if {where!r} == "saving":
        print("here", flush=True)
        time.sleep(60)

def stop_at_flush(path):
    if path.name == {flushed!r}:
        print("here", flush=True)
        time.sleep(60)

root = Path(sys.argv[1])
checkpoint.write(root, 1, {{"n": 1}}, lambda folder: (folder / "weights.pt").write_bytes(b"1"))
checkpoint._flush = stop_at_flush
checkpoint.write(root, 2, {{"n": 2}}, save)
"""


@pytest.mark.parametrize(
    ("where", "flushed"),
    [("saving", ""), ("flushing", "weights.pt"), ("flushing", checkpoint.MANIFEST)],
)
def test_a_process_killed_while_writing_leaves_the_one_before_as_the_newest(
    tmp_path: Path, where: str, flushed: str
) -> None:
    script = textwrap.dedent(WRITER).format(where=where, flushed=flushed)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "here\n"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    assert steps_in(tmp_path) == ["step-000001", "writing-000002"]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (1, {"n": 1})
    # The next one takes away what the killed process left.
    checkpoint.write(tmp_path, 3, {}, save(3))
    assert steps_in(tmp_path) == ["step-000001", "step-000003"]
