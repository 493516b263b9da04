"""The account of the rows that a run had to leave out, and the limit it sets to them."""

import json
from collections import Counter
from pathlib import Path

from cppo.data.item import BadRow


class TooManySkipped(ValueError):  # noqa: N818 - named for what it is about
    """More rows were skipped than the run allows; the message is the summary."""


class SkipLedger:
    """Writes one JSON line for each skipped row and stops the run where there are too many.

    A line is {"row", "reason", "detail", "count"}, flushed at once; `count` numbers the lines of
    its reason. A row counts once however often it is met, and is not written again where `path`
    has it with the same reason already, as after a resume. The share is that of the rows that this
    ledger was told of.
    """

    def __init__(
        self, path: str | Path | None, *, max_share: float, minimum_rows: int = 20
    ) -> None:
        """`path` None writes nothing; `max_share`, in [0, 1], holds from `minimum_rows` rows on."""
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share must lie between 0 and 1, not {max_share}")
        self.path = None if path is None else Path(path)
        self._max_share, self._minimum_rows = max_share, minimum_rows
        self._good: set[str] = set()
        self._bad: dict[str, tuple[str, str]] = {}  # row: reason, detail
        self._written: set[tuple[str, str]] = set()  # row, reason
        self._counts: Counter[str] = Counter()
        if self.path is not None and self.path.exists():
            self._take_up(self.path)

    @property
    def share(self) -> float:
        """Skipped rows as a share of all rows met, each counted once; 0 before the first."""
        met = len(self._good) + len(self._bad)
        return len(self._bad) / met if met else 0.0

    def read(self, row: str) -> None:
        """Count the row with this id as good, unless it was skipped before."""
        if row not in self._bad:
            self._good.add(row)

    def skipped(self, row: str, bad: BadRow) -> None:
        """Count and write the row with this id; TooManySkipped where the share is too large."""
        self._good.discard(row)
        self._bad[row] = (bad.reason, bad.detail)  # not `bad`: its traceback holds the picture
        if (row, bad.reason) not in self._written:
            self._write(row, bad)
        self.check(minimum_rows=self._minimum_rows)

    def check(self, *, minimum_rows: int = 1) -> None:
        """TooManySkipped where `minimum_rows` rows were met and too large a share was skipped."""
        if len(self._good) + len(self._bad) >= minimum_rows and self.share > self._max_share:
            where = f" Each is named in {self.path}." if self.path else ""
            raise TooManySkipped(
                f"{self.summary()}\nA share of {self._max_share:.1%} is allowed.{where} Repair the "
                "rows, or set the columns and limits that fit them, or raise "
                "dataset.max_skipped_share."
            )

    def summary(self) -> str:
        """How many rows were skipped and why, with one example of each reason."""
        met = len(self._good) + len(self._bad)
        lines = [f"{len(self._bad)} of {met} rows were skipped ({self.share:.1%})"]
        examples: dict[str, str] = {}
        for row, (reason, detail) in self._bad.items():
            examples.setdefault(reason, f"{row}: {detail}")
        counts = Counter(reason for reason, _ in self._bad.values())
        for reason, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
            lines.append(f"  {count} {reason}, such as {examples[reason]}")
        return "\n".join(lines)

    def _write(self, row: str, bad: BadRow) -> None:
        self._written.add((row, bad.reason))
        self._counts[bad.reason] += 1
        if self.path is None:
            return
        entry = {"row": row, "reason": bad.reason, "detail": bad.detail}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry | {"count": self._counts[bad.reason]}) + "\n")

    def _take_up(self, path: Path) -> None:
        """Go on after the lines of an earlier process; a last line it did not finish is ended."""
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                row, reason = str(entry["row"]), str(entry["reason"])
            except (ValueError, KeyError, TypeError):
                continue  # the row is written anew when it is met
            self._written.add((row, reason))
            self._counts[reason] += 1
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
