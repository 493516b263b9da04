"""The built-in task and its small policy: everything runs with nothing downloaded."""

from cppo.builtin.policy import WarmStart, ensure, entry, label_tokens
from cppo.builtin.task import GRIDS, Puzzle, ShapesTask, Span

__all__ = ["GRIDS", "Puzzle", "ShapesTask", "Span", "WarmStart", "ensure", "entry", "label_tokens"]
