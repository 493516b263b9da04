"""What `cppo doctor` does: starts the processes, gathers what they find, and says so."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cppo.config import DoctorConfig
from cppo.console import Console
from cppo.device import resolve
from cppo.doctor.collectives import GIVEN_UP, GRACE_SECONDS, TIMEOUT_SECONDS
from cppo.doctor.finding import Finding, at_most
from cppo.doctor.worker import SECTIONS
from cppo.processes import LAUNCHER

DEADLINE_SECONDS = 900.0
POLL_SECONDS = 0.2
DIED = "the process died"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What all processes found, as it stands in the JSON file."""

    date: str
    backend: str
    origin: str
    processes: int
    passed: bool
    environment: dict[str, str]
    findings: dict[str, list[Finding]]  # by section, the worst of all processes

    def count(self, verdict: str) -> int:
        return sum(f.verdict == verdict for found in self.findings.values() for f in found)


def run(config: DoctorConfig) -> Report:
    """Examines a backend; prints tables and writes JSON where `config.json` says."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "cppo doctor starts its processes itself: run it without torchrun, and give --processes"
        )
    # Elsewhere, so that this process never holds a device that may serve one process only.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as elsewhere:
        chosen = elsewhere.submit(_choose, config.backend).result()
    if chosen.devices is not None and config.processes > chosen.devices:
        raise ValueError(
            f"processes is {config.processes}, but there is one device for each of "
            f"{chosen.devices} only: give --processes {chosen.devices} or less"
        )
    if config.json is not None:
        _prepare(Path(config.json))
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        ward = _Ward(chosen.name, config.processes, Path(folder))
        with console.progress("doctor", len(SECTIONS)) as show:
            for done, title in ward.watch():
                show(done, title)
        ends = [patient.end() for patient in ward.patients]
    report = Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        backend=chosen.name,
        origin=chosen.origin,
        processes=config.processes,
        environment=next((r["environment"] for r in ends[0].records if "environment" in r), {}),
        findings=worst(ends),
        passed=False,
    )
    report = dataclasses.replace(report, passed=report.count("failed") == 0)
    _print(report, console)
    if config.json is not None:
        record = dataclasses.asdict(report)
        for finding in (each for found in record["findings"].values() for each in found):
            if finding["measured"] is not None and not math.isfinite(finding["measured"]):
                finding["measured"] = None  # which JSON has no number for
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        Path(config.json).write_text(text, encoding="utf-8")
        console.say(f"report: {config.json}")
    return report


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Choice:
    """What is examined. `devices`: how many processes they suffice for; any number if None."""

    name: str
    origin: str
    devices: int | None


def _choose(backend: str) -> _Choice:
    found = resolve(backend)
    assert found.backend is not None
    devices = None if found.backend.device == "cpu" else torch.accelerator.device_count()
    return _Choice(name=found.name, origin=found.origin, devices=devices)


def _prepare(file: Path) -> None:
    """Finds out whether the report can be written before it takes minutes to make."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise ValueError(f"json: {str(file)!r} cannot be written: {error}") from error


