"""Laws of `cppo study`: what is run, what is measured, what seeds tell, and how it goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_once import pictures_of, tokens_of

from cppo import cli
from cppo.builtin import ShapesTask, entry
from cppo.builtin.task import COLOURS, SHAPES
from cppo.config import StudyConfig, check
from cppo.console import StopRequest
from cppo.evaluation.run import Outcome, Questions, evaluate
from cppo.methods import METHODS
from cppo.policy import Prompt
from cppo.rollout import Sampling
from cppo.study import command, measure, plots
from cppo.study.jobs import Jobs
from cppo.study.measure import chance
from cppo.study.meter import Meter
from cppo.study.plan import START, Run, Study, plan
from cppo.study.results import finished, place, write
from cppo.study.statistics import Mean, holm, mean_of, paired
from cppo.study.summary import Summary, summarise
from cppo.study.tables import page, tables
from cppo.study.worker import request, work
from cppo.trainer import Trainer

TESTS = Path(__file__).parent
STUDIES = sorted((TESTS.parent / "configs").glob("study-*.yaml"))
SETTINGS: dict[str, Any] = {
    "base": {
        "reward": "test_once:reward_parity",
        "steps": 2,
        "policy": {"max_prompt_tokens": 600},
        "rollout": {"prompts": 2, "responses": 4, "max_new_tokens": 8},
        "optimizer": {"learning_rate": 1e-3},
    },
    "variants": {"grpo": {"method": "grpo"}, "cppo": {"method_options": {"weight": 0.1}}},
    "seeds": [0, 1],
    "measure": {"every": 1, "curve_items": 3, "puzzles": 3, "items": 4, "k": 2},
}


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with some of them, named with dots, replaced."""
    made: dict[str, Any] = json.loads(json.dumps(settings))
    for name, value in changes.items():
        *sections, last = name.split("/")
        inner = made
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return made


def config(settings: Mapping[str, Any], **changes: Any) -> StudyConfig:
    measured = dataclasses.replace(StudyConfig().measure, **settings.get("measure", {}))
    plain = StudyConfig(**{**settings, "measure": measured})
    return dataclasses.replace(plain, **changes)


# --- what seeds tell ------------------------------------------------------------------------------


def test_an_interval_is_students_over_seeds() -> None:
    # s = sqrt(2.5), t(0.975, 4) = 2.776445: 2.776445 * sqrt(2.5 / 5).
    mean = mean_of([1, 2, 3, 4, 5])
    assert (mean.value, mean.count) == (3.0, 5)
    assert mean.half_width == pytest.approx(1.963243, abs=1e-6)
    # With two seeds t(0.975, 1) = 12.706205, and s / sqrt(2) is half their distance.
    assert mean_of([0.25, 0.75]).half_width == pytest.approx(12.706205 / 4, abs=1e-6)
    assert mean_of([0.5, 0.5, 0.5]).half_width == 0.0


def test_a_single_seed_has_no_interval_and_no_p() -> None:
    assert mean_of([0.5]) == Mean(value=0.5, half_width=None, count=1)
    alone = paired({3: 0.5}, {3: 0.25, 4: 9.0})
    assert alone is not None
    assert (alone.value, alone.half_width, alone.p, alone.count) == (0.25, None, None, 1)


def test_differences_are_paired_by_seed() -> None:
    # 1, 2 and 4: mean 7/3, t = sqrt(7); with two degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    found = paired({0: 1.0, 1: 3.0, 2: 5.0, 7: 0.0}, {2: 1.0, 1: 1.0, 0: 0.0, 3: 9.0})
    assert found is not None
    assert found.count == 3
    assert found.value == pytest.approx(7 / 3)
    assert found.p == pytest.approx(1 - math.sqrt(7) / 3, abs=1e-9)
    assert found.half_width == pytest.approx(4.302653 * math.sqrt(7 / 9), abs=1e-6)
    # 1 and 3: t = 2; with one degree of freedom p = 1 - 2 atan(t) / pi. The sign does not matter.
    for sign in (1, -1):
        two = paired({0: sign * 1.0, 1: sign * 3.0}, {0: 0.0, 1: 0.0})
        assert two is not None
        assert two.p == pytest.approx(1 - 2 * math.atan(2) / math.pi, abs=1e-9)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_differences_that_are_all_alike_are_certain() -> None:
    same = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    raised = paired({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0})
    assert same is not None
    assert raised is not None
    assert (same.p, raised.p) == (1.0, 0.0)


def test_holms_adjustment_is_worked_by_hand() -> None:
    # In order .005 x 4, .01 x 3, .03 x 2, .04 x 1; the last not below the one before.
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


# --- the chance of guessing -----------------------------------------------------------------------


