"""Settings from the command line, from files and from mappings: what is wrong is named."""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from cppo.config import BUILTIN

FREE = ("method_options", "base", "variants")  # mappings whose keys are no settings of their own
# What others, or another command, call it.
ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "max_steps": "steps",
    "output_dir": "output",
    "bf16": "precision",
    "batch_size": "rollout.prompts",
    "num_generations": "rollout.responses",
    "max_completion_length": "rollout.max_new_tokens",
    "beta": "method_options.reference_kl",
    "epsilon": "method_options.clip_low",
    "items": "count",
}


def parse(
    command: str,
    about: str | None,
    config: type,
    arguments: Sequence[str],
    *,
    extra: Mapping[str, tuple[Any, Any, str]] | None = None,
    positional: str | None = None,
) -> tuple[Any, dict[str, Any]] | None:
    """The command's config and its extra options; None where only help or settings were shown."""
    from jsonargparse import ArgumentParser

    extra = extra or {}
    parser = ArgumentParser(
        prog=f"cppo {command}", description=about, exit_on_error=False, print_config=None
    )
    if positional:
        parser.add_argument(positional, type=str, help="Path of the image.")
    else:
        parser.add_argument("--config", action="config", help="YAML file of settings.")
    for name, (kind, default, text) in extra.items():
        how: dict[str, Any] = {"type": kind, "default": default}
        if kind is bool:
            how = {"action": "store_true"}
        elif kind is list:
            how = {"type": str, "nargs": "+", "default": default}
        parser.add_argument(f"--{name}", dest=name, help=text, **how)
    parser.add_class_arguments(config, skip={positional} if positional else set())
    if any(argument in ("-h", "--help") for argument in arguments):
        parser.print_help()
        return None
    given = list(arguments)
    resumed = _values_of(given, "--resume")
    if resumed:
        given = ["--config", _config_of(Path(resumed[-1])), *given]
    others = {"config", *extra}
    known = [name for name in _names(parser) if name not in others]
    for argument in given:
        if argument.startswith("--"):
            _check_key(argument[2:].split("=")[0], [*known, *others], "option")
    given, method_options = _split_off(given, "--method_options.")
    for path in _values_of(given, "--config"):
        _check_settings(_read_settings(path), known, path)
    given = _files_first(given)
    values = _resolve(parser, known, lambda: parser.parse_args(given))
    options = {name: values.pop(name) for name in extra}
    values.pop("config", None)
    for number, (keys, value) in enumerate(method_options):
        if len(keys) > 1 and keys[:1] not in [
            earlier[:1] for earlier, _ in method_options[:number]
        ]:
            values["method_options"].pop(keys[0], None)  # what is named replaces what a file gave
        _put(values["method_options"], keys, value)
    return build(config, values.as_dict()), options


def read(kind: type, settings: Mapping[str, Any], where: str) -> Any:
    """A config from settings as a file holds them; errors begin with `where` these stand."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, print_config=None)
    parser.add_class_arguments(kind)
    known = _names(parser)
    _check_settings(settings, known, where)
    try:
        values = _resolve(parser, known, lambda: parser.parse_object(dict(settings)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return build(kind, values.as_dict())


def build(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from its values, its sections among them."""
    types = get_type_hints(kind)
    return kind(
        **{
            name: build(types[name], value) if is_dataclass(types[name]) else value
            for name, value in values.items()
        }
    )


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their full names, such as optimizer.learning_rate; free mappings stay whole."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value and key not in FREE:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(given: str, known: Sequence[str]) -> str:
    """The end of a sentence about a name that is not known."""
    section, _, leaf = given.rpartition(".")
    beside = [name for name in known if section and name.startswith(f"{section}.")]
    leaves = {name.rpartition(".")[2]: name for name in reversed(beside or known)}
    close = difflib.get_close_matches(given, [] if beside else known, n=1, cutoff=0.6)
    close_leaf = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    foreign = ELSEWHERE.get(leaf, "")
    if leaf in leaves:
        best = leaves[leaf]
    elif foreign in known or foreign.split(".")[0] in known:
        best = foreign
    elif close or close_leaf:
        best = close[0] if close else leaves[close_leaf[0]]
    elif elsewhere := [name for name in known if name.rpartition(".")[2] == leaf]:
        best = elsewhere[0]
    else:
        few = beside or (known if len(known) <= 20 else [])
        return f". Known: {', '.join(few)}" if few else "; --help lists what there is"
    return f"; did you mean {best!r}?"


def _names(parser: Any) -> list[str]:
    return [name for name, _ in flatten(parser.get_defaults().as_dict())]


def _resolve(parser: Any, known: Sequence[str], parsed: Callable[[], Any]) -> Any:
    """What is given, over the defaults: those of the built-in model where it is chosen."""
    from jsonargparse import ArgumentError

    try:
        values = parsed()
        if values.get("model") == "builtin":
            parser.set_defaults({name: value for name, value in BUILTIN.items() if name in known})
            values = parsed()
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return values


def _check_settings(settings: Mapping[str, Any], known: list[str], where: str) -> None:
    """Raises ValueError where they hold something that is not known, or no section where one
    belongs."""
    for key, value in flatten(settings):
        _check_key(key, known, f"{where}: the setting")
        if _is_section(key, known) and value != {}:
            raise ValueError(f"{where}: {key} is {value!r}; it must be a mapping of settings")


def _check_key(key: str, known: list[str], what: str) -> None:
    """Raises ValueError for a setting that is not known, naming the nearest."""
    free = key.split(".")[0] in FREE and key.split(".")[0] in known
    if key in known or _is_section(key, known) or free:
        return
    raise ValueError(f"{what} {key!r} is not known{nearest(key, known)}")


def _is_section(key: str, known: list[str]) -> bool:
    return any(name.startswith(f"{key}.") for name in known)


def _read_settings(path: str) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"settings {path!r} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"settings {path!r} must be a YAML mapping of settings to values")
    return loaded


def _config_of(run: Path) -> str:
    config = run / "config.yaml"
    if not config.exists():
        raise ValueError(
            f"{run} is no run folder, it holds no config.yaml: give --resume the folder that a run "
            "said it writes to, such as runs/20260101-120000-cppo-builtin"
        )
    return str(config)


def _files_first(arguments: Sequence[str]) -> list[str]:
    """What is given by itself wins over what files hold, wherever it stands."""
    files: list[str] = []
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            files += [argument, *itertools.islice(remaining, 1)]
        else:
            (files if argument.startswith("--config=") else rest).append(argument)
    return [*files, *rest]


def _values_of(arguments: Sequence[str], flag: str) -> list[str]:
    found = [a.partition("=")[2] for a in arguments if a.startswith(f"{flag}=")]
    return found + [b for a, b in itertools.pairwise(arguments) if a == flag]


def _split_off(
    arguments: Sequence[str], prefix: str
) -> tuple[list[str], list[tuple[list[str], Any]]]:
    """Takes `prefix`-ed options, nested to any depth, out of the arguments."""
    rest: list[str] = []
    taken: list[tuple[list[str], Any]] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument.startswith(prefix):
            name, equals, value = argument[len(prefix) :].partition("=")
            taken.append((name.split("."), _scalar(value if equals else next(remaining, ""))))
        else:
            rest.append(argument)
    return rest, taken


def _scalar(text: str) -> Any:
    """A YAML value; `1e-3` is a number too."""
    import yaml

    value = yaml.safe_load(text)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _put(settings: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        settings = settings.setdefault(key, {})
        if not isinstance(settings, dict):
            raise ValueError(f"method_options: {key} is {settings!r}, which has no {path[-1]!r}")
    settings[path[-1]] = value
