"""Checkpoints: written whole or not at all, verified before they are trusted.

A checkpoint is a folder `step-000050` with whatever the caller saves into it and a manifest of the
files' sizes and hashes. It takes its name only once all of it is on disk, so a process killed while
writing leaves the one before it as the newest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
NAME = re.compile(r"step-\d+")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint. `state` is what the trainer needs besides the saved tensors."""

    folder: Path
    step: int
    state: Mapping[str, Any]


def write(
    root: Path, step: int, state: Mapping[str, Any], save: Callable[[Path], None], *, keep: int = 2
) -> Path:
    """Writes a checkpoint of `step` under `root`; `save` puts the tensors into a folder.

    The `keep` newest are kept. Returns the checkpoint's folder.
    """
    folder, scratch = root / f"step-{step:06d}", root / f"writing-{step:06d}"
    for abandoned in root.glob("writing-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    scratch.mkdir(parents=True)
    save(scratch)
    files = {str(path.relative_to(scratch)): _digest(path) for path in _files(scratch)}
    manifest = {"step": step, "state": dict(state), "files": files}
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*_files(scratch), scratch / MANIFEST):
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    # Later ones are damaged, or this run would have gone on from them: they replace none.
    for old in [path for path in _folders(root) if _step_of(path) <= step][:-keep]:
        shutil.rmtree(old)
    return folder


def newest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint under `root`; damaged ones are named in a warning and passed."""
    for folder in reversed(_folders(root)):
        damage = _damage(folder)
        if damage is None:
            manifest = json.loads((folder / MANIFEST).read_text())
            return Checkpoint(folder=folder, step=manifest["step"], state=manifest["state"])
        logger.warning("checkpoint %s is damaged (%s); trying the one before it", folder, damage)
    return None


def _folders(root: Path) -> list[Path]:
    """Ours, oldest first; a folder of any other name, such as a copy that someone made, is not."""
    return sorted((path for path in root.glob("step-*") if NAME.fullmatch(path.name)), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _damage(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, _, _ = (manifest[key] for key in ("files", "step", "state"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} has changed"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
