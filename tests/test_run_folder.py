"""Laws of the run folder: what is logged can be read again, by people and by a resumed run."""

import errno
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest
import yaml

from cppo import run_folder
from cppo.run_folder import RunFolder, claim


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars in TensorBoard's event files, as TensorBoard would show them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


def test_settings_come_back_from_yaml_in_their_order(tmp_path: Path) -> None:
    settings = {"model": "builtin", "steps": 3, "rollout": {"top_p": 0.9}, "output": None}
    RunFolder(tmp_path / "a" / "run").write_config(settings)
    loaded = yaml.safe_load((tmp_path / "a" / "run" / "config.yaml").read_text())
    assert loaded == settings
    assert list(loaded) == list(settings)


def test_tuples_and_paths_are_written_as_yaml_and_json_have_them(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config({"interval": (0.6, 0.7)})
    folder.write_summary({"run_folder": tmp_path, "steps": 2})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"interval": [0.6, 0.7]}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"run_folder": str(tmp_path), "steps": 2}


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log_metrics(1, {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "kl": 0.5})
    folder.write_summary({"difference": {"value": math.nan, "low": 0.0}})
    folder.close()
    expected = {"step": 1, "loss": None, "grad_norm": None, "low": None, "kl": 0.5}
    assert lines(tmp_path / "metrics.jsonl") == [expected]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"difference": {"value": None, "low": 0.0}}


def test_tensorboard_shows_the_metrics_and_evaluations_that_were_logged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, loss in ((1, 0.5), (2, 0.25)):
        folder.log_metrics(step, {"loss/policy": loss})
    estimate = {"value": 0.75, "low": 0.5, "high": 1.0}
    folder.log_evaluation(2, {"name": "after", "items": 8, "avg@4": estimate})
    folder.close()
    assert scalars(tmp_path) == {
        "loss/policy": [(1, 0.5), (2, 0.25)],
        "eval/avg@4": [(2, 0.75)],
    }
    [record] = lines(tmp_path / "evaluation.jsonl")
    assert record == {"step": 2, "name": "after", "items": 8, "avg@4": estimate}


def test_rewinding_drops_what_came_after_the_step_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log_metrics(step, {"loss": float(step)})
        folder.log_evaluation(step, {"name": f"step {step}"})
        folder.log_samples([{"step": step, "response": "a"}, {"step": step, "response": "b"}])
    folder.close()
    before = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    RunFolder(tmp_path).rewind(2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(before[:2])
    assert [line["step"] for line in lines(tmp_path / "evaluation.jsonl")] == [1, 2]
    assert [line["step"] for line in lines(tmp_path / "samples.jsonl")] == [1, 1, 2, 2]


def test_a_finished_run_that_is_resumed_keeps_one_evaluation_after_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, name in ((0, "before"), (2, "step 2"), (4, "after")):
        folder.log_evaluation(step, {"name": name})
    folder.rewind(4)
    folder.log_evaluation(4, {"name": "after"})
    folder.close()
    names = [line["name"] for line in lines(tmp_path / "evaluation.jsonl")]
    assert names == ["before", "step 2", "after"]


def test_rewinding_drops_a_line_that_a_killed_process_left_unfinished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log_metrics(1, {"loss": 1.0})
    folder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    again = RunFolder(tmp_path)
    again.rewind(5)
    again.log_metrics(2, {"loss": 2.0})
    again.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\n"])
def test_rewinding_keeps_responses_with_any_line_separator(tmp_path: Path, separator: str) -> None:
    record = {"step": 1, "response": f"one{separator}two é 图"}
    folder = RunFolder(tmp_path)
    folder.log_samples([record])
    folder.rewind(1)
    assert lines(tmp_path / "samples.jsonl") == [record]


def test_a_resumed_run_replaces_in_tensorboard_what_it_rewound(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    for step in (1, 2, 3, 4):
        first.log_metrics(step, {"loss": 1.0})
    first.close()
    # TensorBoard reads files in the order of the second in their names; a resumed run starts later.
    [file] = (tmp_path / "tensorboard").iterdir()
    file.rename(
        file.with_name(re.sub(r"(?<=tfevents\.)\d+", lambda s: f"{int(s[0]) - 1}", file.name))
    )
    second = RunFolder(tmp_path)
    second.rewind(2)
    second.log_metrics(3, {"loss": 2.0})
    second.close()
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 1.0), (3, 2.0)]}


def test_rewinding_a_folder_without_logs_is_no_error(tmp_path: Path) -> None:
    RunFolder(tmp_path).rewind(3)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_kind_of_questions_may_have_any_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    estimate = {"value": 0.75, "low": 0.5, "high": 1.0}
    kinds = {"step": estimate, "name": estimate}
    folder.log_evaluation(2, {"name": "step 2", "kinds": kinds})
    folder.rewind(2)
    folder.close()
    [record] = lines(tmp_path / "evaluation.jsonl")
    assert (record["step"], record["name"], record["kinds"]) == (2, "step 2", kinds)
    assert scalars(tmp_path) == {"eval/step": [(2, 0.75)], "eval/name": [(2, 0.75)]}


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=f"another run is at work in {tmp_path}"):
        RunFolder(tmp_path)
    RunFolder(tmp_path, active=False)  # another process of the same run
    first.close()
    RunFolder(tmp_path).close()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*given: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    RunFolder(tmp_path).close()
    assert f"{tmp_path} is not locked" in caplog.text


def test_a_folder_of_runs_that_cannot_be_made_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "absent")
    with pytest.raises(FileExistsError):
        claim("cppo", "builtin")


def test_runs_of_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noon(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Noon":
            return cls(2026, 1, 2, 12)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "datetime", Noon)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: claim("cppo", "models/small"), range(8)))
    name = "runs/20260102-120000-cppo-small"
    ends = ("", *(f"-{number}" for number in range(2, 9)))
    assert sorted(map(str, made)) == sorted(f"{name}{end}" for end in ends)


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    for path in (tmp_path, tmp_path / "absent"):
        folder = RunFolder(path, active=False)
        folder.write_config({"steps": 1})
        folder.write_summary({"steps": 1})
        folder.log_metrics(1, {"loss": 1.0})
        folder.log_evaluation(1, {"avg@4": {"value": 0.5}})
        folder.log_samples([{"step": 1}])
        folder.rewind(0)
        folder.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 9}\n'
