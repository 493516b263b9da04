"""Laws of the command line: what is given takes effect, what is wrong is named, exit status 2."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from cppo import cli, config
from cppo.config import (
    BUILTIN,
    MINIMA,
    POSITIVE,
    SHARES,
    DoctorConfig,
    EvalConfig,
    MeasureConfig,
    PerturbConfig,
    StudyConfig,
    TrainConfig,
)
from cppo.methods import GRPO, METHODS, build
from cppo.report.methods import option_meanings
from cppo.settings import ELSEWHERE

COMMAND_CONFIGS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "study": StudyConfig,
    "perturb": PerturbConfig,
    "doctor": DoctorConfig,
}
CONFIGS = [
    kind
    for kind in vars(config).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
]
LEAST = [
    (name, int(MINIMA[name.removeprefix("rollout.")]))
    for name, _ in config._flat(TrainConfig())
    if name.removeprefix("rollout.") in MINIMA and name not in POSITIVE
]


def settings(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What `cppo train` would run with."""
    assert cli.main(["train", *arguments, "--print-config"]) == 0
    loaded = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(loaded, dict)
    return loaded


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message with which arguments that make no sense are refused."""
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cppo: ")
    assert "Traceback" not in captured.err
    return captured.err


def at(loaded: dict[str, Any], name: str) -> Any:
    value: Any = loaded
    for key in name.split("."):
        value = value[key]
    return value


def written(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def options(kind: type, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """Name, class and field of every option that a config makes."""
    for field in dataclasses.fields(kind):
        inner = {c.__name__: c for c in CONFIGS}.get(str(field.type))
        if inner is not None:
            yield from options(inner, f"{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind, field.name


def described(kind: type) -> dict[str, str]:
    """The Args entries of a class's docstring, whitespace made single."""
    entries: dict[str, str] = {}
    name = ""
    for line in (kind.__doc__ or "").partition("Args:\n")[2].splitlines():
        start = re.match(r" {8}(\w+): (.*)", line)
        if start:
            name = start[1]
            entries[name] = start[2]
        elif line.strip():
            entries[name] += " " + line.strip()
    return entries


# Help.


def test_help_answers_at_once_and_imports_no_torch() -> None:
    script = (
        "import sys; from cppo.cli import main; status = main(['--help']); "
        "print(sorted({'torch', 'transformers', 'numpy', 'yaml', 'jsonargparse'} "
        "& sys.modules.keys())); sys.exit(status)"
    )
    seconds = []
    for _ in range(3):  # the best of three: other processes may have been busy
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        seconds.append(time.monotonic() - started)
    assert done.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < 0.5


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_command(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for name, run in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(str(run.__doc__))}$", printed, re.MULTILINE)


