"""Rows by index, each read when it is asked for, and which of them are for training."""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

from cppo.data.item import BadRow, Item
from cppo.data.picture import MAX_PIXELS, PictureFiles, decode, entries
from cppo.data.sources import GEOMETRY3K, Columns, by_split, columns_in, find, split_of
from cppo.data.tables import Table
from cppo.data.text import read_answer, read_kind, read_question

_log = logging.getLogger(__name__)


class Dataset:
    """Rows of one or several files, by index; each is read and decoded when it is asked for."""

    def __init__(
        self,
        tables: Sequence[Table],
        rows: Sequence[int],
        *,
        columns: Columns = GEOMETRY3K,
        folder: Path,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """`rows` counts through `tables`; pictures lie beside their table or below `folder`."""
        self._tables, self._rows = tables, rows
        self._starts = list(accumulate(map(len, tables), initial=0))
        self._pictures = [PictureFiles((table.path.parent, folder)) for table in tables]
        self._columns = [columns_in(table, columns) for table in tables]
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> str:
        """The stable id of the row at `index`."""
        table, position = self._locate(index)
        return self._tables[table].row(position)

    def read(self, index: int) -> Item:
        """The item at `index`; BadRow, with the row's id, where it cannot be used."""
        table, position = self._locate(index)
        try:
            return self._item(table, position)
        except BadRow as bad:
            bad.row = self._tables[table].row(position)
            raise

    def _locate(self, index: int) -> tuple[int, int]:
        row = self._rows[index]
        table = bisect_right(self._starts, row) - 1
        return table, row - self._starts[table]

    def _item(self, table: int, position: int) -> Item:
        columns, pictures = self._columns[table], self._pictures[table]
        needed = [columns.images, columns.question, columns.answer]
        wanted = [*needed, columns.kind] if columns.kind else needed
        cells = self._tables[table].cells(position, wanted)
        for name in needed:
            if name not in cells:
                raise BadRow("field missing", f"the row has no {name!r}")
        # Texts first: no picture is opened for a row that is of no use anyway.
        encoded = entries(cells[columns.images])
        question = read_question(cells[columns.question], len(encoded))
        answer = read_answer(cells[columns.answer])
        kind = read_kind(cells.get(columns.kind)) if columns.kind else ""
        if not encoded:
            raise BadRow("no image", "the row holds no image, and an item needs one")
        limit = self._max_pixels
        images = tuple(
            decode(pictures.encoded(entry, max_pixels=limit), max_pixels=limit) for entry in encoded
        )
        row = self._tables[table].row(position)
        return Item(row=row, images=images, question=question, answer=answer, kind=kind)


def load(
    source: str,
    *,
    split: Literal["train", "eval"],
    columns: Columns = GEOMETRY3K,
    eval_share: float = 0.1,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """The rows of `source` for training or for evaluation; the two never share a row.

    `source` is a parquet, JSON lines (.jsonl) or JSON (.json) file; a folder with such files (an
    image folder: pictures, and a metadata.jsonl whose `file_name` or `file_names` names them); or a
    dataset on the Hub ("owner/name", "owner/name@revision", "owner/name:folder"), which is fetched
    once into the user's Hugging Face cache. Pictures may be bytes in the rows, files, or members of
    a zip archive beside them; those of more than `max_pixels` pixels are not decoded.

    File and folder names tell the splits, as on the Hub (train; validation, val, dev; test, eval).
    Where the source brings training rows and others, evaluation takes its validation rows, or its
    test rows where there are none. Otherwise the share `eval_share` of the rows
    (one at least, and not all; all for 1, none for 0), are held out by a hash of `seed` and the
    row's id, so that the choice depends on nothing else.

    ValueError where there is no such source, it has no rows, lacks a column or cannot be split.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', not {split!r}")
    if not 0 <= eval_share <= 1:
        raise ValueError(f"eval_share must lie between 0 and 1, not {eval_share}")
    folder, paths = find(source)
    parts = by_split(folder, paths)
    for_eval = "validation" if "validation" in parts else "test"
    if "train" in parts and for_eval in parts:
        own = "train" if split == "train" else for_eval
        tables = parts[own]
        rows: Sequence[int] = range(sum(map(len, tables)))
        _log.info("%s: %d rows for %s, the source's own %s split", source, len(rows), split, own)
    else:
        tables = [table for part in parts.values() for table in part]
        rows = _share_out(source, tables, split, eval_share, seed)
    if not rows:
        raise ValueError(f"{source} holds no rows to use for {split}: give a source that has some.")
    return Dataset(tables, rows, columns=columns, folder=folder, max_pixels=max_pixels)


def _share_out(
    source: str,
    tables: Sequence[Table],
    split: str,
    eval_share: float,
    seed: int,
) -> list[int]:
    """The rows of `split`, in order, of a source that does not bring both splits."""
    names = [table.row(index) for table in tables for index in range(len(table))]
    total = len(names)
    if eval_share in (0, 1):
        held_out = total * int(eval_share)
    else:
        held_out = min(max(1, round(eval_share * total)), total - 1)
    if total and held_out == (total if split == "train" else 0):
        raise ValueError(
            f"{source} has {total} rows in all, and dataset.eval_share={eval_share} leaves none "
            f"for {split}: hold out at least one row and fewer than all, or give training and "
            "evaluation a source each."
        )
    ranked = sorted(range(total), key=lambda row: _draw(seed, names[row]))
    named = ", ".join(sorted({split_of(table.name) or "no" for table in tables}))
    _log.info(
        "%s: rows of %s split only; seed %d holds %d of %d out for evaluation",
        *(source, named, seed, held_out, total),
    )
    return sorted(ranked[:held_out] if split == "eval" else ranked[held_out:])


def _draw(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