@pytest.mark.parametrize("cells", [1, 2, 3])
def test_chance_is_what_the_best_of_all_guesses_reaches(cells: int) -> None:
    def best(words: tuple[str, ...]) -> float:
        drawn = list(itertools.combinations(words, 3))
        return max(
            sum((set(guess) <= set(three)) / 3**cells for three in drawn) / len(drawn)
            for guess in itertools.product(words, repeat=cells)
        )

    answer = " ".join(["second red circle"] * cells)
    assert chance(answer) == pytest.approx(best(tuple(COLOURS)) * best(SHAPES))


def test_chance_is_how_often_a_blind_guess_is_right() -> None:
    task = ShapesTask(split="eval", size=6000, difficulty=1)
    # Every fourth puzzle asks for one cell.
    said = [task.puzzle(index, draw=False).item for index in range(0, len(task), 4)]
    assert {item.kind for item in said} == {"next_to"}
    asked = [item.answer.split()[1:] for item in said]
    right = sum(words == ["red", "circle"] for words in asked) / len(asked)
    expected = chance("second red circle")
    assert expected == pytest.approx(1 / 24)
    assert right == pytest.approx(expected, abs=3 * math.sqrt(expected / len(asked)))


# --- what is run ----------------------------------------------------------------------------------


def test_every_variant_runs_its_first_seed_before_any_runs_its_second() -> None:
    made = plan(config(SETTINGS, seeds=[4, 2]))
    names = [run.name for run in made.runs]
    assert names == [
        *("start, seed 4", "grpo, seed 4", "cppo, seed 4"),
        *("grpo, seed 2", "cppo, seed 2"),
    ]
    assert [run.config.seed for run in made.runs[1:]] == [4, 4, 2, 2]
    assert [run.config.steps for run in made.runs] == [0, 2, 2, 2, 2]


def test_a_variant_changes_the_base_setting_by_setting() -> None:
    base = {
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 3},
        "optimizer.epochs": 2,
        "method_options": {"fraction": 0.25, "removing": {"blackout": {}}},
    }
    variant = {
        "optimizer": {"warmup_steps": 1},
        "method_options": {"weight": 0.5, "removing": {"zoom_crop": {}}},
    }
    [_, run] = plan(config({}, base=base, variants={"one": variant}, seeds=[0])).runs
    found = run.config.optimizer
    assert (found.learning_rate, found.warmup_steps, found.epochs) == (1e-3, 1, 2)
    assert run.config.method_options == {
        "fraction": 0.25,
        "weight": 0.5,
        "removing": {"zoom_crop": {}},
    }


def test_a_run_is_measured_as_the_study_says_and_writes_nothing_else() -> None:
    [start, run, *_] = plan(config(SETTINGS)).runs
    found = run.config.evaluation
    assert (found.items, found.items_during, found.every, found.k) == (3, 3, 1, 2)
    assert (run.config.checkpoint_every, run.config.samples_every) == (0, 0)
    assert start.variant == START


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_of_the_repository_can_be_run(path: Path) -> None:
    parsed = cli._parse("study", StudyConfig, ["--config", str(path)])
    assert parsed is not None
    found: StudyConfig = parsed[0]
    check(found)
    made = plan(found)
    assert len(made.runs) == 1 + len(found.variants) * len(found.seeds)
    assert len({json.dumps(run.settings()) for run in made.runs}) == len(made.runs)
    assert found.output == f"runs/{path.stem}"
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert made.runs[1].settings()["model"] == entry(found.base["dataset"]["difficulty"]).name


def test_the_studies_of_the_repository_compare_what_they_are_to_compare() -> None:
    loaded = {path.stem: yaml.safe_load(path.read_text()) for path in STUDIES}
    methods = ["grpo", "dapo", "cppo", "cppo_areal", "papo", "vppo", "pgpo"]
    for name in ("study-methods", "study-methods-reduced"):
        assert loaded[name]["variants"] == {method: {"method": method} for method in methods}
    assert len(loaded["study-methods"].get("seeds", StudyConfig().seeds)) >= 5
    all_options = [
        v.get("method_options", {}) for v in loaded["study-cppo-ablations"]["variants"].values()
    ]
    options = [each for each in all_options if "keep" not in each]
    adaptive = [each["keep"] for each in all_options if "keep" in each]
    assert adaptive == ["rise_above", "share_of_rise"]
    default = dataclasses.asdict(METHODS["cppo"]())
    for option, values in {
        "fraction": {0.1, 0.25, 0.5, 1.0},
        "gate": {True, False},
        "score": {"relative", "absolute", "divergence"},
        "weight": {0.003, 0.01, 0.03},
        "divergence": {"k3", "k1", "full"},
        "weight_schedule": {"constant", "linear", "cosine"},
        "removing_views": {1, 2},
        "policy_term": {True, False},
    }.items():
        assert {each.get(option, default[option]) for each in options} == values
    assert {(view,) for view in ("image", "preserved", "removed")} <= {
        tuple(each.get("stop_gradient", ())) for each in options
    }
    assert len([each for each in options if "removing" in each]) >= 4
    assert all(len(each) <= 1 for each in options)  # one at a time


