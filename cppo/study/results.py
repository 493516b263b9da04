"""What finished runs leave behind: one small file each, `OUTPUT/runs/VARIANT/seed-N.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cppo.config import TrainConfig
from cppo.methods import build
from cppo.study.plan import Run, Study

Record = Mapping[str, Any]
Key = tuple[str, int]  # variant, seed


def place(output: Path, run: Run) -> Path:
    return output / "runs" / run.variant / f"seed-{run.seed}.json"


def write(path: Path, record: Record) -> None:
    """All of it or nothing: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def finished(study: Study) -> dict[Key, Record]:
    """The records of the study's runs that are there.

    Raises ValueError where one was made with other settings than the study asks for.
    """
    found = {}
    for run in study.runs:
        path = place(study.output, run)
        if path.exists():
            found[run.variant, run.seed] = _checked(path, run)
    return found


def _checked(path: Path, run: Run) -> Record:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        there = dict(_leaves(record["settings"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of a run ({error}): remove it") from error
    wanted = dict(_leaves(run.settings()))
    # A setting that there was not yet, when the run was made, had what is its default now.
    there = {**dict(_leaves(_defaults(run))), **there}
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} is of a run with other settings: {name} was {there.get(name)!r}, and is "
                f"{wanted.get(name)!r} now. Give another --output, or remove the file"
            )
    return record


def _defaults(run: Run) -> dict[str, Any]:
    options = dataclasses.asdict(build(run.config.method))
    return {**dataclasses.asdict(TrainConfig()), "method_options": options}


def _leaves(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings by their full names, as JSON holds them."""
    for name, value in json.loads(json.dumps(settings)).items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value