@pytest.mark.parametrize("command", COMMAND_CONFIGS)
def test_a_commands_help_lists_its_options_with_what_they_mean(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main([command, "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, kind, field in options(COMMAND_CONFIGS[command]):
        option = name if (command, name) == ("perturb", "image") else f"--{name}"
        meaning = "Path of the image." if name == "image" else described(kind)[field]
        form = rf"{option}( \S+)?(, {option}\+ \S+)?"  # a list has a second one
        assert re.search(rf"{form} {re.escape(meaning)}", printed), name


def test_help_needs_no_torch_for_any_command() -> None:
    script = (
        "import sys; from cppo.cli import COMMANDS, main\n"
        "for command in ('train', 'eval', 'study', 'perturb'): main([command, '--help'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_setting_is_documented_and_nothing_else_is(kind: type) -> None:
    sections = {c.__name__ for c in CONFIGS}
    own = [field.name for field in dataclasses.fields(kind) if str(field.type) not in sections]
    assert list(described(kind)) == own
    assert all(text.endswith(".") for text in described(kind).values())


def test_the_methods_that_help_names_are_the_methods_there_are() -> None:
    named = re.search(r"\(([\w, ]+)\)", described(TrainConfig)["method"])
    assert named is not None
    assert named[1].split(", ") == list(METHODS)


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    done = subprocess.run(
        [str(Path(sys.executable).parent / "cppo"), "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"cppo {version('cppo')}\n"


# What is wrong is named.


@pytest.mark.parametrize(
    ("arguments", "given", "nearest"),
    [
        (["tarin"], "tarin", "train"),
        (["backend"], "backend", "backends"),
        (["train", "--seeed", "1"], "seeed", "seed"),
        (["train", "--rollout.promts=4"], "rollout.promts", "rollout.prompts"),
        (["train", "--learning_rate", "1e-4"], "learning_rate", "optimizer.learning_rate"),
        (["eval", "--counts", "4"], "counts", "count"),
        (["study", "--thread", "2"], "thread", "threads"),
        (["perturb", "a.png", "--draw", "4"], "draw", "draws"),
        (["train", "--method", "cpo", "--print-config"], "cpo", "cppo"),
        (["train", "--method_options.wieght", "1", "--print-config"], "wieght", "weight"),
        (["train", "--print_config"], "print_config", "print-config"),
        (["train", "--lr", "1e-4"], "lr", "optimizer.learning_rate"),
        (["train", "--optimizer.lr", "1e-4"], "optimizer.lr", "optimizer.learning_rate"),
        (["train", "--num_generations", "4"], "num_generations", "rollout.responses"),
        (["train", "--optimizer.temperature", "1"], "optimizer.temperature", "rollout.temperature"),
        (["train", "--beta", "0.1"], "beta", "method_options.reference_kl"),
        (["eval", "--items", "12"], "items", "count"),
        (["methods", "ccpo"], "ccpo", "cppo"),
    ],
)
def test_what_is_not_known_is_refused_with_the_nearest_that_is(
    capsys: pytest.CaptureFixture[str], arguments: list[str], given: str, nearest: str
) -> None:
    message = refusal(capsys, *arguments)
    assert repr(given) in message
    assert f"did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("option", "told"),
    [("optimizer.zzz", "Known: optimizer.learning_rate, "), ("zzz", "--help lists what there is")],
)
def test_where_nothing_is_near_what_there_is_is_told(
    capsys: pytest.CaptureFixture[str], option: str, told: str
) -> None:
    message = refusal(capsys, "train", f"--{option}", "1")
    assert told in message
    assert "did you mean" not in message


def test_every_name_from_elsewhere_stands_for_a_setting() -> None:
    known = {name for kind in (TrainConfig, EvalConfig) for name, _ in config._flat(kind())}
    own = {f"method_options.{field.name}" for field in dataclasses.fields(GRPO)}
    assert set(ELSEWHERE.values()) <= known | own


@pytest.mark.parametrize(
    ("text", "given", "nearest"),
    [
        ("sed: 1", "sed", "seed"),
        ("rollout: {prompts: 2, respones: 4}", "rollout.respones", "rollout.responses"),
        ("rolout: {prompts: 2}", "rolout.prompts", "rollout.prompts"),
        ("optimiser.learning_rate: 1", "optimiser.learning_rate", "optimizer.learning_rate"),
    ],
)
def test_an_unknown_setting_in_a_file_is_refused_with_the_file_and_the_nearest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, given: str, nearest: str
) -> None:
    path = written(tmp_path / "run.yaml", text)
    message = refusal(capsys, "train", "--config", path)
    assert path in message
    assert f"{given!r} is not known; did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--steps", "many"], '"steps"'),
        (["--steps", "1.5"], '"steps"'),
        (["--rollout", "5"], '"rollout"'),
        (["--method_options", "3"], '"method_options"'),
        (["--seed"], "--seed"),
        (["--config"], "--config"),
        (["--resume"], "--resume"),
        (["extra"], "extra"),
        (["--steps", "-1"], "steps is -1"),
        (["--rollout.responses", "1"], "rollout.responses is 1"),
        (["--optimizer.learning_rate", "0"], "optimizer.learning_rate is 0"),
        (["--optimizer.learning_rate", "nan"], "optimizer.learning_rate"),
        (["--optimizer.schedule", "cosin"], "optimizer.schedule is 'cosin'"),
        (["--rollout.prompts", "4", "--optimizer.mini_batch_prompts", "5"], "rollout.prompts (4)"),
        (["--method_options.fraction", "1.5"], "fraction is 1.5"),
        (["--method_options.a.b", "1", "--method_options.a.b.c", "1"], "b is 1"),
        (["--resume", "/no/such/run"], "/no/such/run is no run folder"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert part in refusal(capsys, "train", "--print-config", *arguments)


@pytest.mark.parametrize(
    "content",
    ["", "- 1\n- 2\n", "text", b"seed: \xff\xfe\n", "a: [1,", "\x00"],
    ids=["empty", "a list", "a text", "not UTF-8", "not YAML", "binary"],
)
def test_settings_that_cannot_be_read_are_refused_with_their_path(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | bytes
) -> None:
    path = written(tmp_path / "run.yaml", content)
    assert path in refusal(capsys, "train", "--config", path)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_settings_that_are_no_file_are_refused_with_their_path(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    path = str(tmp_path / name)
    assert path in refusal(capsys, "train", f"--config={path}")


@pytest.mark.parametrize("text", ["rollout: 5", "rollout:", "rollout: [1]"])
def test_a_section_that_is_no_mapping_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    path = written(tmp_path / "run.yaml", text)
    message = refusal(capsys, "train", "--config", path)
    assert f"{path}: rollout is" in message


@pytest.mark.parametrize("text", ["config: other.yaml", "resume: runs/1", "print-config: true"])
def test_what_only_a_command_line_can_say_is_no_setting_of_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    path = written(tmp_path / "run.yaml", text)
    assert "is not known" in refusal(capsys, "train", "--config", path)


# What is given takes effect.


def test_an_option_overrides_the_file_and_the_file_overrides_the_default(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = written(tmp_path / "run.yaml", "steps: 7\nrollout: {prompts: 3, responses: 5}\n")
    found = settings(capsys, "--config", path, "--rollout.prompts", "9")
    assert (found["steps"], found["rollout"]["prompts"], found["rollout"]["responses"]) == (7, 9, 5)
    assert found["rollout"]["temperature"] == TrainConfig().rollout.temperature


def test_an_option_goes_before_a_file_that_is_named_after_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = written(tmp_path / "a.yaml", "steps: 7\nseed: 8\n")
    for file in (["--config", path], [f"--config={path}"]):
        loaded = settings(capsys, "--steps", "5", *file)
        assert (loaded["steps"], loaded["seed"]) == (5, 8)


def test_a_folder_that_is_no_run_is_not_resumed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = refusal(capsys, "train", "--resume", str(tmp_path))
    assert f"{tmp_path} is no run folder" in message


def test_methods_are_listed_and_each_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    listed = capsys.readouterr().out
    for name in METHODS:
        assert f" {name} " in listed
        assert cli.main(["methods", name]) == 0
        told = "".join(capsys.readouterr().out.split())
        method = build(name)
        meanings = option_meanings(type(method))
        for option, value in dataclasses.asdict(method).items():
            assert option in told
            assert meanings[option]
            assert isinstance(value, Mapping) or json.dumps(value).replace(" ", "") in told


@pytest.mark.parametrize("arguments", [["help", "backends"], ["backends", "-h"], ["methods", "-h"]])
def test_commands_without_settings_have_help_too(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: cppo ")


def test_help_alone_is_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help"]) == 0
    assert capsys.readouterr().out == cli._overview() + "\n"


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("train", "jsonargparse", "train"),
        ("backends", "rich", "train"),
        ("methods", "docstring_parser", "train"),
    ],
)
def test_what_an_extra_brings_is_named_where_it_is_missing(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    module: str,
    extra: str,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("cppo.console", "cppo.report.methods"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    message = refusal(capsys, command)
    assert f"cppo {command} needs {module}" in message
    assert f"pip install -e '.[{extra}]'" in message


def test_the_extras_are_those_of_the_distribution() -> None:
    table = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    imported = {"pyyaml": "yaml"}
    named = {
        imported.get(name, name.replace("-", "_"))
        for extra in ("train", "study")
        for name in (re.split(r"[\[<>=]", wanted)[0] for wanted in table[extra])
    }
    assert named - set(cli.EXTRAS) == {"tensorboard"}  # torch imports it, and says what to do
    assert set(cli.EXTRAS) <= named


def test_the_module_is_the_command() -> None:
    ran = [sys.executable, "-m", "cppo", "--version"]
    assert subprocess.run(ran, capture_output=True, text=True).stdout.startswith("cppo ")


@pytest.mark.parametrize("form", [["--optimizer.learning_rate", "{}"], ["file"]])
@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("2E-06", 2e-6)])
def test_a_learning_rate_may_be_written_with_an_exponent(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, form: list[str], text: str, value: float
) -> None:
    if form == ["file"]:
        path = written(tmp_path / "run.yaml", f"optimizer:\n  learning_rate: {text}\n")
        arguments = ["--config", path]
    else:
        arguments = [part.format(text) for part in form]
    assert settings(capsys, *arguments)["optimizer"]["learning_rate"] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("0.5", 0.5), ("2", 2)],
)
def test_a_method_option_is_read_as_the_number_it_says(
    capsys: pytest.CaptureFixture[str], text: str, value: float
) -> None:
    for arguments in (["--method_options.weight", text], [f"--method_options.weight={text}"]):
        found = settings(capsys, *arguments)["method_options"]
        assert found["weight"] == value
        assert found["fraction"] == 0.5


def test_method_options_nest_to_the_parameters_of_a_perturbation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = settings(
        capsys,
        "--method_options.preserving.rotation.degrees",
        "5",
        "--method_options.preserving.rotation.fill=black",
        "--method_options.removing.zoom_crop.side_share",
        "[0.5, 0.6]",
    )["method_options"]
    assert found["preserving"] == {"rotation": {"degrees": 5, "fill": "black"}}
    assert found["removing"] == {"zoom_crop": {"side_share": [0.5, 0.6]}}


def test_method_options_of_the_command_line_join_those_of_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = written(tmp_path / "run.yaml", "method_options: {weight: 0.5, fraction: 0.25}\n")
    found = settings(capsys, "--config", path, "--method_options.weight", "0.75")["method_options"]
    assert (found["weight"], found["fraction"]) == (0.75, 0.25)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--method", "cppo_areal", "--model", "some/model", "--rollout.top_p", "0.9"],
        ["--method", "gspo", "--output", "runs/x", "--dataset.instruction", "Think: é\nthen"],
        ["--policy.max_pixels", "1000", "--method_options.preserving.rotation.degrees", "5"],
    ],
)
def test_printed_settings_make_the_same_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    printed = settings(capsys, *arguments)
    path = written(tmp_path / "run.yaml", yaml.safe_dump(printed))
    assert settings(capsys, "--config", path) == printed


