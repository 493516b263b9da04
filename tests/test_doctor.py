"""The doctor on the CPU: it passes what is right, and finds what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cppo import cli
from cppo.doctor.command import End, worst
from cppo.doctor.worker import SECTIONS

ENVIRONMENT = {
    *("cppo", "python", "system", "processor", "device", "attention in groups"),
    *("torch", "PyTorch is built for"),
}

# A backend that is the CPU's but for what is put into LIES.
LIAR = """
import os, signal
from dataclasses import replace
import cppo_cpu
from cppo.statistics import chunked_token_statistics

def probe():
    backend = cppo_cpu.probe()
    {lies}
"""
WRONG = """
    def token_statistics(hidden, weight, targets, **options):
        logprobs, entropy = chunked_token_statistics(hidden, weight, targets, **options)
        return logprobs, entropy + 0.01

    memory = replace(backend.memory, release=lambda: None)
    return replace(backend, token_statistics=token_statistics, memory=memory)
"""
WRONG_IN_PARTS = """
    part = cppo_cpu.PARTIAL_ATTENTION

    def backward(*given, **options):
        query, key, value = part.backward(*given, **options)
        return query, 1.01 * key, value

    return replace(backend, partial_attention=replace(part, backward=backward))
"""
DEADLY = """
    def token_statistics(*given, **options):
        print("segfault, more or less", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    return replace(backend, token_statistics=token_statistics)
"""


def doctor(
    *arguments: str, path: Path | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """`cppo doctor`, and its report."""
    folder = Path(arguments[arguments.index("--json") + 1]).parent
    # With one thread attention in parts is examined too.
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    ended = subprocess.run(
        [sys.executable, "-m", "cppo.cli", "doctor", *arguments],
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    [report] = folder.glob("*.json")
    return ended, json.loads(report.read_text())


def install(folder: Path, name: str, lies: str) -> Path:
    """A package with a backend that lies, to put on the import path."""
    (folder / f"{name}.py").write_text(LIAR.format(lies=lies.strip()))
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[cppo.backends]\n{name} = {name}\n")
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_the_cpu_is_in_good_health(tmp_path: Path, processes: int) -> None:
    ended, report = doctor(
        *("--backend", "cpu", "--processes", str(processes)),
        *("--json", str(tmp_path / "new" / "report.json")),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert report["passed"]
    assert report["processes"] == processes
    assert set(report["environment"]) >= ENVIRONMENT
    found = report["findings"]
    assert set(found) == set(SECTIONS)
    verdicts = {finding["verdict"] for findings in found.values() for finding in findings}
    assert "failed" not in verdicts
    assert report["environment"]["attention in groups"].startswith("in parts in float32")
    checked = {finding["name"] for finding in found["attention"]}
    assert {f"{way} in groups float32, gradient" for way in ("merged attention", "sdpa")} <= checked
    for section, findings in found.items():
        passed = [finding for finding in findings if finding["verdict"] == "passed"]
        alone = processes == 1 and section in ("collectives", "time-out")
        assert bool(passed) == (not alone and section != "throughput"), section
        assert section in ended.stdout
    assert "0 failed" in ended.stdout


@pytest.mark.parametrize(
    ("lies", "sections"),
    [
        # An entropy that is too high everywhere masks the same tokens, so the step is the same.
        (WRONG, {"token statistics", "memory"}),
        (WRONG_IN_PARTS, {"attention", "training step"}),
    ],
    ids=["token statistics", "attention in parts"],
)
def test_what_is_wrong_with_a_backend_is_found_and_named(
    tmp_path: Path, lies: str, sections: set[str]
) -> None:
    path = install(tmp_path, "liar", lies)
    (tmp_path / "out").mkdir()
    ended, report = doctor(
        "--backend", "liar", "--json", str(tmp_path / "out" / "report.json"), path=path
    )
    assert ended.returncode == 1
    assert not report["passed"]
    failed = {
        section
        for section, findings in report["findings"].items()
        if any(finding["verdict"] == "failed" for finding in findings)
    }
    assert failed == sections
    assert "liar: " in ended.stdout


def test_a_process_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    path = install(tmp_path, "deadly", DEADLY)
    (tmp_path / "out").mkdir()
    ended, report = doctor(
        "--backend", "deadly", "--json", str(tmp_path / "out" / "report.json"), path=path
    )
    assert ended.returncode == 1
    assert [f["verdict"] for f in report["findings"]["attention"]].count("failed") == 0
    [death] = report["findings"]["token statistics"]
    assert death["name"] == "the process died"
    assert "SIGKILL" in death["detail"]
    assert "segfault, more or less" in death["detail"]


def test_the_doctor_is_not_started_by_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["doctor", "--backend", "cpu"]) == 2
    assert "run it without torchrun, and give --processes" in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_no_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = """
    from cppo.device import Unavailable
    raise Unavailable("no card is plugged in: check the slot")
    """
    monkeypatch.syspath_prepend(install(tmp_path, "absent", absent))
    assert cli.main(["doctor", "--backend", "absent"]) == 2
    said = capsys.readouterr().err
    assert said == "cppo: backend 'absent' cannot run here: no card is plugged in: check the slot\n"


def test_a_report_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--backend", "cpu", "--json", str(tmp_path)]) == 2
    assert f"json: '{tmp_path}' cannot be written" in capsys.readouterr().err


IN_TIMEOUT = [{"section": "time-out", "began": 0.0}]


@pytest.mark.parametrize(
    ("waited", "gave_up", "verdict", "measured"),
    [
        (12.0, True, "passed", 12.0),  # by a library that ends the process where it cannot raise
        (1.0, True, "failed", None),  # before anything can have been missed
        (12.0, False, "failed", None),  # by a crash, or because it hung
    ],
)
def test_a_process_that_ends_while_another_is_missing_gave_it_up_or_died(
    waited: float, gave_up: bool, verdict: str, measured: float | None
) -> None:
    end = End(records=IN_TIMEOUT, how="it ended", waited=waited, gave_up=gave_up)
    missing = End(records=IN_TIMEOUT, how="it was ended", waited=60.0, gave_up=False)
    [finding] = worst([end, missing])["time-out"]
    assert (finding.verdict, finding.measured) == (verdict, measured)
    assert "it ended" in finding.detail


def test_no_processes_are_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--processes", "0"]) == 2
    assert "processes" in capsys.readouterr().err
