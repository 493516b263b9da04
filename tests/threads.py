"""Threads that stand in for processes, where only what these tell each other matters."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class FakeGather:
    """Stands in for gathering over processes: as many threads that wait for one another."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world, timeout=60)
        self._given: list[list[Any]] = [[] for _ in range(world)]

    def of(self, rank: int) -> Callable[[list[Any]], list[Any]]:
        def gather(values: list[Any]) -> list[Any]:
            self._given[rank] = values
            self._barrier.wait()
            joined = [value for given in self._given for value in given]
            self._barrier.wait()
            return joined

        return gather


def side_by_side(world: int, run: Callable[[int], Result]) -> list[Result]:
    """What `run` gives for each rank, all at once."""
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))