@pytest.mark.parametrize("name", ["methods", "cppo-ablations"])
def test_the_documents_quote_what_the_studies_found(name: str) -> None:
    documents = TESTS.parent / "docs"
    study = json.loads((documents / "study" / name / "study.json").read_text())
    text = (documents / "study.md").read_text()
    assert len(study["variants"]) >= 7
    assert study["missing"] == []
    for variant in study["variants"]:
        mean, half = (100 * variant["means"]["accuracy"][key] for key in ("value", "half_width"))
        cells = f"{mean:.1f}{' %' * (name == 'methods')} [{mean - half:.1f}, {mean + half:.1f}]"
        assert re.search(rf"^\| `{variant['name']}` \|.* {re.escape(cells)} \|", text, re.M), cells
        if difference := variant["differences"].get("accuracy"):
            points, half = 100 * difference["value"], 100 * difference["half_width"]
            assert f" {points:+.1f} [{points - half:+.1f}, {points + half:+.1f}] " in text


# What is wrong is named, before anything runs.


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"base/stesp": 3}, ["base: the setting 'stesp' is not known; did you mean 'steps'?"]),
        ({"base/steps": "many"}, ["base: ", '"steps"']),
        ({"base/rollout": 5}, ["base: rollout is 5; it must be a mapping"]),
        ({"base/steps": -1}, ["base: steps is -1; it must be at least 0"]),
        ({"base/data": "some/data"}, ["data is 'some/data'; a study is of the built-in task"]),
        ({"base/dataset": {"difficulty": 4}}, ["dataset.difficulty is 4; it must be one of 1, 2"]),
        ({"base/seed": 3}, ["base: seed cannot be set there: a study sets it itself"]),
        ({"base/evaluation": {"k": 3}}, ["base: evaluation.k cannot be set there"]),
        ({"variants/grpo/metod": "grpo"}, ["variants: grpo: the setting 'metod'", "'method'?"]),
        ({"variants/grpo/method": "grp"}, ["variants: grpo: method 'grp' is not", "'grpo'?"]),
        ({"variants/cppo/method_options": {"wieght": 1}}, ["cppo: ", "'wieght'; did", "'weight'?"]),
        ({"variants/cppo/method_options": {"fraction": 2}}, ["cppo: ", "fraction is 2"]),
        ({"variants/cppo/steps": 3}, ["variants: cppo: steps cannot be set there", "in base"]),
        ({"variants/cppo/rollout": {"prompts": 4}}, ["cppo: rollout.prompts cannot be set there"]),
        ({"variants/cppo/output": "x"}, ["variants: cppo: output cannot be set there"]),
        ({"variants/a b": {}}, ["'a b' cannot be a variant's name"]),
        ({"variants/start": {}}, ["'start' cannot be a variant's name"]),
        ({"variants": {}}, ["a study needs variants: give --config"]),
        ({"variants": {"grpo": 3}}, ['"variants"']),
        ({"seeds": []}, ["seeds is []"]),
        ({"baseline": "cpo"}, ["baseline: variant 'cpo' is not known", "'cppo'?"]),
        ({"seeds": [1, 1]}, ["seeds is [1, 1]"]),
        ({"seeds": [-1]}, ["seeds is [-1]"]),
        ({"seed": [0]}, ["the setting 'seed' is not known; did you mean 'seeds'?"]),
        ({"measure/evry": 1}, ["'measure.evry' is not known; did you mean 'measure.every'?"]),
    ],
)
def test_what_is_wrong_with_any_run_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(changed(SETTINGS, changes), sort_keys=False))
    arguments = ["study", "--config", str(path), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("cppo: ")
    for part in parts:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_a_variant_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path) -> None:
    made = plan(config(SETTINGS))
    assert [run.name for run in made.only(["cppo"])] == [
        "start, seed 0",
        "cppo, seed 0",
        "cppo, seed 1",
    ]
    assert made.only(None) == list(made.runs)
    with pytest.raises(ValueError, match="'cpo' is not known; did you mean 'cppo'"):
        command.run(config(SETTINGS, output=str(tmp_path / "out")), only=["cpo"])


def test_what_a_study_needs_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"matplotlib and scipy: pip install 'cppo\[study\]'"):
        command.run(config(SETTINGS))


