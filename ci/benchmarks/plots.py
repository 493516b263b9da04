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

PEER = "TRL's GRPO, one view"
COLOURS = {
    "plain padded, three views": "#8C8C8C",
    "cppo, three views": "#0072B2",
    "cppo's grpo, one view": "#56B4E9",
}
Entry = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("reports/bench.json"))
    parser.add_argument("--to", type=Path, default=Path("docs/performance"))
    given = parser.parse_args()
    rows = json.loads(given.json.read_text(encoding="utf-8"))["rows"]
    broken = {row["what"] for row in rows if not row["ratios"]}
    rows = [row for row in rows if row["what"] not in broken]
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
    """Time of an update over the peer's, at each shape."""
    shapes = list(dict.fromkeys(r["what"] for r in rows if r["what"].startswith("update, ")))
    shapes = [shape for shape in shapes if ":" not in shape]
    figure, axes = plt.subplots(figsize=(8, 0.75 * len(shapes) + 0.8))
    for place, shape in enumerate(shapes):
        times = _over_peer([row for row in rows if row["what"] == shape])
        for number, (name, colour) in enumerate(COLOURS.items()):
            height = place + 0.26 * (number - 1)
            axes.barh(height, times[name], 0.24, color=colour, label=name if not place else None)
            axes.text(times[name], height, f" {times[name]:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="#D55E00", linewidth=1.5, label=PEER)
    axes.set_yticks(range(len(shapes)), [shape.removeprefix("update, ") for shape in shapes])
    axes.invert_yaxis()
    axes.set_xlabel(f"time of an update over {PEER}")
    _legend(figure, axes)
    return figure


def draw_growth(rows: list[Entry]) -> Any:
    """The same by the size of a group, the length of its prompt and of its responses."""
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
            values = [_over_peer(shapes[size])[name] for size in sizes]
            axes.plot(sizes, values, "o-", color=colour, label=name, markersize=4)
        axes.axhline(1, color="#D55E00", linewidth=1.5, label=PEER)
        axes.set_xlabel(label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_yscale("log")
        ticks = (0.125, 0.25, 0.5, 1, 2, 4)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    all_axes[0].set_ylabel(f"time over {PEER}")
    _legend(figure, all_axes[0])
    return figure


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 0.92)
    )


def _over_peer(rows: list[Entry]) -> dict[str, float]:
    """Each of one shape, as often as the peer's time; `plain` is compared with ours alone."""
    ratios = {(r["subject"], r["peer"]): statistics.median(r["ratios"]) for r in rows}
    found = {name: ratios.get((name, PEER), 0.0) for name in COLOURS}
    ours, plain = "cppo, three views", "plain padded, three views"
    found[plain] = found[ours] / ratios[ours, plain]
    return found


if __name__ == "__main__":
    main()
