"""Runs side by side, each in a process of its own: what befalls one leaves the others alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cppo.console import StopRequest
from cppo.study.plan import Run, Study
from cppo.study.results import place
from cppo.study.worker import request

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0  # from asking a process to end until it is ended


@dataclass(frozen=True, kw_only=True)
class End:
    """How a run ended. `failure` says what went wrong; empty: it did not."""

    run: Run
    seconds: float
    failure: str = ""


class Jobs:
    """All runs that are to be done. `lock`: a file that every process holds open to its end."""

    def __init__(self, study: Study, runs: Sequence[Run], *, lock: int) -> None:
        self._study, self._lock = study, lock
        self._waiting = list(runs)
        self._running: list[_Job] = []
        self._ended = 0

    @property
    def done(self) -> float:
        """How many runs are done, those in hand by the share of their steps."""
        return self._ended + sum(job.share() for job in self._running)

    @property
    def names(self) -> str:
        return "; ".join(job.run.name for job in self._running)

    def watch(self, stop: StopRequest) -> Iterator[list[End]]:
        """Does them, and gives those that have ended, now and then; until all have, or `stop`."""
        config = self._study.config
        try:
            while (self._waiting or self._running) and not stop.signal:
                while self._waiting and len(self._running) < config.jobs:
                    self._running.append(_Job(self._study, self._waiting.pop(0), self._lock))
                time.sleep(POLL_SECONDS)
                ends = [job.end(60 * config.timeout_minutes) for job in self._running]
                pairs = list(zip(self._running, ends, strict=True))
                self._running = [job for job, end in pairs if end is None]
                found = [end for end in ends if end is not None]
                self._ended += len(found)
                yield found
        finally:
            for job in self._running:
                job.ask_to_end()
            for job in self._running:
                job.kill(GRACE_SECONDS)
                job.clear()


class _Job:
    """One run's process."""

    def __init__(self, study: Study, run: Run, lock: int) -> None:
        self.run, self._keep = run, study.config.keep
        name = f"{run.variant}-seed-{run.seed}"
        self._folder = study.output / "folders" / name
        self._log = study.output / "logs" / f"{name}.log"
        self._result = place(study.output, run)
        shutil.rmtree(self._folder, ignore_errors=True)  # of an attempt that did not end
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        asked = request(run, folder=self._folder, result=self._result, jobs=study.config.jobs)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cppo.study.worker"],
                env={**os.environ, "OMP_NUM_THREADS": str(study.config.threads)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the study's to handle
                pass_fds=[lock],
            )
        assert self._process.stdin is not None
        # One that has died already is found out as it ends.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(json.dumps(asked).encode())

    def share(self) -> float:
        """Of the run that is done; the measurements at its end count as one step more."""
        metrics = self._folder / "metrics.jsonl"
        steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        return min(1.0, steps / (self.run.config.steps + 1))

    def end(self, timeout_seconds: float) -> End | None:
        """How it ended; None while it goes on. One that takes too long is ended."""
        seconds, failure = time.monotonic() - self._started, ""
        if self._process.poll() is None:
            if seconds < timeout_seconds:
                return None
            self.kill(0)
            failure = f"it took longer than timeout_minutes, and was ended after {seconds:.0f} s"
        elif self._process.returncode or not self._result.exists():
            failure = f"its process ended with {_status(self._process.returncode)}"
        if failure:
            failure += f". The end of {self._log}:\n{self._last_words()}"
        self.clear()
        return End(run=self.run, seconds=seconds, failure=failure)

    def ask_to_end(self) -> None:
        self._process.terminate()

    def kill(self, grace_seconds: float) -> None:
        try:
            self._process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def clear(self) -> None:
        """Removes the folder of a run that is finished."""
        if self._result.exists() and not self._keep:
            shutil.rmtree(self._folder)

    def _last_words(self, lines: int = 20) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.strip().split("\n")[-lines:])


def _status(code: int) -> str:
    return f"status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