def test_a_run_needs_nothing_that_only_reports_need() -> None:
    script = (
        "import sys, cppo.study.worker, cppo.evaluation.command; "
        "print(sorted({'matplotlib', 'scipy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# --- what is measured -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainers(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Trainer]]:
    """Of a study's run with these methods."""
    settings = changed(SETTINGS, {"base/model": str(tiny_folder)})
    variants = {method: {"method": method} for method in ("cppo", "papo")}
    runs = plan(config(settings, variants=variants, seeds=[0])).runs[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TESTS)
        made = {r.variant: Trainer(r.config, tmp_path_factory.mktemp(r.variant)) for r in runs}
        yield made
    for trainer in made.values():
        trainer.close()


@pytest.mark.parametrize("method", ["cppo", "papo"])
def test_the_meter_counts_what_a_step_passes_through_the_model(
    trainers: dict[str, Trainer], method: str
) -> None:
    trainer = trainers[method]
    meter = Meter(trainer)
    trainer._evaluate(1, "before")  # which is no part of a step
    groups = trainer.collector.collect(1)
    by_group = [trainer.collector.samples(group, 1) for group in groups]
    trainer._update(groups, by_group, 1)
    samples = [sample for group in by_group for sample in group]
    mattering = [sample for sample in samples if sample.advantage]
    positive = [sample for sample in samples if sample.advantage > 0]
    assert 0 < len(positive) < len(mattering)
    sampled = sum(len(sample.ids) for sample in samples)
    update = {  # as tests/test_once.py has it; papo's reference policy is scored on all samples
        "cppo": (
            tokens_of(mattering) + 2 * tokens_of(positive),
            pictures_of(mattering) + 2 * pictures_of(positive),
        ),
        "papo": (3 * tokens_of(samples), 3 * pictures_of(samples)),
    }
    assert meter.end_step() == {
        # Prompts once, and each response but for its last token.
        "rollout_tokens": tokens_of(samples) - sampled + sampled - len(samples),
        "rollout_pictures": 2,
        "update_tokens": update[method][0],
        "update_pictures": update[method][1],
    }
    assert set(meter.end_step().values()) == {0}


def test_answers_are_measured_on_the_same_items_under_each_view(
    trainers: dict[str, Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainers["cppo"]
    shown: list[list[Prompt]] = []

    def watched(policy: Any, questions: Questions, *given: Any, seed: int) -> Outcome:
        shown.append([prompt for batch in questions.batches(3) for prompt in batch])
        sampling = given[1]
        assert isinstance(sampling, Sampling)
        assert (sampling.responses, seed) == (2, 0)
        return evaluate(policy, questions, *given, seed=seed)

    monkeypatch.setattr(measure, "evaluate", watched)
    settings = plan(config(SETTINGS)).runs[0].measure
    first = measure.measure_answers(trainer, settings)
    assert measure.measure_answers(trainer, settings) == first
    assert list(first) == ["as_it_is", "preserved", "removed", "black", "chance"]
    assert all(0 <= value <= 1 for value in first.values())
    views = dict(zip(first, shown, strict=False))
    rows = [f"eval:{index}" for index in range(4)]
    for number, prompts in enumerate(shown):
        assert [prompt.item.row for prompt in prompts] == rows
        for prompt, again in zip(prompts, shown[number % 4], strict=True):
            assert prompt.pixels.equal(again.pixels)  # the same in both measurements
    for name in ("preserved", "removed", "black"):
        for prompt, plain in zip(views[name], views["as_it_is"], strict=True):
            assert not prompt.pixels.equal(plain.pixels)
    black = [prompt.pixels for prompt in views["black"]]
    assert all(pixels.equal(black[0]) for pixels in black)
    # A quarter of the items asks for one cell, the others for four.
    assert first["chance"] == pytest.approx((1 / 24 + 3 * chance("a b c " * 4)) / 4)


def test_the_detector_is_measured_on_as_many_solutions_as_the_study_says(
    trainers: dict[str, Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainers["cppo"]
    measured: list[int] = []

    def watched(policy: Any, scorer: Any, puzzles: Any, *given: Any, **named: Any) -> Any:
        measured.append(len(puzzles))
        return plain(policy, scorer, puzzles, *given, **named)

    plain = measure.measure_detector
    monkeypatch.setattr(measure, "measure_detector", watched)
    found = measure.measure_perception(trainer, plan(config(SETTINGS)).runs[0].measure)
    assert measured == [3]
    assert list(found) == ["relative", "absolute"]
    assert all(0 <= value <= 1 for value in found.values())


def test_a_run_whose_study_is_gone_ends(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TESTS)
    run = plan(config(changed(SETTINGS, {"base/model": str(tiny_folder)}))).runs[1]
    asked = request(run, folder=tmp_path / "run", result=tmp_path / "run.json", jobs=1)
    assert asked["parent"] == os.getpid() != os.getppid()
    with pytest.raises(SystemExit, match="the study that this run belongs to is gone"):
        work(asked)
    assert not (tmp_path / "run.json").exists()


# --- runs side by side ----------------------------------------------------------------------------


@pytest.fixture
def jobs_of(tiny_folder: Path, tmp_path: Path) -> Callable[..., Jobs]:
    def make(**changes: Any) -> Jobs:
        settings = changed(SETTINGS, {"base/model": str(tiny_folder)})
        study = plan(config(settings, output=str(tmp_path), **changes))
        return Jobs(study, study.runs, lock=os.open(tmp_path, os.O_RDONLY))

    return make


@pytest.mark.parametrize("jobs", [1, 3])
def test_as_many_runs_are_in_hand_as_jobs_says_and_a_signal_ends_them(
    jobs_of: Callable[..., Jobs], jobs: int
) -> None:
    found, stop = jobs_of(jobs=jobs), StopRequest()
    for ends in found.watch(stop):
        assert ends == []
        assert found.names.count(";") == jobs - 1
        processes = [job._process for job in found._running]
        stop.signal = signal.SIGTERM
    assert [process.poll() for process in processes] == [-signal.SIGTERM] * jobs


def test_a_run_that_takes_too_long_or_is_killed_is_reported_and_the_others_go_on(
    jobs_of: Callable[..., Jobs],
) -> None:
    late = jobs_of(timeout_minutes=1e-6)
    ends = [end for ends in late.watch(StopRequest()) for end in ends]
    assert [end.run.name for end in ends] == [run.name for run in late._study.runs]
    assert all(end.failure.startswith("it took longer than timeout_minutes") for end in ends)

    stop, killed = StopRequest(), jobs_of(jobs=1)
    ends = []
    for found in killed.watch(stop):
        ends += found
        if not ends:
            killed._running[0]._process.kill()
        elif killed.names:
            assert (killed.names, killed.done) == ("grpo, seed 0", 1)
            stop.signal = signal.SIGTERM
    assert ends[0].failure.startswith("its process ended with signal SIGKILL. The end of ")


# --- a whole study --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """A study that was stopped, and gone on with; one variant of it cannot run."""

    study: Study
    settings: Path
    stopped: tuple[int, str]  # status, and what was said
    ended: tuple[int, str]
    first: dict[str, float]  # the files there were when it was stopped, and when they were written

    @property
    def output(self) -> Path:
        return self.study.output

    def load(self, run: Run) -> dict[str, Any]:
        record = json.loads(place(self.output, run).read_text())
        assert isinstance(record, dict)
        return record

    def summary(self) -> Summary:
        made = summarise(self.study, finished(self.study))
        assert made is not None
        return made


@pytest.fixture(scope="module")
def told(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("study")
    changes = {
        "base/model": str(tiny_folder),
        "variants/broken": {"backend": "tpu"},
        "output": str(folder / "out"),
        "threads": 2,
    }
    settings = changed(SETTINGS, changes)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    program = [sys.executable, "-m", "cppo.cli", "study", "--config", str(path)]
    runs = folder / "out" / "runs"
    started = subprocess.Popen(
        [*program, "--jobs", "1"], cwd=TESTS, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(runs.glob("*/*.json")):
        assert started.poll() is None
        assert time.monotonic() < deadline, "no run has ended"
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=60)
    first = {str(file): file.stat().st_mtime for file in runs.glob("*/*.json")}
    resumed = subprocess.run(
        [*program, "--keep", "true"],
        cwd=TESTS,
        stdout=subprocess.PIPE,
        text=True,
        timeout=400,
        check=False,
    )
    return Told(
        study=plan(config(settings)),
        settings=path,
        stopped=(started.returncode, said),
        ended=(resumed.returncode, resumed.stdout),
        first=first,
    )


def test_a_study_that_is_stopped_goes_on_with_what_is_missing(told: Told) -> None:
    status, said = told.stopped
    assert status == 128 + signal.SIGTERM
    assert "the same command goes on with the runs that are not finished" in said
    assert 1 <= len(told.first) < 5
    assert f"{len(told.first)} of 7 runs are there already" in told.ended[1]
    for file, written in told.first.items():
        assert Path(file).stat().st_mtime == written
    found = sorted(f"{variant} {seed}" for variant, seed in finished(told.study))
    assert found == ["cppo 0", "cppo 1", "grpo 0", "grpo 1", "start 0"]


def test_a_variant_that_cannot_run_leaves_the_others_alone(told: Told) -> None:
    status, said = told.ended
    assert status == 1
    for seed in (0, 1):
        assert f"broken, seed {seed}: FAILED: its process ended with status 1" in said
    assert "backend 'tpu' is not known" in said  # the end of its log
    pending = 7 - len(told.first)
    assert f"2 of {pending} runs failed; the same command tries them again" in said
    assert told.summary().missing == ["broken, seed 0", "broken, seed 1"]
    assert "Not finished: broken, seed 0; broken, seed 1." in page(told.summary())


def test_finished_runs_keep_their_folders_only_where_it_is_asked_for(told: Told) -> None:
    kept = {folder.name for folder in (told.output / "folders").iterdir()}
    without = {"-seed-".join([Path(f).parent.name, Path(f).stem[5:]]) for f in told.first}
    everything = {"start-seed-0", *(f"{v}-seed-{s}" for v in ("grpo", "cppo") for s in "01")}
    assert kept == everything - without
    for name in kept:
        assert (told.output / "folders" / name / "model").exists()


def test_a_runs_file_holds_what_was_measured(told: Told) -> None:
    for run in told.study.runs:
        if run.variant == "broken":
            continue
        record = told.load(run)
        assert (record["variant"], record["seed"]) == (run.variant, run.seed)
        assert record["settings"] == json.loads(json.dumps(run.settings()))
        jobs = 1 if str(place(told.output, run)) in told.first else 2
        assert (record["jobs"], record["environment"]["threads"]) == (jobs, "2")
        assert record["environment"]["attention in groups"].startswith("in parts in float32")
        steps = run.config.steps
        assert [point["step"] for point in record["curve"]] == list(range(steps + 1))
        assert {len(values) for values in record["steps"].values()} == ({2} if steps else set())
        if steps:
            assert record["steps"]["rollout_pictures"] == [2, 2]
            assert min(record["steps"]["rollout_tokens"]) > 0
            assert max(record["steps"]["update_seconds"]) > 0
        metrics = told.output / "folders" / f"{run.variant}-seed-{run.seed}" / "metrics.jsonl"
        if metrics.exists():
            logged = [json.loads(line) for line in metrics.read_text().splitlines()]
            for name in ("accuracy", "reward", "kept_groups"):
                assert record["steps"][name] == pytest.approx([line[name] for line in logged])


def test_all_runs_begin_with_the_same_policy_and_are_measured_on_the_same_items(
    told: Told,
) -> None:
    records = [told.load(run) for run in told.study.runs if run.variant != "broken"]
    assert len({record["curve"][0]["relative"] for record in records}) == 1
    for seed in (0, 1):  # which sampling differs in
        starts = {r["curve"][0]["accuracy"] for r in records if r["seed"] == seed}
        assert len(starts) == 1


def test_the_summary_is_of_the_runs_files(told: Told) -> None:
    summary = told.summary()
    written = json.loads((told.output / "study.json").read_text())
    assert written == json.loads(summary.to_json())
    assert [variant.name for variant in summary.variants] == ["grpo", "cppo"]
    values = {
        variant: [
            told.load(run)["answers"]["as_it_is"]
            for run in told.study.runs
            if run.variant == variant
        ]
        for variant in ("grpo", "cppo")
    }
    for variant in summary.variants:
        assert variant.seeds == [0, 1]
        assert list(variant.values["accuracy"].values()) == values[variant.name]
        assert variant.means["accuracy"] == mean_of(values[variant.name])
        loaded = [told.load(run) for run in told.study.runs if run.variant == variant.name]
        tokens = [sum(record["steps"]["update_tokens"]) / 2 for record in loaded]
        assert variant.means["update_tokens"].value == pytest.approx(sum(tokens) / 2)
        last = [record["curve"][-1]["relative"] for record in loaded]
        assert variant.means["roc_auc"] == variant.curve[2]["roc_auc"] == mean_of(last)
    start = told.load(told.study.runs[0])["answers"]
    assert summary.start["accuracy"] == start["as_it_is"]
    assert summary.chance == start["chance"]
    difference = summary.variants[1].differences["accuracy"]
    assert difference.value == pytest.approx(sum(values["cppo"]) / 2 - sum(values["grpo"]) / 2)
    assert difference.p == difference.p_holm  # there is one comparison
    assert summary.variants[0].differences == {}


def test_page_and_console_show_the_summarys_figures(told: Told) -> None:
    summary, text = told.summary(), (told.output / "study.md").read_text()
    assert text == page(summary)
    for variant in summary.variants:
        assert f"| {variant.name} | 2 | {100 * variant.means['accuracy'].value:.1f} %" in text
    assert "Seeds vary the order of the data and the sampling, and neither the warm start" in text
    for table in tables(summary):
        assert table.title in told.ended[1]
        assert {len(row) for row in table.rows} == {len(table.header)}
        for file in table.plots:
            assert f"]({file})" in text
    assert {file for table in tables(summary) for file in table.plots} == set(plots.PLOTS)
    assert "| grpo | `method=grpo` |" in text
    assert "| cppo | `method_options.weight=0.1` |" in text


def test_a_report_can_go_elsewhere_and_be_against_another_baseline(
    told: Told, tmp_path: Path
) -> None:
    made = (told.output / "study.md").read_text()
    asked = ["study", "--config", str(told.settings), "--report-only", "--baseline", "cppo"]
    assert cli.main([*asked, "--report-to", str(tmp_path / "against")]) == 0
    page = (tmp_path / "against" / "study.md").read_text()
    assert "against cppo, points" in page
    assert (tmp_path / "against" / "views.svg").exists()
    assert (told.output / "study.md").read_text() == made


def test_every_plot_is_drawn(told: Told) -> None:
    for file in plots.PLOTS:
        root = xml.etree.ElementTree.parse(told.output / file).getroot()
        assert root.tag.endswith("svg")
        assert len(list(root.iter())) > 50


def test_reports_are_made_again_from_the_files_alone(
    told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (told.output / name).read_bytes() for name in ("study.md", *plots.PLOTS)}
    for name in before:
        (told.output / name).unlink()
    assert cli.main(["study", "--config", str(told.settings), "--report-only"]) == 0
    assert "seed 0:" not in capsys.readouterr().out  # nothing was run
    assert {name: (told.output / name).read_bytes() for name in before} == before


def test_only_the_variants_that_are_named_run(
    told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["study", "--config", str(told.settings), "--only", "grpo", "cppo"]) == 0
    assert "5 of 5 runs are there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "name", "was", "now"),
    [
        (["--base.optimizer.learning_rate", "0.5"], "optimizer.learning_rate", "0.001", "0.5"),
        (["--measure.items", "5"], "measure.items", "4", "5"),
        (["--variants", "{grpo: {method: dapo}}"], "method", "'grpo'", "'dapo'"),
    ],
)
def test_runs_with_other_settings_are_not_mixed(
    told: Told,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    name: str,
    was: str,
    now: str,
) -> None:
    assert cli.main(["study", "--config", str(told.settings), *arguments]) == 2
    message = capsys.readouterr().err
    assert str(told.output / "runs") in message
    assert f"{name} was {was}, and is {now} now. Give another --output, or remove" in message


def test_a_folder_in_which_a_study_is_at_work_is_refused(
    told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    with command._locked(told.output):
        assert cli.main(["study", "--config", str(told.settings)]) == 2
    assert "is at work in" in capsys.readouterr().err


# --- records and reports by hand ------------------------------------------------------------------


def record(run: Run, accuracy: float, **changes: Any) -> dict[str, Any]:
    """What a run leaves behind, with figures that are easy to follow."""
    per_step = (
        *("rollout_tokens", "update_tokens", "rollout_pictures", "update_pictures"),
        "kept_groups",
    )
    seconds = ("rollout_seconds", "views_seconds", "update_seconds", "peak_memory_gib")
    answers = {"as_it_is": accuracy, "preserved": accuracy, "removed": 0.1, "black": 0.0}
    return {
        "variant": run.variant,
        "seed": run.seed,
        "settings": run.settings(),
        "jobs": 1,
        "curve": [
            {"step": step, "accuracy": accuracy * step / 2, "relative": 0.8, "absolute": 0.9}
            for step in range(run.config.steps + 1)
        ],
        "answers": {**answers, "chance": 0.01},
        "steps": {name: [1.0] * 2 for name in (*per_step, *seconds)} if run.config.steps else {},
        "seconds": 3.0,
        "environment": {"threads": "1"},
        **changes,
    }


def by_hand(tmp_path: Path, accuracies: Mapping[str, Mapping[int, float]]) -> Study:
    """A study of finished runs."""
    seeds = sorted({seed for own in accuracies.values() for seed in own})
    variants = {name: {"method": "grpo"} for name in accuracies}
    study = plan(config(SETTINGS, variants=variants, seeds=seeds, output=str(tmp_path)))
    for run in study.runs:
        known = accuracies.get(run.variant, {})
        if run.seed in known:
            write(place(study.output, run), record(run, known[run.seed]))
    return study


def summary_of(study: Study) -> Summary:
    made = summarise(study, finished(study))
    assert made is not None
    return made


def test_variants_are_compared_on_the_seeds_that_both_have(tmp_path: Path) -> None:
    accuracies = {
        "base": {0: 0.5, 1: 0.6, 2: 0.7},
        "better": {0: 0.7, 1: 0.81, 2: 0.9},
        "same": {0: 0.52, 1: 0.58},
        "other": {0: 0.5},
    }
    summary = summary_of(by_hand(tmp_path, accuracies))
    found = {v.name: v.differences.get("accuracy") for v in summary.variants}
    better, same, other = found["better"], found["same"], found["other"]
    assert found["base"] is None
    assert better is not None
    assert same is not None
    assert other is not None
    assert (better.count, same.count, other.count) == (3, 2, 1)
    assert same.value == pytest.approx(0.0)
    assert better.p is not None
    assert better.p_holm == pytest.approx(2 * better.p)  # of two; the single seed has none
    assert (same.p_holm, other.p_holm) == (pytest.approx(1.0), None)
    text = page(summary)
    assert "at the 5 % level, in points: better (+20.3); the others cannot be told apart" in text
    assert "A single seed has no interval: none is shown with it." in text
    assert "| other | 1 | 50.0 % | +0.0 |  |  |" in text
    assert "start, seed 0" in summary.missing


def test_any_variant_can_be_the_baseline(tmp_path: Path) -> None:
    study = by_hand(tmp_path, {"base": {0: 0.5, 1: 0.6}, "other": {0: 0.7, 1: 0.9}})
    against = dataclasses.replace(study, config=dataclasses.replace(study.config, baseline="other"))
    summary = summary_of(against)
    [base, other] = summary.variants
    assert base.differences["accuracy"].value == pytest.approx(-0.25)
    assert other.differences == {}
    assert "against other, points" in page(summary)


def test_a_study_in_which_nothing_differs_says_so(tmp_path: Path) -> None:
    study = by_hand(tmp_path, {"base": {0: 0.5, 1: 0.6}, "like": {0: 0.6, 1: 0.5}})
    expected = "no variant's accuracy differs from that of base at the 5 % level"
    assert expected in page(summary_of(study))
    alone = by_hand(tmp_path / "alone", {"base": {0: 0.5}, "like": {0: 0.6}})
    assert "that takes two seeds or more" in page(summary_of(alone))


def test_costs_are_multiples_of_the_baselines(tmp_path: Path) -> None:
    study = by_hand(tmp_path, {"base": {0: 0.5}, "dear": {0: 0.5}})
    dear = next(run for run in study.runs if run.variant == "dear")
    steps = {
        **record(dear, 0.5)["steps"],
        "update_tokens": [1.0, 4.0],
        "update_seconds": [4.0, 5.0],
    }
    write(place(study.output, dear), record(dear, 0.5, steps=steps))
    [*_, cost] = tables(summary_of(study))
    # 1 + 1 + 4.5 seconds against 3; 2.5 tokens against 1.
    assert cost.rows[1][:4] == ("dear", "1.00", "5.50", "2.17")
    assert cost.rows[1][4] == "2.50"
    assert cost.rows[0][3:7] == ("1.00", "1.00", "1.00", "1.00")
    assert cost.rows[0][cost.header.index("groups that teach")] == "1.0"


def test_curves_are_drawn_with_their_bands(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    study = by_hand(tmp_path, {"base": {0: 0.5, 1: 0.7}, "other": {0: 0.2, 1: 0.4}})
    figure = Figure()
    plots._accuracy_curves(figure, summary_of(study))
    [axes] = [axes for axes in figure.axes if axes.get_visible()]
    baseline, other = axes.lines
    assert list(other.get_xdata()) == [0, 1, 2]
    assert list(other.get_ydata()) == pytest.approx([0, 15, 30])
    assert list(baseline.get_ydata()) == pytest.approx([0, 30, 60])
    band = axes.collections[1].get_paths()[0].get_extents()
    half = 100 * 12.706205 * 0.1
    assert (band.y0, band.y1) == pytest.approx((30 - half, 30 + half), abs=1e-3)


def test_a_file_that_is_no_record_is_refused_by_name(tmp_path: Path) -> None:
    study = by_hand(tmp_path, {"base": {0: 0.5}})
    path = place(study.output, study.runs[1])
    for text in ("", "[]", '{"variant": "base"}', '{"settings": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"seed-0\.json is no record of a run .*: remove it"):
            finished(study)


def test_a_setting_that_there_was_not_yet_had_its_default(tmp_path: Path) -> None:
    study = by_hand(tmp_path, {"base": {0: 0.5}})
    path = place(study.output, study.runs[1])
    stored = json.loads(path.read_text())
    del stored["settings"]["precision"]
    del stored["settings"]["method_options"]["clip_low"]
    path.write_text(json.dumps(stored))
    assert list(finished(study)) == [("base", 0)]
    del stored["settings"]["rollout"]["prompts"]  # 2 here, and 32 by default
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"rollout\.prompts was 32, and is 2 now"):
        finished(study)


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run is finished in"):
        command.run(config(SETTINGS, output=str(tmp_path)), report_only=True)
    with pytest.raises(ValueError, match="report-to is where --report-only writes"):
        command.run(config(SETTINGS, output=str(tmp_path)), report_to=str(tmp_path / "there"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "seed-0.json"
    write(path, {"value": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(path, {"value": math.nan})
    assert json.loads(path.read_text()) == {"value": 1}
