"""The built-in task: coloured shapes on a grid, and questions that need reading them first.

Every answer needs two things: reading the cells of the picture, then one step of reasoning about
which of them to name, and in which order. The reference solution writes the reading down cell by
cell, so that each of its tokens is known to be *perception* (a colour or a shape that only the
picture tells) or *reasoning* (everything that follows from the text so far). That is the exact
ground truth against which the perception-token detector is measured.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from cppo.data import Item

COLOURS = {
    "red": (208, 48, 44),
    "orange": (236, 140, 32),
    "yellow": (232, 208, 48),
    "green": (56, 152, 72),
    "blue": (44, 92, 196),
    "purple": (132, 64, 168),
}
SHAPES = ("circle", "square", "triangle", "cross")
CELL_PIXELS = 56
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
GRIDS = {1: (2, 2), 2: (2, 3), 3: (3, 3)}  # difficulty -> rows, columns

Cell = tuple[str, str]  # colour, shape


@dataclass(frozen=True, kw_only=True)
class Span:
    """A piece of a reference solution; `perception` when only the picture tells what it says."""

    text: str
    perception: bool


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """An item together with its reference solution; the spans' texts joined are the response."""

    item: Item
    solution: tuple[Span, ...]

    @property
    def response(self) -> str:
        return "".join(span.text for span in self.solution)


