"""The command line: parse, build, run.

Only the chosen command's modules are imported, so that `cppo --help` answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from cppo.config import BUILTIN, DoctorConfig, EvalConfig, PerturbConfig, TrainConfig, check

if TYPE_CHECKING:
    from cppo.device import Backend

USAGE_ERROR = 2


def train(arguments: Sequence[str]) -> int:
    """Fine-tune a vision-language model by reinforcement learning."""
    extra = {
        "resume": (str | None, None, "Run folder to go on with, from its newest checkpoint."),
        "print-config": (bool, False, "Print all settings as YAML, in place of a run."),
    }
    parsed = _parse("train", TrainConfig, arguments, extra=extra)
    if parsed is None:
        return 0
    config, options = parsed
    check(config)
    if options["print-config"]:
        print(_resolved(config))
        return 0
    folder = _run_folder(config, options["resume"])
    _set_up_logging()
    from cppo.trainer import Diverged, Trainer

    trainer = Trainer(config, folder, resume=options["resume"] is not None)
    try:
        summary = trainer.train()
    except Diverged as error:
        return _complain(str(error), status=1)
    finally:
        trainer.close()
    say = trainer.console.say
    say(f"skipped rows: {summary['skipped_rows']}")
    if summary["reward_failures"]:
        say(f"reward calls that failed and scored 0: {summary['reward_failures']}")
    if summary["stopped_by"]:
        say(f"stopped after step {summary['steps']}; go on with: cppo train --resume {folder}")
        return 128 + int(summary["stopped_by"])
    say(f"the run, its metrics and the final model are in {folder}")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Measure a model: avg@k, pass@k and maj@k with confidence intervals."""
    parsed = _parse("eval", EvalConfig, arguments)
    if parsed is None:
        return 0
    check(parsed[0])
    _set_up_logging()
    from cppo.evaluation.command import run

    run(parsed[0])
    return 0


def perturb(arguments: Sequence[str]) -> int:
    """Draw an image under every perturbation of the suite, to look at."""
    parsed = _parse("perturb", PerturbConfig, arguments, positional="image")
    if parsed is None:
        return 0
    from PIL import Image

    from cppo.perturb import contact_sheet

    config: PerturbConfig = parsed[0]
    check(config)
    try:
        with Image.open(config.image) as image:
            sheet = contact_sheet(image, config.seed, draws=config.draws)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{config.image!r} is no image that can be read: {error}") from error
    output = Path(config.output or f"{Path(config.image).stem}-perturbed.png")
    try:
        sheet.save(output)
    except OSError as error:
        raise ValueError(f"{str(output)!r} cannot be written: {error}") from error
    print(f"{output}: {sheet.width} x {sheet.height} pixels")
    return 0


def backends(arguments: Sequence[str]) -> int:
    """List the hardware backends that are installed, and which of them work here."""
    if arguments:
        raise ValueError(f"cppo backends takes no arguments, {list(arguments)} were given")
    from cppo.console import Console
    from cppo.device import Unavailable, survey

    console, candidates = Console(), survey()
    rows = [
        (
            candidate.name,
            "usable" if candidate.backend else "not usable",
            _offers(candidate.backend) if candidate.backend else candidate.reason,
            candidate.origin,
        )
        for candidate in candidates
    ]
    console.table("Backends", ("backend", "here", "what it offers, or why not", "from"), rows)
    for candidate in candidates:
        if candidate.error is not None and not isinstance(candidate.error, Unavailable):
            trace = "".join(traceback.format_exception(candidate.error)).rstrip()
            console.say(f"\n{candidate.name}: {candidate.origin} is broken\n{trace}")
    return 0


def _offers(backend: Backend) -> str:
    precisions = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.precision)
    return (
        f"device {backend.device}; attention {', '.join(backend.attention)}; precision "
        f"{precisions}; collectives {backend.collectives}"
    )


def doctor(arguments: Sequence[str]) -> int:
    """Prove that a backend works here: numerics, memory, collectives, one training step."""
    parsed = _parse("doctor", DoctorConfig, arguments)
    if parsed is None:
        return 0
    check(parsed[0])
    _set_up_logging()
    from cppo.doctor.command import run

    return 0 if run(parsed[0]).passed else 1


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "perturb": perturb,
    "backends": backends,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 2 where what was given makes no sense."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(f"cppo {version('cppo')}")
        return 0
    if given[0] not in COMMANDS:
        return _complain(f"there is no command {given[0]!r}{_nearest(given[0], list(COMMANDS))}")
    # PyTorch would import vendors' packages by itself, and not start where one of them fails;
    # each backend imports its own, and says what is wrong with it.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    from cppo.device import Unavailable

    try:
        return COMMANDS[given[0]](given[1:])
    except (ValueError, Unavailable) as error:
        return _complain(str(error))


# --- parsing -----------------------------------------------------------------------------------


