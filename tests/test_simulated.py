"""Hardware that cppo has never heard of: a simulated accelerator, from a package outside.

`simulated_accelerator/` is built here with a C++ compiler. PyTorch takes its device for no CPU, so
whatever assumes one, or a vendor's, breaks on it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import skip_or_fail

SOURCE = Path(__file__).parent / "simulated_accelerator"
COMPILER = os.environ.get("CXX", "c++")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python where the package is installed, and nowhere else."""
    if shutil.which(COMPILER) is None:
        skip_or_fail(f"no C++ compiler: '{COMPILER}' is not found (install g++, or set CXX)")
    folder = tmp_path_factory.mktemp("simulated")
    source, site = folder / "source", folder / "site"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*install, "--no-build-isolation", "--no-deps", "--target", str(site), str(source)],
        check=True,
        timeout=500,
    )

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [sys.executable, "-m", *arguments],
            env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"},
            timeout=500,
            capture_output=True,
            text=True,
            check=False,
        )
        print(ended.stdout, ended.stderr, sep="\n")
        return ended

    return start


def test_it_is_found_beside_the_first_party_backends(run: Run) -> None:
    listed = run("cppo.cli", "backends").stdout
    rows = [line for line in listed.splitlines() if " usable " in line]
    lines = {line.split()[1]: line for line in rows}
    assert set(lines) == {"cpu", "cuda", "npu", "rocm", "simulated", "xpu"}
    assert "cppo-simulated 1.0 (cppo_simulated)" in lines["simulated"]
    assert "device simulated" in lines["simulated"]


def test_the_doctor_finds_it_in_good_health(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    ended = run(
        *("cppo.cli", "doctor", "--backend", "simulated"),
        *("--processes", "2", "--json", str(file)),
    )
    assert ended.returncode == 0
    report = json.loads(file.read_text())
    assert report["passed"]
    assert report["environment"]["device"].startswith("2 x simulated device")
    verdicts = [f["verdict"] for found in report["findings"].values() for f in found]
    assert verdicts.count("passed") > 50
    # PyTorch leaves a device that it does not know no choice of kernels, in either precision.
    not_run = {
        f["name"]
        for found in report["findings"].values()
        for f in found
        if f["verdict"] == "not run"
    }
    assert not_run == {"sdpa's kernels float32", "sdpa's kernels bfloat16"}


def test_more_processes_than_devices_are_refused(run: Run) -> None:
    ended = run("cppo.cli", "doctor", "--backend", "simulated", "--processes", "3")
    assert ended.returncode == 2
    assert "give --processes 2 or less" in ended.stderr


@pytest.mark.parametrize(
    "files", [("device", "processes", "statistics"), ("trainer",)], ids="-".join
)
def test_what_runs_on_devices_passes_its_tests_on_it(run: Run, files: tuple[str, ...]) -> None:
    """Resumed runs, runs in two processes, and runs ended by signals among them."""
    paths = [str(SOURCE.parent / f"test_{name}.py") for name in files]
    ended = run("pytest", "-q", "--backend", "simulated", *paths)
    assert ended.returncode == 0
    assert " passed" in ended.stdout
    assert "skipped" not in ended.stdout