# --- the processes -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """What is left of a process: what it wrote, and how it ended in the middle (empty: it did not).

    `waited`: seconds in its last section. `gave_up`: it ended itself, as libraries do that cannot
    raise from a collective; it did not crash, nor was it ended.
    """

    records: list[dict[str, Any]]
    how: str
    waited: float
    gave_up: bool

    @property
    def section(self) -> str:
        titles = [record["section"] for record in self.records if "section" in record]
        return titles[-1] if titles else "starting"


class _Patient:
    """One process under examination."""

    def __init__(self, backend: str, environment: dict[str, str], report: Path) -> None:
        self._report, self._log = report, report.with_suffix(".log")
        command = [sys.executable, "-m", "cppo.doctor.worker", "--backend", backend]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--report", str(report)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.overdue = False
        self.ended: float | None = None  # when that was noticed

    def ends(self) -> bool:
        """Whether it has ended."""
        if self.ended is None and self.process.poll() is not None:
            self.ended = time.time()
        return self.ended is not None

    def records(self) -> list[dict[str, Any]]:
        """What it has written so far, whole lines only."""
        if not self._report.exists():
            return []
        lines = self._report.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def section(self) -> str:
        """The one it is in; empty once it has been through all."""
        titles = [record["section"] for record in self.records() if "section" in record]
        return titles[-1] if titles else "starting"

    def waited(self) -> float:
        """Seconds from the beginning of its last section to its end."""
        began = [record["began"] for record in self.records() if "began" in record]
        return self.ended - began[-1] if began and self.ended is not None else math.inf

    def end(self) -> End:
        """How it ended, once it has."""
        status = self.process.wait()
        how = ""
        if self.overdue:
            how = f"did not end within {DEADLINE_SECONDS:.0f} s"
        elif self.section():
            name = f"status {status}" if status >= 0 else signal.Signals(-status).name
            log = self._log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
            how = f"the process ended ({name}). Its last words:\n" + "\n".join(log[-15:])
        gave_up = not self.overdue and (status > 0 or -status == signal.SIGABRT)
        return End(records=self.records(), how=how, waited=self.waited(), gave_up=gave_up)


class _Ward:
    """All processes under examination; they are ended with it."""

    def __init__(self, backend: str, processes: int, folder: Path) -> None:
        self.patients = [
            _Patient(backend, _environment(rank, processes, port), folder / f"{rank}.jsonl")
            for port in [_free_port()]
            for rank in range(processes)
        ]

    def watch(self) -> Iterator[tuple[int, str]]:
        """Where they are, until all have ended: the first's number of sections, and its title."""
        titles = list(SECTIONS)
        started = time.monotonic()
        try:
            while not self._over():
                section = self.patients[0].section()
                yield (titles.index(section) if section in titles else 0), section
                if time.monotonic() - started > DEADLINE_SECONDS:
                    for patient in self._awaited():
                        patient.overdue = not patient.ends()
                    break
                time.sleep(POLL_SECONDS)
            yield len(titles), ""
        finally:
            for patient in self.patients:
                patient.process.kill()
                patient.process.wait()

    def _over(self) -> bool:
        """Whether all that are awaited have ended; each end is noticed as it happens."""
        ended = [patient.ends() for patient in self._awaited()]
        return all(ended)

    def _awaited(self) -> Sequence[_Patient]:
        """Those whose end matters: the last of several stays away from the others until then."""
        last = self.patients[-1]
        absent = len(self.patients) > 1 and last.section() == "time-out"
        return self.patients[:-1] if absent else self.patients


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """As a launcher sets it; the cores are shared out."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    if processes > 1:
        values = (rank, processes, rank, "127.0.0.1", port)
        environment |= {name: str(v) for name, v in zip(LAUNCHER, values, strict=True)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    return environment


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# --- what they found ---------------------------------------------------------------------------


def worst(ends: Sequence[End]) -> dict[str, list[Finding]]:
    """By section and name the worst finding of all processes, and how processes ended."""
    found: dict[tuple[str, str], Finding] = {}

    def add(section: str, rank: int, finding: Finding) -> None:
        key = (section, finding.name)
        if len(ends) > 1 and finding.verdict == "failed":
            detail = f"process {rank}: {finding.detail}"
            finding = dataclasses.replace(finding, detail=detail)
        if key not in found or finding.badness > found[key].badness:
            found[key] = finding

    names = {field.name for field in dataclasses.fields(Finding)}
    for rank, end in enumerate(ends):
        for record in end.records:
            if "name" in record:
                values = {name: value for name, value in record.items() if name in names}
                add(record["section"], rank, Finding(**values))
        if end.how and end.section == "time-out":
            absent = len(ends) > 1 and rank == len(ends) - 1  # ended once it was given up
            if not absent:
                add(end.section, rank, _given_up(end))
        elif end.how:
            add(end.section, rank, Finding(name=DIED, verdict="failed", detail=end.how))
    sections: dict[str, list[Finding]] = {}
    for (section, _), finding in found.items():
        sections.setdefault(section, []).append(finding)
    return sections


def _given_up(end: End) -> Finding:
    """A process that ended while it missed another: of the time-out, or of something else."""
    if not end.gave_up or end.waited < 0.9 * TIMEOUT_SECONDS:
        return Finding(name=DIED, verdict="failed", detail=end.how)
    limit = TIMEOUT_SECONDS + GRACE_SECONDS
    return at_most(GIVEN_UP, end.waited, limit, unit="s", detail=end.how)


def _print(report: Report, console: Console) -> None:
    facts = [("processes", str(report.processes)), *report.environment.items()]
    console.table(f"{report.backend}, from {report.origin}", ("", ""), facts)
    rows = [_row(section, findings) for section, findings in report.findings.items()]
    console.table("What was found", ("", "checks", "nearest to its limit, and more", ""), rows)
    for section, findings in report.findings.items():
        for finding in findings:
            if finding.verdict == "failed" and finding.detail:
                console.say(f"\n{section}: {finding.name}\n{finding.detail}")
    console.say(
        f"{report.backend}: {report.count('passed')} passed, {report.count('failed')} failed, "
        f"{report.count('not run')} not run"
    )


def _row(section: str, findings: list[Finding]) -> tuple[str, ...]:
    """A section at a glance; the report holds every finding."""
    verdicts = Counter(finding.verdict for finding in findings)
    counts = [f"{verdicts[v]} {v}" for v in ("passed", "failed", "not run") if verdicts[v]]
    measured = [f for f in findings if f.limit is not None]
    told = [f for f in findings if f.verdict in ("info", "not run")]
    if measured:
        told = [max(measured, key=lambda f: f.badness), *told]
    state = "FAILED" if verdicts["failed"] else "ok" if verdicts["passed"] else ""
    return section, ", ".join(counts), "\n".join(map(_line, told)), state


def _line(finding: Finding) -> str:
    if finding.measured is None:
        return f"{finding.name}: {finding.detail}"
    limit = "" if finding.limit is None else f" (limit {finding.limit:.3g})"
    return " ".join(filter(None, [f"{finding.name}: {finding.measured:.3g}{limit}", finding.unit]))
