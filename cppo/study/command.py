"""What `cppo study` does: plans, runs what is not there yet, and reports on what is."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from cppo.config import StudyConfig
from cppo.console import Console, StopRequest
from cppo.sources import warm_start
from cppo.study.jobs import Jobs
from cppo.study.plan import Run, Study, plan
from cppo.study.plots import draw
from cppo.study.results import finished
from cppo.study.summary import Summary, summarise
from cppo.study.tables import introduction, page, tables

NEEDED = ("matplotlib", "scipy")


def run(
    config: StudyConfig,
    *,
    only: Sequence[str] | None = None,
    report_only: bool = False,
    report_to: str | None = None,
) -> int:
    """Runs and reports, in the study's own folder unless told otherwise; returns the exit status: 1
    where a run failed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"a study needs {' and '.join(missing)}: pip install 'cppo[study]'")
    if report_to and not report_only:
        raise ValueError("report-to is where --report-only writes: give that too, or leave it out")
    study, console, status = plan(config), Console(), 0
    chosen, records = study.only(only), finished(study)
    if not report_only:
        pending = [run for run in chosen if (run.variant, run.seed) not in records]
        if there := len(chosen) - len(pending):
            console.say(f"{there} of {len(chosen)} runs are there already, in {study.output}")
        with _locked(study.output) as lock:
            status = _work(study, pending, console, lock)
    summary = summarise(study, finished(study))
    if summary is not None:
        _report(summary, Path(report_to or study.output), console)
    elif report_only:
        raise ValueError(f"no run is finished in {study.output}: leave out --report-only")
    return status


def _work(study: Study, pending: Sequence[Run], console: Console, lock: int) -> int:
    start = study.runs[0].config
    if pending and start.model == "builtin":
        warm_start(start.dataset.difficulty, console)  # once, before several ask for it
    jobs, failed, stop = Jobs(study, pending, lock=lock), 0, StopRequest()
    with (
        stop.listening(),
        # A run's speed changes from phase to phase: what tells the time left is that of all phases.
        console.progress("study", len(pending), window_seconds=float("inf")) as show,
    ):
        for ends in jobs.watch(stop):
            for end in ends:
                failed += bool(end.failure)
                note = f"FAILED: {end.failure}" if end.failure else f"{end.seconds:.0f} s"
                console.say(f"{end.run.name}: {note}")
            if ends and (summary := summarise(study, finished(study))):
                _write(summary, study.output)
            show(jobs.done, jobs.names)
    if stop.signal:
        console.say("stopped; the same command goes on with the runs that are not finished")
        return 128 + stop.signal
    if failed:
        console.say(f"{failed} of {len(pending)} runs failed; the same command tries them again")
    return 1 if failed else 0


def _write(summary: Summary, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(summary.to_json(), encoding="utf-8")
    (folder / "study.md").write_text(page(summary), encoding="utf-8")


def _report(summary: Summary, folder: Path, console: Console) -> None:
    _write(summary, folder)
    draw(summary, folder)
    for table in tables(summary):
        console.table(table.title, table.header, table.rows)
        for note in table.notes:
            console.say(note)
    for paragraph in introduction(summary)[1:-1]:
        console.say(paragraph)
    console.say(f"the page, its plots and all figures are in {folder}")


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Holds a folder for this study; a run whose study was killed holds it to its own end."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another study, or what is left of one that was killed, is at work in {output}: "
                "wait until it has ended, or give another --output"
            ) from error
        yield lock.fileno()
