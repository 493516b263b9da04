"""Where the rows are: the files behind a path or a Hub id, the splits they name, their columns."""

import difflib
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath

from cppo.data.tables import SUFFIXES, RecentGroups, Table, open_table

_log = logging.getLogger(__name__)

# owner/name, then perhaps @revision, then perhaps :folder
_HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^:]+))?(?::(?P<folder>.+))?"
)
_ALLOWED = (
    f"Give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, a folder that holds some, or the "
    'id of a dataset on the Hub ("owner/name", "owner/name@revision", "owner/name:folder").'
)

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

# Names that other data sets give the same column; for the advice in an error only.
_OTHER_NAMES = {
    "images": ("images", "image", "image_path", "img", "decoded_image"),
    "question": ("problem", "question", "query", "prompt"),
    "answer": ("answer", "solution", "ground_truth", "label"),
    "kind": ("category", "kind", "source", "subject", "type"),
}

# Written beside the rows by `datasets`; no rows themselves.
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column holds what; the defaults are geometry3k's. `kind` may be "": there is none."""

    images: str = "images"
    question: str = "problem"
    answer: str = "answer"
    kind: str = ""


GEOMETRY3K = Columns()
VIRL39K = Columns(images="image", question="question", answer="answer", kind="category")


def find(source: str) -> tuple[Path, list[Path]]:
    """The folder of a source and its data files, all of one kind, in order of their paths.

    A dataset on the Hub is fetched first. ValueError where there is nothing to read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path, _files_in(path)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{source} is no file that can be read. {_ALLOWED}")
        return path.parent, [path]
    hub = _HUB_ID.fullmatch(source)
    if not hub or path.suffix.lower() in SUFFIXES:
        raise ValueError(f"{source!r} does not exist{_nearest(path)}. {_ALLOWED}")
    folder = _fetch(hub["repo"], hub["revision"], hub["folder"] or "")
    return folder, _files_in(folder)


def split_of(name: str) -> str:
    """The split that a path inside a source names: "train", "validation", "test", or "" for none.

    As on the Hub, a word counts where it stands alone between separators or digits, and folders
    come before the file.
    """
    for part in PurePosixPath(name).parts:
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return ""


def by_split(folder: Path, paths: Sequence[Path]) -> dict[str, list[Table]]:
    """The tables of each split that is named; under "" alone where none is.

    Files of no split are for training where others are named for evaluation only, and left out,
    with a warning, where others are named for training.
    """
    groups = RecentGroups()
    parts: dict[str, list[Path]] = {}
    for path in paths:
        parts.setdefault(split_of(path.relative_to(folder).as_posix()), []).append(path)
    if len(parts) > 1 and "" in parts:
        unnamed = parts.pop("")
        if "train" in parts:
            files = ", ".join(map(str, unnamed))
            _log.warning("left out, since others are named for training: %s", files)
        else:
            parts["train"] = unnamed
    return {
        split: [open_table(path, path.relative_to(folder).as_posix(), groups) for path in part]
        for split, part in parts.items()
    }


def columns_in(table: Table, columns: Columns) -> Columns:
    """`columns` as `table` names them; ValueError where one is not there.

    In a table called metadata, as in the image folders of `datasets`, `file_name`, `file_names`
    and `<column>_file_name(s)` stand for the column of pictures.
    """
    if columns.images not in table.columns and table.path.stem == "metadata":
        own = (f"{columns.images}_file_names", f"{columns.images}_file_name")
        for name in (*own, "file_names", "file_name"):
            if name in table.columns:
                columns = replace(columns, images=name)
                break
    for field in fields(columns):
        name = getattr(columns, field.name)
        if name in table.columns or (field.name == "kind" and not name):
            continue
        others = [other for other in _OTHER_NAMES[field.name] if other in table.columns]
        close = others or difflib.get_close_matches(name, table.columns, n=1)
        advice = f"perhaps to {close[0]!r}" if close else "to one of these"
        raise ValueError(
            f"{table.path} has no column {name!r} for dataset.{field.name}. Its columns are "
            f"{', '.join(table.columns) or 'none that can be read'}: "
            f"set dataset.{field.name}, {advice}."
        )
    return columns


def _files_in(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    for suffix in SUFFIXES:
        paths = [p for p in found if p.suffix.lower() == suffix and p.name not in _NOT_ROWS]
        if paths:
            return sorted(paths)
    kinds = Counter(path.suffix.lower() or "without suffix" for path in found).most_common(5)
    raise ValueError(
        f"{folder} holds no {', '.join(SUFFIXES)} file; it holds "
        + (", ".join(f"{count} {kind}" for kind, count in kinds) or "nothing")
        + ". An image folder needs a metadata.jsonl beside its pictures, one line for each row: "
        '{"file_name": "1.png", "problem": "<image>...", "answer": "..."}. For a dataset on the '
        'Hub in another format, "owner/name@refs/convert/parquet" names its copy in parquet.'
    )


def _fetch(repo: str, revision: str | None, folder: str) -> Path:
    """The local copy of a dataset on the Hub, or of one folder in it.

    Not `datasets.load_dataset`: it takes ViRL39K's images.zip for parquet and fails, writes every
    row to disk a second time, and loses a whole file to one bad line.
    """
    from huggingface_hub import snapshot_download

    only = f"{folder.strip('/')}/*" if folder else None
    try:
        root = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=only)
    except (OSError, ValueError) as error:
        at = f" at {revision}" if revision else ""
        raise ValueError(
            f"there is no {repo} here, and no dataset of that name{at} could be fetched from the "
            f"Hub ({type(error).__name__}: {error}). Check the name, the connection, "
            "HF_HUB_OFFLINE and, for a dataset that is not public, the login (`hf auth login`). "
            f"{_ALLOWED}"
        ) from error
    path = Path(root, folder)
    if not path.is_dir():
        raise ValueError(f"the dataset {repo} has no folder {folder!r}: name one that it has.")
    return path


def _nearest(path: Path) -> str:
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    if parent != path.absolute().parent:
        return f" (there is {parent}, but not the folders below it)"
    close = difflib.get_close_matches(path.name, os.listdir(parent), n=1)
    return (
        f" (did you mean {close[0]!r} in {parent}?)"
        if close
        else f" ({parent} has nothing like it)"
    )
