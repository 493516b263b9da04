"""Pictures of a report that `ci/bench` wrote: `.venv/bin/python ci/benchmarks/plots.py`."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLOURS = {
    "cppo, three views": "#0072B2",
    "cppo's grpo, one view": "#56B4E9",
    "TRL's GRPO, one view": "#D55E00",
    "plain padded, three views": "#8C8C8C",
}
Entry = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("reports/bench.json"))
    parser.add_argument("--to", type=Path, default=Path("docs/performance"))
    given = parser.parse_args()
    rows = json.loads(given.json.read_text(encoding="utf-8"))["rows"]
    given.to.mkdir(parents=True, exist_ok=True)
    plt.rcParams |= {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "cppo",  # the same picture from the same figures
    }
    for name, draw in (("update", draw_updates), ("growth", draw_growth)):
        figure = draw(rows)
        figure.savefig(given.to / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        print(given.to / f"{name}.svg")


def draw_updates(rows: list[Entry]) -> Any:
    """Seconds of one update, all four ways, at each shape."""
    shapes = list(
        dict.fromkeys(r["what"] for r in rows if re.match(r"update, [\d, and]+\+[^:]*$", r["what"]))
    )
    figure, axes = plt.subplots(figsize=(8, 0.9 * len(shapes) + 0.8))
    for place, shape in enumerate(shapes):
        seconds = _seconds([row for row in rows if row["what"] == shape])
        for number, (name, colour) in enumerate(COLOURS.items()):
            height = place + 0.2 * (number - 1.5)
            axes.barh(height, seconds[name], 0.18, color=colour, label=name if not place else None)
            axes.text(seconds[name], height, f" {seconds[name]:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(shapes)), [shape.removeprefix("update, ") for shape in shapes])
    axes.invert_yaxis()
    axes.set_xlabel("seconds an update, less is better")
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def draw_growth(rows: list[Entry]) -> Any:
    """Seconds of an update over the size of a group, the prompt's and the responses' length."""
    panels = {
        "group of ": "responses in a group",
        "prompt of ": "tokens of the prompt",
        "responses of ": "tokens of a response",
    }
    figure, all_axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True)
    for axes, (start, label) in zip(all_axes, panels.items(), strict=True):
        shapes: dict[int, list[Entry]] = {}
        for row in rows:
            if (found := re.match(rf"{start}(\d+)( tokens)?$", row["what"])) is not None:
                shapes.setdefault(int(found[1]), []).append(row)
        sizes = sorted(shapes)
        for name, colour in COLOURS.items():
            values = [_seconds(shapes[size])[name] for size in sizes]
            axes.plot(sizes, values, "o-", color=colour, label=name, markersize=4)
        axes.set_xlabel(label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_yscale("log")
        axes.minorticks_off()
    all_axes[0].set_ylabel("seconds an update")
    figure.legend(
        *all_axes[0].get_legend_handles_labels(),
        loc="upper center",
        ncols=4,
        frameon=False,
        bbox_to_anchor=(0.5, 1.06),
    )
    return figure


def _seconds(rows: list[Entry]) -> dict[str, float]:
    """Medians by name, of one shape's rows."""
    found = {}
    for row in rows:
        found[row["subject"]] = statistics.median(row["subject_values"])
        found.setdefault(row["peer"], statistics.median(row["peer_values"]))
    return found


if __name__ == "__main__":
    main()
