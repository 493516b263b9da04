"""The parts of the bench, by name. Each is measured in a process of its own: memory that one leaves
to its allocator would serve the next, and change its time and its peak."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import floor
import scale
import step
import token_statistics
import torch
import update
from measure import Row

from cppo.device import Backend, choose, resolve
from cppo.doctor.environment import describe

Result = TypeVar("Result")

SECTIONS: Mapping[str, Callable[[Backend, str, int], list[Row]]] = {
    "update": lambda backend, name, repeats: update.measure(backend, repeats),
    "floor": lambda backend, name, repeats: floor.measure(backend, repeats),
    "step": step.measure,
    "statistics": lambda backend, name, repeats: token_statistics.measure(backend, repeats),
    "growth": lambda backend, name, repeats: update.grow(backend, repeats),
    "scale": lambda backend, name, repeats: scale.measure(backend, repeats),
}


def measure_apart(section: str, backend: str, repeats: int, threads: int) -> list[Row]:
    """One of them, on the backend of that name."""
    return _apart(_measure, section, backend, repeats, threads)


def describe_apart(backend: str, threads: int) -> dict[str, Any]:
    """What the report says of the machine, and of the backend that `--backend` stands for."""
    return _apart(_describe, backend, threads)


def _apart(run: Callable[..., Result], *given: Any) -> Result:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_end_with_parent) as process:
        return process.submit(run, *given).result()


def _end_with_parent() -> None:
    """A bench that is killed leaves nothing running, which would slow down the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _measure(section: str, backend: str, repeats: int, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    return SECTIONS[section](choose(backend), backend, repeats)


def _describe(name: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    found = resolve(name)
    backend = found.backend
    assert backend is not None
    return {
        "backend": found.name,
        "device": backend.device,
        "threads": threads,
        "environment": describe(backend) | _peers(),
    }


def _peers() -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in ("trl", "liger-kernel"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
