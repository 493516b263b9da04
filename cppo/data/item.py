"""What a source gives, an `Item`, and what it raises for a row that cannot be one, a `BadRow`."""

from dataclasses import dataclass
from typing import Protocol

from PIL.Image import Image

PLACEHOLDER = "<image>"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question about one or several pictures.

    `row` is the row's stable id: the file's path inside its source, then the row in it, from 0
    ("data/train-00000-of-00001.parquet:17"; in JSON lines the number of the line, from 1).
    `images` are decoded, upright (EXIF) and RGB, each of 1x1 pixel or more. `question` has exactly
    one "<image>" for each of them, where it belongs. `answer` is never blank. `kind` groups
    results; it is "" where the source names none.
    """

    row: str
    images: tuple[Image, ...]
    question: str
    answer: str
    kind: str = ""


class BadRow(ValueError):  # noqa: N818 - named for what it is about
    """A row that cannot be used. `reason` is short and stable, `detail` tells what was found.

    `row` is the row's id, empty where whoever raises it does not know it. The reasons given here
    are "row unreadable", "not UTF-8", "field missing", "wrong type", "question empty",
    "answer empty", "no image", "placeholder count", "image file missing", "image empty",
    "image truncated", "image unreadable", "image too large" and "image mode". A caller's check
    adds its own, such as "prompt too long".
    """

    def __init__(self, reason: str, detail: str = "", *, row: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.row = row

    def __str__(self) -> str:
        where = f"{self.row}: " if self.row else ""
        return where + self.reason + (f" ({self.detail})" if self.detail else "")


class Source(Protocol):
    """Anything items can be drawn from: `read(i)`, 0 <= i < len, gives the same item every time."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Item:
        """The item at `index`; BadRow where it cannot be used."""
        ...
