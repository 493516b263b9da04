"""Measures `cppo` against its peers; a table, and JSON. Run by `ci/bench`."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measure import Row, not_run
from sections import SECTIONS, describe_apart, measure_apart

from cppo.console import Console


def main() -> None:
    parser = argparse.ArgumentParser(prog="ci/bench", description=__doc__)
    parser.add_argument("--backend", default="auto", help="as in `cppo train`")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="some sections alone")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, on all sides alike")
    parser.add_argument("--json", type=Path, default=Path("reports/bench.json"))
    given = parser.parse_args()
    about = describe_apart(given.backend, given.threads)
    wanted = given.only or [s for s in SECTIONS if s != "scale" or about["device"] != "cpu"]
    console, rows, broken = Console(), [], []
    report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **about, "rows": []}
    for section in wanted:
        console.say(f"measuring: {section}")
        try:
            new = measure_apart(section, about["backend"], given.repeats, given.threads)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other sections go on
            traceback.print_exc()
            new = [not_run(section, f"{type(error).__name__}: {error}")]
            broken.append(section)
        console.table(section, ("", "", "over", "ratio", "target"), [_cells(row) for row in new])
        rows += new
        # What was measured stays, whatever comes after.
        report["rows"] = [asdict(row) | {"ratios": row.ratios, "ratio": row.ratio} for row in rows]
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.say(f"report: {given.json}")
    if broken:
        sys.exit(f"not measured: {', '.join(broken)}; the errors are above and in the report")


def _cells(row: Row) -> tuple[str, ...]:
    if row.ratio is None:
        return row.what, row.subject, row.peer, f"not run: {row.not_run}", ""
    low, high = min(row.ratios), max(row.ratios)
    spread = "" if low == high else f" [{low:.3f}, {high:.3f}]"
    target = (
        ""
        if row.target is None
        else f"<= {row.target} {'met' if row.ratio <= row.target else 'MISSED'}"
    )
    return row.what, row.subject, row.peer, f"{row.ratio:.3f}{spread}", target


if __name__ == "__main__":
    main()