def _parse(
    command: str,
    config: type,
    arguments: Sequence[str],
    *,
    extra: Mapping[str, tuple[Any, Any, str]] | None = None,
    positional: str | None = None,
) -> tuple[Any, dict[str, Any]] | None:
    """The command's config and its extra options; None where only help or settings were shown."""
    from jsonargparse import ArgumentError, ArgumentParser

    extra = extra or {}
    parser = ArgumentParser(
        prog=f"cppo {command}",
        description=COMMANDS[command].__doc__,
        exit_on_error=False,
        print_config=None,
    )
    if positional:
        parser.add_argument(positional, type=str, help="Path of the image.")
    else:
        parser.add_argument("--config", action="config", help="YAML file of settings.")
    for name, (kind, default, text) in extra.items():
        how = {"action": "store_true"} if kind is bool else {"type": kind, "default": default}
        parser.add_argument(f"--{name}", dest=name, help=text, **how)
    parser.add_class_arguments(config, skip={positional} if positional else set())
    if any(argument in ("-h", "--help") for argument in arguments):
        parser.print_help()
        return None
    given = list(arguments)
    resumed = _values_of(given, "--resume")
    if resumed:
        given = ["--config", str(Path(resumed[-1]) / "config.yaml"), *given]
    others = {"config", *extra}
    known = [name for name, _ in _flatten(parser.get_defaults().as_dict()) if name not in others]
    for argument in given:
        if argument.startswith("--"):
            _check_key(argument[2:].split("=")[0], [*known, *others], "option")
    given, method_options = _split_off(given, "--method_options.")
    for path in _values_of(given, "--config"):
        for key, value in _flatten(_read_settings(path)):
            _check_key(key, known, f"{path}: the setting")
            if _is_section(key, known) and value != {}:
                raise ValueError(f"{path}: {key} is {value!r}; it must be a mapping of settings")
    try:
        values = parser.parse_args(given)
        if values.get("model") == "builtin":
            parser.set_defaults({name: value for name, value in BUILTIN.items() if name in known})
            values = parser.parse_args(given)
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    options = {name: values.pop(name) for name in extra}
    values.pop("config", None)
    for number, (keys, value) in enumerate(method_options):
        if len(keys) > 1 and keys[:1] not in [
            earlier[:1] for earlier, _ in method_options[:number]
        ]:
            values["method_options"].pop(keys[0], None)  # what is named replaces what a file gave
        _put(values["method_options"], keys, value)
    return _build(config, values.as_dict()), options


def _build(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from its values, its sections among them."""
    types = get_type_hints(kind)
    return kind(
        **{
            name: _build(types[name], value) if is_dataclass(types[name]) else value
            for name, value in values.items()
        }
    )


def _check_key(key: str, known: list[str], what: str) -> None:
    """Raises ValueError for a setting that is not known, naming the nearest."""
    if key in known or _is_section(key, known) or key.split(".")[0] == "method_options":
        return
    raise ValueError(f"{what} {key!r} is not known{_nearest(key, known)}")


def _is_section(key: str, known: list[str]) -> bool:
    return any(name.startswith(f"{key}.") for name in known)


def _nearest(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.4)
    same_end = [name for name in known if name.split(".")[-1] == given.split(".")[-1]]
    best = (same_end or close)[:1]
    return f"; did you mean {best[0]!r}?" if best else f". Known: {', '.join(known)}"


def _read_settings(path: str) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"settings {path!r} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"settings {path!r} must be a YAML mapping of settings to values")
    return loaded


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value and key != "method_options":
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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


# --- around a command --------------------------------------------------------------------------


def _overview() -> str:
    rows = "\n".join(f"  {name:<10}{run.__doc__}" for name, run in COMMANDS.items())
    return (
        "cppo: reinforcement learning that makes vision-language models look before they reason\n\n"
        f"usage: cppo COMMAND [options]\n\n{rows}\n\n"
        "cppo COMMAND --help lists a command's options; cppo --version tells the version."
    )


def _complain(message: str, status: int = USAGE_ERROR) -> int:
    print(f"cppo: {message}", file=sys.stderr)
    return status


def _run_folder(config: TrainConfig, resumed: str | None) -> Path:
    if resumed is not None:
        return Path(resumed)
    if config.output is None:
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.method}-{Path(config.model).name}"
        others = (f"{name}-{number}" for number in itertools.count(2))
        folders = (Path("runs") / each for each in itertools.chain([name], others))
        return next(folder for folder in folders if not folder.exists())
    folder = Path(config.output)
    if (folder / "config.yaml").exists():
        raise ValueError(
            f"{folder} already holds a run: go on with it (cppo train --resume {folder}), or give "
            "another --output"
        )
    return folder


def _resolved(config: TrainConfig) -> str:
    """All settings as YAML, the method's own defaults among them."""
    import dataclasses

    import yaml

    from cppo.methods import build

    settings = dataclasses.asdict(config)
    settings["method_options"] = dataclasses.asdict(build(config.method, config.method_options))
    return yaml.safe_dump(settings, sort_keys=False).rstrip()


def _set_up_logging() -> None:
    """Our own log lines as plain text; libraries speak up only where something is wrong."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("cppo").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