def test_printed_settings_hold_every_setting_and_the_methods_own_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = settings(capsys, "--model", "some/model", "--method", "cppo_areal")
    expected = dataclasses.asdict(TrainConfig(model="some/model", method="cppo_areal"))
    expected["method_options"] = dataclasses.asdict(METHODS["cppo_areal"]())
    assert found == expected


def test_the_builtin_model_brings_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    found = settings(capsys)
    assert {name: at(found, name) for name in BUILTIN} == BUILTIN


def test_no_other_model_gets_the_builtin_defaults(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = written(tmp_path / "run.yaml", "model: some/model\n")
    plain = dataclasses.asdict(TrainConfig())
    for arguments in (["--model", "some/model"], ["--config", path]):
        found = settings(capsys, *arguments)
        assert {name: at(found, name) for name in BUILTIN} == {
            name: at(plain, name) for name in BUILTIN
        }


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("by", ["option", "file"])
def test_ones_own_values_go_before_the_builtin_defaults(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, by: str
) -> None:
    value = 3
    if by == "option":
        arguments = [f"--{name}", str(value)]
    else:
        *section, leaf = name.split(".")
        nested = {section[0]: {leaf: value}} if section else {leaf: value}
        arguments = ["--config", written(tmp_path / "run.yaml", yaml.safe_dump(nested))]
    found = settings(capsys, *arguments)
    assert at(found, name) == value
    assert {n: at(found, n) for n in BUILTIN if n != name} == {
        n: v for n, v in BUILTIN.items() if n != name
    }


def test_a_value_equal_to_the_plain_default_goes_before_the_builtin_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert settings(capsys, "--steps", "500")["steps"] == 500


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_instruction_is_left_to_the_model_unless_one_is_given(command: str) -> None:
    def instruction(*arguments: str) -> str | None:
        parsed = cli._parse(command, COMMAND_CONFIGS[command], arguments)
        assert parsed is not None
        found: str | None = parsed[0].dataset.instruction
        return found

    assert instruction() is None
    assert instruction("--model", "some/model") is None
    assert instruction("--dataset.instruction", "Look.") == "Look."
    assert instruction("--dataset.instruction", "") == ""


# Values that make no sense.


@pytest.mark.parametrize(
    ("command", "option", "value", "allowed"),
    [
        *(("train", name, str(minimum - 1), f"at least {minimum}") for name, minimum in LEAST),
        *(("train", name, "0", "above 0") for name in sorted(POSITIVE)),
        *(("train", name, value, "between 0 and 1") for name in sorted(SHARES) for value in "01"),
        ("train", "rollout.top_p", "0", "above 0, at most 1"),
        ("train", "rollout.top_p", "1.1", "above 0, at most 1"),
        ("train", "optimizer.schedule", "step", "one of constant, linear, cosine"),
        ("train", "optimizer.mini_batch_prompts", "65", "at most rollout.prompts (64)"),
        ("eval", "k", "0", "at least 1"),
        ("eval", "count", "0", "at least 1"),
        ("eval", "temperature", "-1", "at least 0"),
        ("eval", "top_p", "2", "above 0, at most 1"),
        ("eval", "max_new_tokens", "0", "at least 1"),
        ("eval", "batch_responses", "0", "at least 1"),
        ("eval", "split", "test", "one of eval, train"),
        ("study", "jobs", "0", "at least 1"),
        ("study", "threads", "0", "at least 1"),
        ("study", "timeout_minutes", "0", "above 0"),
        *(
            ("study", f"measure.{field.name}", "0", "at least 1")
            for field in dataclasses.fields(MeasureConfig)
        ),
        ("perturb", "draws", "0", "at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_is_allowed(
    capsys: pytest.CaptureFixture[str], command: str, option: str, value: str, allowed: str
) -> None:
    image = ["picture.png"] if command == "perturb" else []
    message = refusal(capsys, command, *image, f"--{option}={value}")
    assert re.search(rf"\b{re.escape(option)} is '?{re.escape(value)}", message)
    assert allowed in message


# Run folders.


def test_an_output_that_holds_a_run_is_refused_with_the_way_to_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written(tmp_path / "config.yaml", "steps: 3\n")
    message = refusal(capsys, "train", "--output", str(tmp_path))
    assert f"cppo train --resume {tmp_path}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_resumed_run_takes_its_settings_from_its_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = settings(capsys, "--steps", "9", "--method", "cppo_areal")
    written(tmp_path / "config.yaml", yaml.safe_dump(first))
    assert settings(capsys, "--resume", str(tmp_path)) == first
    more = settings(capsys, "--resume", str(tmp_path), "--steps", "12")
    assert more == first | {"steps": 12}


def test_printing_settings_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings(capsys, "--output", "here")
    assert list(tmp_path.iterdir()) == []


# perturb and backends.


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (30, 20))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 15, 20))
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    "image",
    [palette_with_transparency(), Image.new("RGB", (1, 1), "red")],
    ids=["palette with transparency", "one pixel"],
)
def test_perturb_draws_a_sheet_of_any_image(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image: Image.Image,
) -> None:
    monkeypatch.chdir(tmp_path)
    image.save(tmp_path / "mine.png")
    assert cli.main(["perturb", "mine.png", "--draws", "2"]) == 0
    with Image.open(tmp_path / "mine-perturbed.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 2 * 2 * 224
        size = sheet.size
    assert capsys.readouterr().out == f"mine-perturbed.png: {size[0]} x {size[1]} pixels\n"


def test_transparent_parts_are_white_on_the_sheet(tmp_path: Path) -> None:
    palette_with_transparency().save(tmp_path / "mine.png")
    output = tmp_path / "sheet.png"
    assert cli.main(["perturb", str(tmp_path / "mine.png"), "--output", str(output)]) == 0
    with Image.open(output) as sheet:
        # The original, 224 pixels wide, lies 24 from the left; below its 46 pixels of text.
        assert sheet.convert("RGB").getpixel((24 + 40, 24 + 46 + 70)) == (255, 255, 255)
        assert sheet.convert("RGB").getpixel((24 + 180, 24 + 46 + 70)) == (255, 0, 0)


def test_the_same_seed_draws_the_same_sheet_and_another_another(tmp_path: Path) -> None:
    Image.radial_gradient("L").resize((40, 40)).save(tmp_path / "mine.png")
    sheets = []
    for number, seed in enumerate((1, 1, 2)):
        output = tmp_path / f"{number}.png"
        arguments = [str(tmp_path / "mine.png"), "--output", str(output), "--seed", str(seed)]
        assert cli.main(["perturb", *arguments, "--draws", "1"]) == 0
        sheets.append(output.read_bytes())
    assert sheets[0] == sheets[1]
    assert sheets[0] != sheets[2]


def test_perturb_refuses_what_is_no_image_and_names_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = written(tmp_path / "notes.txt", "no picture")
    for path in (text, str(tmp_path / "absent.png"), str(tmp_path)):
        assert repr(path) in refusal(capsys, "perturb", path)
    assert "image" in refusal(capsys, "perturb")


@pytest.mark.parametrize("arguments", [["--draws", "0"], ["--output", "no/such/folder/sheet.png"]])
def test_perturb_refuses_settings_that_make_no_sheet(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("mine.png")
    assert arguments[1] in refusal(capsys, "perturb", "mine.png", *arguments)


def test_backends_lists_every_backend_that_comes_with_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["backends"]) == 0
    printed = capsys.readouterr().out
    for name in ("cpu", "cuda", "npu", "rocm", "xpu"):
        assert re.search(rf"^│ {name} ", printed, re.MULTILINE), name
    assert re.search(r"^│ cpu +│ usable ", printed, re.MULTILINE)
    assert "usage: cppo backends; what was given is 'cpu'" in refusal(capsys, "backends", "cpu")


def test_an_unknown_backend_is_refused_before_anything_is_loaded_or_written(
    tmp_path: Path,
) -> None:
    done = run(["train", "--backend", "tpu"], tmp_path)
    assert done.returncode == 2
    assert "'tpu' is not known" in done.stderr
    assert list(tmp_path.iterdir()) == []


def run(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "cppo"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


# What is said.


@pytest.mark.parametrize("text", ["kind [/INST] here", "a [bold] word", ":smile:", "x" * 300])
def test_what_is_said_reaches_the_screen_as_it_is(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    from cppo.console import Console

    Console().say(text)
    assert capsys.readouterr().out == text + "\n"


def test_a_table_shows_names_in_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from cppo.console import Console

    Console().table("Kinds", ("kind",), [("[algebra]",), ("[/x]",)])
    printed = capsys.readouterr().out
    assert "[algebra]" in printed
    assert "[/x]" in printed


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from cppo.console import Console

    console = Console(active=False)
    console.say("hello")
    with console.progress("training", 2) as show:
        show(1, "half")
    assert capsys.readouterr().out == ""
