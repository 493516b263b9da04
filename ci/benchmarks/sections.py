"""The parts of the bench, by name. Each is measured in a process of its own: memory that one leaves
to its allocator would serve the next, and change its time and its peak."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor

import floor
import scale
import step
import token_statistics
import torch
import update
from measure import Row

from cppo.device import Backend, choose

SECTIONS: Mapping[str, Callable[[Backend, str, int], list[Row]]] = {
    "update": lambda backend, name, repeats: update.measure(backend, repeats),
    "floor": lambda backend, name, repeats: floor.measure(backend, repeats),
    "step": step.measure,
    "statistics": lambda backend, name, repeats: token_statistics.measure(backend, repeats),
    "growth": lambda backend, name, repeats: update.grow(backend, repeats),
    "scale": lambda backend, name, repeats: scale.measure(backend, repeats),
}


def measure(section: str, backend: str, repeats: int, threads: int) -> list[Row]:
    """One of them, on the backend of that name."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        return apart.submit(_measure, section, backend, repeats, threads).result()


def _measure(section: str, backend: str, repeats: int, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    return SECTIONS[section](choose(backend), backend, repeats)
