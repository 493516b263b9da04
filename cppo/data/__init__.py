"""Data: rows of any source in, items out; a row that cannot be used is skipped, named and counted.

`load` opens a source and gives a `Dataset`; a `Feed` draws shuffled items from it without end and
tells a `SkipLedger` of every row it had to leave out. A row is read when it is asked for: neither
its pictures nor its flaws are met before.
"""

from cppo.data.dataset import Dataset, load
from cppo.data.feed import Feed, usable
from cppo.data.item import PLACEHOLDER, BadRow, Item, Source
from cppo.data.picture import MAX_PIXELS, decode
from cppo.data.skips import SkipLedger, TooManySkipped
from cppo.data.sources import GEOMETRY3K, VIRL39K, Columns

__all__ = [
    "GEOMETRY3K",
    "MAX_PIXELS",
    "PLACEHOLDER",
    "VIRL39K",
    "BadRow",
    "Columns",
    "Dataset",
    "Feed",
    "Item",
    "SkipLedger",
    "Source",
    "TooManySkipped",
    "decode",
    "load",
    "usable",
]
