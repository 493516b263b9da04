"""The built-in task: coloured shapes on a grid, and questions that need reading them first.

Every answer needs two things: reading all cells of the picture, then one step of reasoning over
what was read. The reference solution writes the reading down cell by cell, so each of its tokens
is known to be *perception* (a colour or a shape that only the picture tells) or *reasoning*
(everything that follows from the text so far). That is the exact ground truth against which the
perception-token detector is measured.
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
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
CELL_PIXELS = 56
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
        rng = np.random.default_rng([self.seed, int(self.split == "eval"), self.difficulty, index])
        rows, columns = GRIDS[self.difficulty]
        cells = self._draw_layout(rng, rows * columns)
        kind = tuple(ASK)[index % len(ASK)]
        place = int(rng.integers(2**63))  # both readers are asked the same question

        def ask(seen: list[Cell]) -> tuple[str, str, str]:
            return ASK[kind](np.random.default_rng(place), cells, seen, columns)

        question, _, answer = ask(cells)
        seen = _misread(rng, cells, misread)
        _, reasoning, conclusion = ask(seen)
        item = Item(
            row=f"{self.split}:{index}",
            images=(render(cells, columns, rng),) if draw else (),
            question="<image>" + question,
            answer=answer,
            kind=kind,
        )
        return Puzzle(item=item, solution=_solution(seen, reasoning, conclusion))

    def _draw_layout(self, rng: np.random.Generator, cells: int) -> list[Cell]:
        names = list(COLOURS)
        while True:
            # Few distinct values a picture, so that counts above one are common.
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

    return [(read(colour, list(COLOURS)), read(shape, SHAPES)) for colour, shape in cells]


def _solution(cells: list[Cell], reasoning: str, answer: str) -> tuple[Span, ...]:
    spans = [Span(text="<think>", perception=False)]
    for number, (colour, shape) in enumerate(cells, start=1):
        spans.append(Span(text=f" {number}", perception=False))
        spans.append(Span(text=f" {colour}", perception=True))
        spans.append(Span(text=f" {shape}", perception=True))
        spans.append(Span(text="," if number < len(cells) else ".", perception=False))
    spans.append(Span(text=f" {reasoning}</think> \\boxed{{{answer}}}", perception=False))
    return tuple(spans)


# --- questions: (rng, cells, seen, columns) -> question, reasoning, answer ---------------------
# The question is about the cells as they are; reasoning and answer go by what was seen of them.


def _next_to(
    rng: np.random.Generator, cells: list[Cell], seen: list[Cell], columns: int
) -> tuple[str, str, str]:
    """Geometry, then looking up: what is right of, or below, a numbered shape?"""
    words, start, end = _neighbours(rng, len(cells), columns)
    colour, shape = seen[end]
    return (
        f"What is {words} shape {start + 1}?",
        f"{words} {start + 1} is {end + 1} {colour} {shape}.",
        f"{colour} {shape}",
    )


def _described(
    rng: np.random.Generator, cells: list[Cell], seen: list[Cell], columns: int
) -> tuple[str, str, str]:
    """Finding, geometry, looking up: what is next to a shape that is described, not numbered?"""
    for _ in range(20):
        words, start, end = _neighbours(rng, len(cells), columns)
        if cells.count(cells[start]) == 1:
            break
    else:
        return _next_to(
            rng, cells, seen, columns
        )  # a picture of equal shapes describes none of them
    (colour, shape), (found_colour, found_shape) = cells[start], seen[end]
    return (
        f"What is {words} the {colour} {shape}?",
        f"{colour} {shape} is {start + 1}, {words} {start + 1} is {end + 1} "
        f"{found_colour} {found_shape}.",
        f"{found_colour} {found_shape}",
    )


def _swap(
    rng: np.random.Generator, cells: list[Cell], seen: list[Cell], _: int
) -> tuple[str, str, str]:
    """Looking up twice, then recombining: one shape takes the colour of another."""
    first, second = (int(number) for number in rng.choice(len(cells), size=2, replace=False))
    answer = f"{seen[second][0]} {seen[first][1]}"
    return (
        f"Shape {first + 1} takes the colour of shape {second + 1}. What is it now?",
        f"{second + 1} {seen[second][0]}, {first + 1} {seen[first][1]}: {answer}.",
        answer,
    )


def _reverse(
    rng: np.random.Generator, cells: list[Cell], seen: list[Cell], _: int
) -> tuple[str, str, str]:
    """Looking up everything in another order: colours, or shapes, from the last to the first."""
    part = int(rng.integers(2))
    found = [cell[part] for cell in reversed(seen)]
    numbered = zip(range(len(cells), 0, -1), found, strict=True)
    return (
        f"Name the {('colours', 'shapes')[part]} from the last to the first.",
        ", ".join(f"{number} {name}" for number, name in numbered) + ".",
        " ".join(found),
    )


def _neighbours(rng: np.random.Generator, cells: int, columns: int) -> tuple[str, int, int]:
    """A direction in words, a cell, and the cell that lies there from it."""
    rows = cells // columns
    if rng.random() < 0.5:
        start = int(rng.integers(rows)) * columns + int(rng.integers(columns - 1))
        return "right of", start, start + 1
    start = int(rng.integers(rows - 1)) * columns + int(rng.integers(columns))
    return "below", start, start + columns


# The answers of every kind have many values: a guess hardly ever earns a reward, so that rewards
# reinforce reading. (With yes-or-no questions and counts, training unlearned to read.)
Ask = Callable[[np.random.Generator, list[Cell], list[Cell], int], tuple[str, str, str]]
ASK: dict[str, Ask] = {
    "next_to": _next_to,
    "described": _described,
    "swap": _swap,
    "reverse": _reverse,
}


# --- drawing -----------------------------------------------------------------------------------


def render(cells: list[Cell], columns: int, rng: np.random.Generator) -> Image.Image:
    """Draws the cells row by row, 56 px each: sizes, places, turns and tints vary a little."""
    rows = len(cells) // columns
    background = tuple(int(v) for v in rng.integers(225, 256, size=3))
    size = (columns * CELL_PIXELS, rows * CELL_PIXELS)
    picture = Image.new("RGB", (size[0] * 2, size[1] * 2), background)  # drawn at double size
    draw = ImageDraw.Draw(picture)
    for index, (colour, shape) in enumerate(cells):
        row, column = divmod(index, columns)
        radius = 2 * rng.uniform(13, 20)
        slack = CELL_PIXELS - 3 - radius
        centre_x = (2 * column + 1) * CELL_PIXELS + rng.uniform(-slack, slack) * 0.5
        centre_y = (2 * row + 1) * CELL_PIXELS + rng.uniform(-slack, slack) * 0.5
        tint = np.clip(np.array(COLOURS[colour]) + rng.integers(-18, 19, size=3), 0, 255)
        outline = _outline(shape, radius, math.radians(rng.uniform(-12, 12)))
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
    elif shape == "diamond":
        points = [(0, -radius), (0.72 * radius, 0), (0, radius), (-0.72 * radius, 0)]
    else:  # a cross
        s, r = 0.34 * radius, radius
        points = [(-s, -r), (s, -r), (s, -s), (r, -s), (r, s), (s, s)]
        points += [(s, r), (-s, r), (-s, s), (-r, s), (-r, -s), (-s, -s)]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]
