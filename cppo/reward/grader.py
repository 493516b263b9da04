"""A grader: runs a reward function in worker processes, with a time limit that always holds."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from cppo.reward.functions import NOTHING, Reward

logger = logging.getLogger(__name__)


_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from cppo.reward.worker import serve; serve(int(sys.argv[2]))"
)

Item = tuple[str, ...]
_START_SECONDS = 120.0
_MAX_FAILED_STARTS = 3


@dataclass(eq=False)
class _Worker:
    """The parent's side of one worker process."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    deadline: float  # of what it is doing: starting, or the call in hand
    received: bytes = b""
    ready: bool = False
    item: Item | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def receive(self, *kinds: str) -> bool:
        """Take in messages of these kinds; False where the worker is gone or says anything else."""
        try:
            data = self.channel.recv(1 << 16)
            *lines, self.received = (self.received + data).split(b"\n")
            self.messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return False
        return bool(data) and all(
            isinstance(message, dict) and any(kind in message for kind in kinds)
            for message in self.messages
        )

    def kill(self) -> str:
        """End the process and what it started; returns how it ended."""
        self.channel.close()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()  # its group is gone already
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "stuck in the kernel"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Grader:
    """Runs a reward function in worker processes, with a time limit per call that always holds.

    A call that is late is ended with SIGKILL, whatever it is doing, and its worker is replaced. A
    call that fails in any way scores 0 and is counted in `failures` under its reason ("timeout",
    "died", "not a number", "out of range" or "exception: <type>"), once for each distinct item;
    the first of each reason is logged. Workers are fresh interpreters: they neither fork the
    trainer nor import its main module. They ignore Ctrl-C and end with their parent. POSIX only.

    Args:
        spec: See `resolve`.
        timeout_seconds: Wall-clock limit of one call. A worker's start does not count into it. What
            a call leaves running in threads is not watched, but ends with the worker.
        workers: How many calls run at once.
        memory_bytes: Limit on a worker's private memory (Linux); past it a call gets a MemoryError.
            None for no limit.

    Raises:
        ValueError: An argument is out of range, or the reward function cannot be loaded.
        RuntimeError: A worker cannot start.
    """

    def __init__(
        self,
        spec: str = "default",
        *,
        timeout_seconds: float = 5.0,
        workers: int = 2,
        memory_bytes: int | None = 4 * 2**30,
    ) -> None:
        if not 0 < timeout_seconds <= 86_400:
            raise ValueError(
                f"timeout_seconds is {timeout_seconds}; it must be above 0 and at most a day"
            )
        if workers < 1:
            raise ValueError(f"workers is {workers}; at least 1 is needed")
        self.spec = spec
        self.timeout_seconds = timeout_seconds
        self.failures: Counter[str] = Counter()
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._closed = False
        try:
            for _ in range(workers):
                self._start()
            while not all(worker.ready for worker in self._workers):
                for worker in self._reporting():
                    self._take_start(worker)
        except BaseException:  # Ctrl-C above all: leave no worker behind
            self.close()
            raise

    def grade(self, items: Sequence[Item]) -> list[Reward]:
        """Rewards of items, in their order: (response, answer, question), and a fourth where the
        reward is of a reply too (see `cppo.reward.second_look`).

        Identical items are graded once. May be called from several threads; calls take turns.

        Raises:
            ValueError: An item is not three strings, or four, or the grader is closed.
            RuntimeError: Workers can no longer be started.
        """
        for item in items:
            if len(item) not in (3, 4) or not all(isinstance(part, str) for part in item):
                raise ValueError(
                    f"item {item!r:.200} cannot be graded; expected three strings:"
                    " (response, answer, question), or four, the last of them a reply"
                )
        with self._lock:
            if self._closed:
                raise ValueError("this Grader is closed; make a new one")
            pending = deque(dict.fromkeys(map(tuple, items)))
            rewards: dict[Any, Reward] = {}
            try:
                self._run(pending, rewards)
            except BaseException:  # Ctrl-C above all: leave no worker with a call in hand
                for worker in [each for each in self._workers if each.item is not None]:
                    self._replace(worker)
                raise
            return [rewards[tuple(item)] for item in items]

    def close(self) -> None:
        """End the workers. May be called again."""
        self._closed = True
        while self._workers:
            self._stop(self._workers[0])
        self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, pending: deque[Any], rewards: dict[Any, Reward]) -> None:
        while pending or any(worker.item is not None for worker in self._workers):
            for worker in list(self._workers):
                if not pending or not worker.ready or worker.item is not None:
                    continue
                if self._readable(worker):  # it ended while idle
                    self._take_replies(worker, rewards)
                else:
                    self._send(worker, pending.popleft(), rewards)
            for worker in self._reporting():
                if worker.ready:
                    self._take_replies(worker, rewards)
                else:
                    self._take_start(worker)

    def _reporting(self) -> list[_Worker]:
        """Wait; the workers that have something to read or that are late."""
        waiting = [each for each in self._workers if each.item is not None or not each.ready]
        if not waiting:
            return []
        patience = max(0.0, min(each.deadline for each in waiting) - time.monotonic())
        reading = [key.data for key, _ in self._selector.select(patience)]
        now = time.monotonic()
        return reading + [each for each in waiting if each not in reading and each.deadline <= now]

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Not multiprocessing: its workers import the parent's main module, and torch with it.
            path = json.dumps([str(entry) or os.getcwd() for entry in sys.path])
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, path, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # its own process group: out of Ctrl-C's reach
            )
        worker = _Worker(process, ours, deadline=time.monotonic() + _START_SECONDS)
        ours.settimeout(self.timeout_seconds)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        setup = {
            "spec": self.spec,
            "timeout_seconds": self.timeout_seconds,
            "memory_bytes": self._memory_bytes,
        }
        with contextlib.suppress(OSError):  # one that is gone already shows when it is read
            ours.sendall(json.dumps(setup).encode() + b"\n")

    def _stop(self, worker: _Worker) -> str:
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        return worker.kill()

    def _replace(self, worker: _Worker) -> str:
        ending = self._stop(worker)
        self._start()
        return ending

    def _take_start(self, worker: _Worker) -> None:
        if worker.deadline <= time.monotonic():
            complaint = f"it was not ready after {_START_SECONDS:.0f} seconds"
        elif not worker.receive("ready", "unable"):
            complaint = ""
        elif not worker.messages:
            return
        elif worker.messages[0].get("ready"):
            worker.ready = True
            self._failed_starts = 0
            return
        else:
            raise ValueError(worker.messages[0].get("unable"))
        ending = self._stop(worker)
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise RuntimeError(
                f"the worker process for reward {self.spec!r} could not start,"
                f" {self._failed_starts} times in a row: {complaint or ending}."
                " What it printed stands above."
            )
        self._start()

    def _send(self, worker: _Worker, item: Item, rewards: dict[Any, Reward]) -> None:
        worker.item = item
        worker.deadline = time.monotonic() + self.timeout_seconds
        try:
            worker.channel.sendall(json.dumps(item).encode() + b"\n")
        except OSError:  # it died while idle, or no longer reads
            self._fail(item, "died", self._replace(worker), rewards)

    def _take_replies(self, worker: _Worker, rewards: dict[Any, Reward]) -> None:
        late = worker.deadline <= time.monotonic()
        if worker.item is not None and late and not self._readable(worker):
            item = worker.item
            self._replace(worker)
            detail = f"no reward after {self.timeout_seconds:g} seconds"
            self._fail(item, "timeout", detail, rewards)
            return
        if not worker.receive("reward"):
            lost, ending = worker.item, self._replace(worker)
            if lost is not None:
                self._fail(lost, "died", ending, rewards)
            return
        for message in worker.messages:
            if worker.item is None:
                continue  # not asked for
            item, worker.item = worker.item, None
            rewards[item] = Reward(**message["reward"])
            if message["reason"]:
                self._fail(item, message["reason"], message["detail"], rewards)

    def _readable(self, worker: _Worker) -> bool:
        return any(key.data is worker for key, _ in self._selector.select(0))

    def _fail(self, item: Item, reason: str, detail: str, rewards: dict[Any, Reward]) -> None:
        rewards[item] = NOTHING
        self.failures[reason] += 1
        if self.failures[reason] == 1:
            logger.warning(
                "reward %s failed (%s) and scored 0; later ones are only counted. Response %.200r,"
                " answer %.200r: %s",
                self.spec, reason, item[0], item[1], detail.strip(),
            )  # fmt: skip
