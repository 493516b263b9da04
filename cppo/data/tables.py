"""Files of rows, read one row at a time: parquet, JSON lines, and a JSON array."""

import json
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from cppo.data.item import BadRow

SUFFIXES = (".parquet", ".jsonl", ".json")  # most wanted first
_GROUPS_BYTES = 512 * 2**20


class Table(Protocol):
    """One file of rows. `name` is its path inside its source, `columns` those it shows to have."""

    path: Path
    name: str
    columns: tuple[str, ...]

    def __len__(self) -> int: ...

    def row(self, index: int) -> str:
        """The stable id of a row."""
        ...

    def cells(self, index: int, wanted: Sequence[str]) -> Mapping[str, object]:
        """The wanted cells of a row, those it has; BadRow where the row itself is unreadable."""
        ...


def open_table(path: Path, name: str, groups: "RecentGroups") -> Table:
    """The table in `path`, by its suffix (`SUFFIXES`); ValueError where the file is damaged."""
    if path.suffix.lower() == ".parquet":
        return ParquetTable(path, name, groups)
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    is_array = path.suffix.lower() == ".json" and start.startswith(b"[")
    return JsonArray(path, name) if is_array else JsonLines(path, name)


class RecentGroups:
    """The row groups read last, pictures still encoded, within a budget; at least the last one."""

    def __init__(self, budget_bytes: int = _GROUPS_BYTES) -> None:
        self._budget_bytes = budget_bytes
        self._groups: OrderedDict[object, Any] = OrderedDict()

    def get(self, key: object) -> Any | None:
        """The group kept under `key`, or None."""
        if key in self._groups:
            self._groups.move_to_end(key)
        return self._groups.get(key)

    def keep(self, key: object, group: Any) -> None:
        """Keep `group` (a pyarrow.Table) and let go of the oldest ones beyond the budget."""
        self._groups[key] = group
        while len(self._groups) > 1 and self.held_bytes > self._budget_bytes:
            self._groups.popitem(last=False)

    @property
    def held_bytes(self) -> int:
        """What the kept groups take."""
        return sum(int(group.nbytes) for group in self._groups.values())


class ParquetTable:
    """A parquet file, read by row group: a whole group is the least that can be decoded.

    Files with pictures should have about a hundred rows a group, as those from `datasets` have.
    """

    def __init__(self, path: Path, name: str, groups: RecentGroups) -> None:
        import pyarrow
        import pyarrow.parquet

        self.path, self.name, self._recent = path, name, groups
        try:
            self._metadata = pyarrow.parquet.read_metadata(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{path} is no whole parquet file: {error}. Write or fetch it again, or move it "
                "away."
            ) from error
        self.columns: tuple[str, ...] = tuple(self._metadata.schema.to_arrow_schema().names)
        group_rows = [
            self._metadata.row_group(g).num_rows for g in range(self._metadata.num_row_groups)
        ]
        self._starts: list[int] = list(accumulate(group_rows, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> str:
        return f"{self.name}:{index}"

    def cells(self, index: int, wanted: Sequence[str]) -> Mapping[str, object]:
        import pyarrow

        number = bisect_right(self._starts, index) - 1
        names = tuple(name for name in dict.fromkeys(wanted) if name in self.columns)
        try:
            group = self._group(number, names)
            return {
                name: group.column(name)[index - self._starts[number]].as_py() for name in names
            }
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8", f"a text cell: {error}") from error
        except (pyarrow.ArrowException, OSError) as error:
            raise BadRow("row unreadable", f"row group {number}: {error}") from error

    def _group(self, number: int, names: tuple[str, ...]) -> Any:
        import pyarrow.parquet

        key = (self.path, number, names)
        group = self._recent.get(key)
        if group is None:
            with pyarrow.parquet.ParquetFile(self.path, metadata=self._metadata) as file:
                group = file.read_row_group(number, columns=list(names))
            self._recent.keep(key, group)
        return group


class JsonLines:
    """A file with one JSON object a line, each parsed when it is asked for; blank lines are none.

    A line that is not UTF-8 or no object costs that line alone. A row's id is its line's number.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._offsets, self._lines = array("Q"), array("Q")
        offset = 0
        with path.open("rb") as file:
            for line, content in enumerate(file, start=1):
                if content.strip(b"\xef\xbb\xbf \t\r\n"):
                    self._offsets.append(offset)
                    self._lines.append(line)
                offset += len(content)
        self.columns = _columns_of(self)

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, index: int) -> str:
        return f"{self.name}:{self._lines[index]}"

    def cells(self, index: int, wanted: Sequence[str]) -> Mapping[str, object]:
        cells = self.parse(index)
        return {name: cells[name] for name in wanted if name in cells}

    def parse(self, index: int) -> dict[str, object]:
        """The whole object on a line; BadRow where there is none."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offsets[index])
                value = json.loads(file.readline().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8", f"byte {error.start} of the line: {error.reason}") from error
        except (ValueError, RecursionError) as error:
            raise BadRow("row unreadable", f"not JSON: {error}") from error
        except OSError as error:
            raise BadRow("row unreadable", f"{self.path}: {error.strerror}") from error
        return _object(value)


class JsonArray:
    """A JSON file that is one array of objects; parsed whole, so that a flaw loses the file."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        try:
            self._rows: list[object] = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is no JSON array in UTF-8: {error}. Repair it, or write JSON lines "
                "(.jsonl), where a bad line costs that line alone."
            ) from error
        self.columns = _columns_of(self)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> str:
        return f"{self.name}:{index}"

    def cells(self, index: int, wanted: Sequence[str]) -> Mapping[str, object]:
        cells = self.parse(index)
        return {name: cells[name] for name in wanted if name in cells}

    def parse(self, index: int) -> dict[str, object]:
        """The object at an index; BadRow where something else stands there."""
        return _object(self._rows[index])


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise BadRow("row unreadable", f"a JSON object is needed, not {type(value).__name__}")
    return value


def _columns_of(table: JsonLines | JsonArray, rows: int = 100) -> tuple[str, ...]:
    """The keys of the first rows that can be read, in order: JSON names its columns row by row."""
    names: dict[str, None] = {}
    for index in range(min(rows, len(table))):
        try:
            names |= dict.fromkeys(table.parse(index))
        except BadRow:
            continue  # told of when it is read as a row
    return tuple(names)
