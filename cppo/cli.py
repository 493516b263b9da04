"""The command line: parse, build, run.

Only the chosen command's modules are imported, so that `cppo --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo.config import DoctorConfig, EvalConfig, PerturbConfig, StudyConfig, TrainConfig, check
from cppo.settings import nearest, parse

if TYPE_CHECKING:
    from cppo.device import Backend

USAGE_ERROR = 2
HELP = ("-h", "--help")
# What the extras bring, by the names that are imported; embedding needs none of it.
EXTRAS = {
    **dict.fromkeys(
        ("docstring_parser", "huggingface_hub", "jsonargparse", "math_verify"), "train"
    ),
    **dict.fromkeys(("peft", "pyarrow", "rich", "tokenizers", "transformers", "yaml"), "train"),
    **dict.fromkeys(("matplotlib", "scipy"), "train,study"),
}


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
    from cppo.console import set_up_logging
    from cppo.learner import Diverged
    from cppo.trainer import Trainer

    set_up_logging()

    trainer = Trainer(config, folder, resume=options["resume"] is not None)
    folder = trainer.folder.path
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
    from cppo.console import set_up_logging
    from cppo.evaluation.command import run

    set_up_logging()
    run(parsed[0])
    return 0


def study(arguments: Sequence[str]) -> int:
    """Compare methods on the built-in task over seeds, at equal data and steps."""
    extra = {
        "only": (list, None, "Variants to run; all of them if none is named."),
        "report-only": (bool, False, "Report on the runs that are there, and run none."),
        "report-to": (str, None, "Folder of that report; the study's own if none is given."),
    }
    parsed = _parse("study", StudyConfig, arguments, extra=extra)
    if parsed is None:
        return 0
    config, options = parsed
    check(config)
    from cppo.console import set_up_logging
    from cppo.study.command import run

    set_up_logging()
    return run(
        config,
        only=options["only"],
        report_only=options["report-only"],
        report_to=options["report-to"],
    )


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


def methods(arguments: Sequence[str]) -> int:
    """List the methods, or the options of one: cppo methods NAME."""
    if _wants_help("methods [NAME]", methods, arguments, most=1):
        return 0
    from cppo.console import Console
    from cppo.report.methods import show, show_all

    if arguments:
        show(arguments[0], Console())
    else:
        show_all(Console())
    return 0


def backends(arguments: Sequence[str]) -> int:
    """List the hardware backends that are installed, and which of them work here."""
    if _wants_help("backends", backends, arguments, most=0):
        return 0
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
    from cppo.console import set_up_logging
    from cppo.doctor.command import run

    set_up_logging()
    return 0 if run(parsed[0]).passed else 1


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "study": study,
    "perturb": perturb,
    "methods": methods,
    "backends": backends,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 2 where what was given makes no sense."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["help"]:
        given = [*given[1:2], "--help"]
    if not given or given[0] in HELP:
        print(_overview())
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(f"cppo {version('cppo')}")
        return 0
    if given[0] not in COMMANDS:
        return _complain(f"there is no command {given[0]!r}{nearest(given[0], list(COMMANDS))}")
    # PyTorch would import vendors' packages by itself, and not start where one of them fails;
    # each backend imports its own, and says what is wrong with it.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    from cppo.device import Unavailable

    try:
        return COMMANDS[given[0]](given[1:])
    except (ValueError, Unavailable) as error:
        return _complain(str(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(str(error.name).split(".")[0])
        if extra is None:
            raise
        return _complain(
            f"cppo {given[0]} needs {error.name}, which is not installed: install cppo with its "
            f"extras, as in pip install -e '.[{extra}]'"
        )


def _parse(
    command: str, config: type, arguments: Sequence[str], **how: Any
) -> tuple[Any, dict[str, Any]] | None:
    return parse(command, COMMANDS[command].__doc__, config, arguments, **how)


def _wants_help(
    usage: str, command: Callable[..., int], arguments: Sequence[str], *, most: int
) -> bool:
    """Of a command without settings: shows its help where that is asked for. ValueError for more
    arguments than it takes."""
    if any(argument in HELP for argument in arguments):
        print(f"usage: cppo {usage}\n\n{command.__doc__}")
        return True
    if len(arguments) > most:
        given = " ".join(arguments)
        raise ValueError(f"usage: cppo {usage}; what was given is {given!r}")
    return False


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


def _run_folder(config: TrainConfig, resumed: str | None) -> Path | None:
    """The folder that was asked for; None where none was."""
    if resumed is not None:
        return Path(resumed)
    if config.output is None:
        return None
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


if __name__ == "__main__":
    sys.exit(main())
