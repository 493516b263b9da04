"""One of the doctor's processes: goes through the sections and writes down what each finds.

Every line of the report is one JSON value: a section's title as it begins, and each finding as it
is made, so that a process which dies leaves what it had, and where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cppo.device import choose, first_line
from cppo.doctor import attention, collectives, memory, numerics, training
from cppo.doctor.environment import describe
from cppo.doctor.finding import Examination, Finding, Section
from cppo.processes import Processes

SECTIONS: Mapping[str, Section] = {
    "attention": attention.examine,
    "token statistics": numerics.examine_statistics,
    "objective": numerics.examine_objective,
    "random numbers": numerics.examine_random_numbers,
    "memory": memory.examine,
    "training step": training.examine,
    "throughput": training.examine_throughput,
    "collectives": collectives.examine,
    # Last: it leaves processes that some libraries end.
    "time-out": collectives.examine_timeout,
}
WAIT_SECONDS = 120.0  # for a process whose section failed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    parser.add_argument("--report", type=Path, required=True)
    given = parser.parse_args()
    with given.report.open("a", encoding="utf-8") as report:

        def write(**record: Any) -> None:
            report.write(json.dumps(record) + "\n")
            report.flush()

        write(section="joining processes")
        try:
            backend = choose(given.backend)
            processes = Processes(backend, torch.float32, timeout_seconds=WAIT_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever it is, the report must say it
            write(section="joining processes", **dataclasses.asdict(_broken("joining", error)))
            return
        examination = Examination(backend=backend, processes=processes)
        try:
            write(environment=describe(backend))
        except Exception as error:  # noqa: BLE001 - nor may a fact that cannot be had end it
            write(section="environment", **dataclasses.asdict(_broken("environment", error)))
        for title, section in SECTIONS.items():
            write(section=title, began=time.time())
            try:
                for finding in section(examination):
                    write(section=title, **dataclasses.asdict(finding))
            except Exception as error:  # noqa: BLE001 - a section may fail in any way; go on
                write(section=title, **dataclasses.asdict(_broken(title, error)))
        write(section="")
    os._exit(0)  # a group that was given up may never end in good order


def _broken(title: str, error: Exception) -> Finding:
    trace = "".join(traceback.format_exception(error))
    return Finding(
        name=f"{title}: {type(error).__name__}: {first_line(error)}", verdict="failed", detail=trace
    )


if __name__ == "__main__":
    main()