class ShapesTask:
    """A deterministic, endless-for-all-purposes source of puzzles.

    Puzzle `i` of a split is a pure function of (seed, split, i). Train and eval never share a
    layout: a hash of the layout decides which of the two it belongs to.
    """

    def __init__(self, *, split: str, size: int, difficulty: int = 1, seed: int = 0) -> None:
        if split not in ("train", "eval"):
            raise ValueError(f"split is {split!r}; use 'train' or 'eval'")
        if difficulty not in GRIDS:
            raise ValueError(f"difficulty is {difficulty!r}; use one of {sorted(GRIDS)}")
        self.split, self.size, self.difficulty, self.seed = split, size, difficulty, seed

    def __len__(self) -> int:
        return self.size

    def read(self, index: int) -> Item:
        return self.puzzle(index).item

    def puzzle(self, index: int, *, draw: bool = True, misread: float = 0.0) -> Puzzle:
        """Puzzle `index`; without its picture, in a fraction of the time, where not `draw`.

        With `misread`, the solution is a careless reader's: each word it reads is another one with
        this probability, and it reasons on from what it read. The item is the same.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"puzzle {index} asked for; the {self.split} split holds {self.size}")
        key = [self.seed, int(self.split == "eval"), self.difficulty, index]
        rng = np.random.default_rng(key)
        rows, columns = GRIDS[self.difficulty]
        cells = self._draw_layout(rng, rows * columns)
        kind = tuple(ASK)[index % len(ASK)]
        question, places = ASK[kind](rng, np.arange(len(cells)).reshape(rows, columns))
        item = Item(
            row=f"{self.split}:{index}",
            images=(render(cells, columns, rng),) if draw else (),
            # The picture last, so that its parts lie at fixed distances from the response: with the
            # question in between, reading took twice as long to learn.
            question=question + "<image>",
            answer=_answer(cells, places),
            kind=kind,
        )
        seen = _misread(np.random.default_rng([*key, 1]), cells, misread)
        return Puzzle(item=item, solution=_solution(seen, places))

    def _draw_layout(self, rng: np.random.Generator, cells: int) -> list[Cell]:
        names = list(COLOURS)
        while True:
            # Few distinct values a picture, so that a word alone does not tell its place.
            colours = rng.choice(names, size=3, replace=False)
            shapes = rng.choice(SHAPES, size=3, replace=False)
            layout = [(str(rng.choice(colours)), str(rng.choice(shapes))) for _ in range(cells)]
            digest = hashlib.blake2b(repr(layout).encode(), digest_size=2).digest()
            if (digest[0] < 26) == (self.split == "eval"):  # a tenth of all layouts is held out
                return layout


def _misread(rng: np.random.Generator, cells: list[Cell], share: float) -> list[Cell]:
    def read(word: str, words: Sequence[str]) -> str:
        if rng.random() >= share:
            return word
        return str(rng.choice([other for other in words if other != word]))

    return [(read(colour, tuple(COLOURS)), read(shape, SHAPES)) for colour, shape in cells]


def _solution(cells: list[Cell], places: Sequence[int]) -> tuple[Span, ...]:
    spans = [Span(text="<think>", perception=False)]
    for place, (colour, shape) in zip(PLACES, cells, strict=False):
        spans.append(Span(text=f" {place}", perception=False))
        spans.append(Span(text=f" {colour}", perception=True))
        spans.append(Span(text=f" {shape}", perception=True))
    spans.append(Span(text=f".</think> \\boxed{{{_answer(cells, places)}}}", perception=False))
    return tuple(spans)


def _answer(cells: list[Cell], places: Sequence[int]) -> str:
    return " ".join(f"{PLACES[place]} {' '.join(cells[place])}" for place in places)


# --- questions: (rng, places row by row) -> question, the places to name, in order -------------

Grid = np.ndarray[tuple[int, int], np.dtype[np.int64]]
Question = tuple[str, list[int]]


def _next_to(rng: np.random.Generator, grid: Grid) -> Question:
    rows, columns = grid.shape
    if rng.random() < 0.5:
        row, column = rng.integers(rows), rng.integers(columns - 1)
        direction, there = "right of", grid[row, column + 1]
    else:
        row, column = rng.integers(rows - 1), rng.integers(columns)
        direction, there = "below", grid[row + 1, column]
    return f"Which shape is {direction} the {PLACES[grid[row, column]]}?", [int(there)]


def _reverse(_: np.random.Generator, grid: Grid) -> Question:
    return "Name all shapes from the last to the first.", grid.ravel()[::-1].tolist()


def _columns(_: np.random.Generator, grid: Grid) -> Question:
    return "Name all shapes column by column.", grid.T.ravel().tolist()


def _bottom_up(_: np.random.Generator, grid: Grid) -> Question:
    return "Name all shapes row by row, from the bottom up.", grid[::-1].ravel().tolist()


# Most of what is read counts, and an answer is hardly ever guessed, so that rewards reinforce
# reading. (With yes-or-no questions and counts they reinforced misreadings too.)
ASK: dict[str, Callable[[np.random.Generator, Grid], Question]] = {
    "next_to": _next_to,
    "reverse": _reverse,
    "columns": _columns,
    "bottom_up": _bottom_up,
}


# --- drawing -----------------------------------------------------------------------------------


def render(cells: list[Cell], columns: int, rng: np.random.Generator) -> Image.Image:
    """Draws the cells row by row, 56 px each: sizes, positions, turns and tints vary a little."""
    rows = len(cells) // columns
    background = tuple(int(v) for v in rng.integers(225, 256, size=3))
    size = (columns * CELL_PIXELS, rows * CELL_PIXELS)
    picture = Image.new("RGB", (size[0] * 2, size[1] * 2), background)  # drawn at double size
    draw = ImageDraw.Draw(picture)
    for index, (colour, shape) in enumerate(cells):
        row, column = divmod(index, columns)
        radius = 2 * rng.uniform(16, 20)
        centre_x = (2 * column + 1) * CELL_PIXELS + 2 * rng.uniform(-3, 3)
        centre_y = (2 * row + 1) * CELL_PIXELS + 2 * rng.uniform(-3, 3)
        tint = np.clip(np.array(COLOURS[colour]) + rng.integers(-18, 19, size=3), 0, 255)
        outline = _outline(shape, radius, math.radians(rng.uniform(-8, 8)))
        draw.polygon(
            [(centre_x + x, centre_y + y) for x, y in outline],
            fill=(int(tint[0]), int(tint[1]), int(tint[2])),
        )
    return picture.reduce(2)


def _outline(shape: str, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corner points around the origin, in pixels."""
    points: list[tuple[float, float]]
    if shape == "circle":
        points = [
            (radius * math.cos(a), radius * math.sin(a))
            for a in np.linspace(0, 2 * math.pi, 24, endpoint=False)
        ]
    elif shape == "square":
        s = 0.82 * radius
        points = [(-s, -s), (s, -s), (s, s), (-s, s)]
    elif shape == "triangle":
        points = [(0, -radius), (0.95 * radius, 0.75 * radius), (-0.95 * radius, 0.75 * radius)]
    else:  # a cross
        s, r = 0.34 * radius, radius
        points = [(-s, -r), (s, -r), (s, -s), (r, -s), (r, s), (s, s)]
        points += [(s, r), (-s, r), (-s, s), (-r, s), (-r, -s), (-s, -s)]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]
