"""The whole path, on a small random model: what a run leaves behind, and that it can be resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import BACKEND

from cppo import cli
from cppo.config import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from cppo.learner import Diverged, learning_rate
from cppo.methods import METHODS
from cppo.policy import encode_item
from cppo.processes import Processes
from cppo.reward import SECOND_LOOKS, Reward, SecondLook, final_answer
from cppo.rollout import transformers as in_process
from cppo.run_folder import RunFolder
from cppo.trainer import Trainer

pytestmark = pytest.mark.device
REWARD = "test_trainer:reward_length"


def reward_length(response: str, answer: str, question: str) -> float:
    """Something that a random policy varies in."""
    return (len(response) % 7) / 7


def reward_reply(response: str, answer: str, question: str, reply: str | None = None) -> Reward:
    """It varies in both."""
    total = reward_length(f"{response}{reply}", answer, question)
    return Reward(total=total, accuracy=0.0, format=0.0, second_look=float(reply is not None))


ASKING = SecondLook(  # about anything: a random policy describes nothing
    instruction="",
    ask=lambda said, question: f"{said} {question}",
    grade=reward_reply,
    final=final_answer,
)


def config(model: Path, **changes: Any) -> TrainConfig:
    plain = TrainConfig(
        model=str(model),
        data="builtin",
        reward=REWARD,
        steps=2,
        backend=os.environ[BACKEND],
        checkpoint_every=0,
        samples_every=1,
        policy=PolicyConfig(max_prompt_tokens=600),
        rollout=RolloutConfig(prompts=2, responses=3, max_new_tokens=6),
        rewards=RewardConfig(workers=1),
        optimizer=OptimizerConfig(learning_rate=1e-3, tokens_per_micro_batch=300),
        evaluation=EvaluationConfig(items=2, every=0, items_during=2, k=2),
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture(autouse=True)
def _own_reward_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)


def run(settings: TrainConfig, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    trainer = Trainer(settings, folder, resume=resume)
    try:
        return trainer.train()
    finally:
        trainer.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_leaves_a_whole_run_folder(
    method: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks_again = method in SECOND_LOOKS
    if asks_again:
        monkeypatch.setitem(SECOND_LOOKS, method, ASKING)
    plain = config(tiny_folder, reward="default" if asks_again else REWARD)
    settings = dataclasses.asdict(dataclasses.replace(plain, output=str(tmp_path)))
    file = tmp_path.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({n: v for n, v in settings.items() if n != "method"}))
    assert cli.main(["train", "--config", str(file), "--method", method]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == 2
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2]
    assert all(record["skipped"] == 0 for record in metrics if record["kept_groups"])
    assert any(record["kept_groups"] for record in metrics)
    before = weights_of(tiny_folder)
    after = weights(tmp_path)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert [record["name"] for record in lines(tmp_path / "evaluation.jsonl")] == [
        "before",
        "after",
    ]
    sample = lines(tmp_path / "samples.jsonl")[0]
    assert len(sample["tokens"]) == len(sample["logprob"]) == len(sample["entropy"])
    assert ("perception" in sample) == method.startswith("cppo")
    assert isinstance(sample.get("reply"), str) == asks_again
    shares = [record.get("second_look_accuracy") for record in metrics]
    assert shares == [1.0 if asks_again else None] * 2
    for name in ("config.yaml", "summary.json", "tensorboard", "checkpoints/step-000002"):
        assert (tmp_path / name).exists(), name


@pytest.mark.parametrize("method", SECOND_LOOKS)
def test_a_policy_that_describes_nothing_is_not_asked_again(
    method: str, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = run(config(tiny_folder, method=method, reward="default"), tmp_path)
    assert summary["finished"]
    assert summary["skipped_rows"].startswith("0 of")  # for all that the instruction is long
    assert summary["reward_failures"] == {}
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [(m["second_look_accuracy"], m["kept_groups"]) for m in metrics] == [(0.0, 0.0)] * 2
    assert [sample["reply"] for sample in lines(tmp_path / "samples.jsonl")] == [None] * 6
    assert "step 2 teaches nothing: in each group, all responses have the same" in caplog.text


def test_a_method_with_a_reward_of_its_own_takes_no_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward is '.*:reward_length', but method 'vision_sr1'"):
        Trainer(config(tmp_path, method="vision_sr1"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [None, ""])
def test_a_second_look_brings_its_instruction_unless_one_is_given(
    given: str | None, tiny_folder: Path, tmp_path: Path
) -> None:
    dataset = DataConfig(instruction=given)
    settings = config(tiny_folder, method="visionary_r1", reward="default", dataset=dataset)
    trainer = Trainer(settings, tmp_path)
    try:
        (prompt,) = trainer.encoder.take(trainer.feed.take(1))
        expected = SECOND_LOOKS["visionary_r1"].instruction if given is None else given
        true = encode_item(trainer.policy, prompt.item, instruction=expected, max_tokens=999)
        assert torch.equal(prompt.ids, true.ids)
    finally:
        trainer.close()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    tiny_folder: Path, tmp_path: Path
) -> None:
    # Attention's backward pass on a GPU sums in any order unless it is told not to.
    gpu = torch.cuda.is_available()
    whole = config(tiny_folder, steps=4, method="cppo", deterministic=gpu)
    try:
        run(whole, tmp_path / "whole")
        run(dataclasses.replace(whole, steps=2), tmp_path / "parts")
        run(whole, tmp_path / "parts", resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0, msg=name)
    timed = {"rollout_seconds", "views_seconds", "update_seconds", "peak_memory_gib"}
    for a, b in zip(
        lines(tmp_path / "whole" / "metrics.jsonl"),
        lines(tmp_path / "parts" / "metrics.jsonl"),
        strict=True,
    ):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }


def test_several_mini_batches_and_epochs_use_the_sampling_policys_logprobs(
    tiny_folder: Path, tmp_path: Path
) -> None:
    optimizer = OptimizerConfig(
        learning_rate=1e-2, tokens_per_micro_batch=300, mini_batch_prompts=1, epochs=2
    )
    run(config(tiny_folder, method="grpo", optimizer=optimizer), tmp_path)
    moved = [record.get("old_kl", 0.0) for record in lines(tmp_path / "metrics.jsonl")]
    assert max(moved) > 1e-4  # with the ratio taken against itself it would be zero


def test_the_reference_term_is_zero_at_the_start_and_grows(
    tiny_folder: Path, tmp_path: Path
) -> None:
    settings = config(tiny_folder, method="grpo", method_options={"reference_kl": 0.1}, steps=3)
    run(settings, tmp_path)
    drift = [r["loss/reference_kl"] for r in lines(tmp_path / "metrics.jsonl") if r["kept_groups"]]
    assert drift[0] == pytest.approx(0.0, abs=1e-6)
    assert drift[-1] > 1e-5


def test_adapters_are_trained_alone_and_saved_merged(tiny_folder: Path, tmp_path: Path) -> None:
    settings = config(
        tiny_folder,
        method="cppo",
        method_options={"reference_kl": 0.01},
        policy=PolicyConfig(max_prompt_tokens=600, lora_rank=4, freeze_vision=True),
    )
    run(settings, tmp_path)
    before, after = weights_of(tiny_folder), weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("visual" in name or "embed" in name for name in changed)


@pytest.mark.parametrize("name", ["geometry3k-mini", "dynamath-mini", "puzzlevqa-mini"])
def test_real_pictures_train(
    name: str, tiny_folder: Path, tmp_path: Path, shared_data: Callable[[str], Path]
) -> None:
    settings = config(
        tiny_folder,
        data=str(shared_data(name)),
        policy=PolicyConfig(max_prompt_tokens=2048, max_pixels=112 * 112),
    )
    summary = run(settings, tmp_path)
    assert summary["steps"] == 2
    assert summary["skipped_rows"].startswith("0 of")
    assert 0 <= summary["after"]["value"] <= 1


def test_steps_that_are_not_finite_end_the_run_with_a_diagnosis(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config(tiny_folder), tmp_path)
    limit, bad = trainer.config.optimizer.max_bad_steps, {"skipped": 1.0, "grad_norm": math.nan}
    # One that is finite clears the count.
    ends = [*[bad] * (limit - 1), {"skipped": 0.0, "grad_norm": 1.0}, *[bad] * limit]
    remaining = iter(ends)
    updater = trainer.learner._updater
    monkeypatch.setattr(updater, "step", lambda samples, progress: next(remaining))
    try:
        for number in range(len(ends) - 1):
            trainer._train_step(number + 1)
        with pytest.raises(Diverged, match=r"optimizer\.learning_rate.*saved under .*checkpoints"):
            trainer._train_step(len(ends))
    finally:
        trainer.close()
    assert list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_with_a_checkpoint_to_resume_from(
    sign: signal.Signals, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "cppo.cli", "train", "--model", str(tiny_folder)),
        *("--steps", "500", "--output", str(folder), "--reward", REWARD),
        *("--backend", os.environ[BACKEND]),
        *("--rollout.prompts", "2", "--rollout.responses", "2", "--rollout.max_new_tokens", "6"),
        *("--evaluation.items", "2", "--evaluation.k", "1", "--evaluation.every", "0"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert started.poll() is None
        assert time.monotonic() < deadline, "the run made no step"
        time.sleep(0.1)
    started.send_signal(sign)
    assert started.wait(timeout=60) == 128 + sign
    done = len(lines(metrics))
    assert list((folder / "checkpoints").glob("step-*"))[-1].name == f"step-{done:06d}"
    resumed = subprocess.run(
        [*command[:4], "--resume", str(folder), "--steps", str(done + 1)],
        env=environment,
        timeout=120,
        check=False,
    )
    assert resumed.returncode == 0
    assert len(lines(metrics)) == done + 1


def test_a_deterministic_run_uses_deterministic_algorithms_alone(
    tiny_folder: Path, tmp_path: Path
) -> None:
    try:
        summary = run(config(tiny_folder, steps=1, deterministic=True), tmp_path)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert summary["finished"]


def test_the_time_out_between_processes_is_the_one_that_is_given(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []

    class Watched(Processes):
        def __init__(self, *given: Any, timeout_seconds: float, **others: Any) -> None:
            waits.append(timeout_seconds)
            super().__init__(*given, timeout_seconds=timeout_seconds, **others)

    monkeypatch.setattr("cppo.trainer.Processes", Watched)
    Trainer(config(tiny_folder, timeout_minutes=1.5), tmp_path).close()
    assert waits == [90.0]


def test_an_accelerator_hands_back_between_rollout_and_update_what_the_rollout_held(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """A CPU's allocator joins it, and all that is handed back is cleared anew, page by page."""
    handed_back = []
    trainer = Trainer(config(tiny_folder, steps=2), tmp_path)
    memory = dataclasses.replace(
        trainer.backend.memory, release=lambda: handed_back.append("all of it")
    )
    trainer.backend = dataclasses.replace(trainer.backend, memory=memory)
    try:
        trainer.train()
    finally:
        trainer.close()
    assert len(handed_back) == (0 if trainer.backend.device == "cpu" else 2)


def reward_beyond_one(response: str, answer: str, question: str) -> float:
    """All of it clips to the same accuracy."""
    return 1.0 + len(response)


def test_sampling_is_compiled_where_that_is_asked_for(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rollouts, and in the evaluation at the end."""
    asked: list[tuple[int, bool]] = []

    def decoder(policy: Any, prompts: Any, responses: int, *, compile: bool) -> Any:
        asked.append((responses, compile))
        return plain(policy, prompts, responses)

    plain = in_process.decoder
    monkeypatch.setattr(in_process, "decoder", decoder)
    rollout = RolloutConfig(prompts=2, responses=3, max_new_tokens=6, compile=True)
    run(config(tiny_folder, rollout=rollout), tmp_path / "compiled")
    assert set(asked) == {(3, True), (2, True)}
    asked.clear()
    run(config(tiny_folder), tmp_path / "plain")
    assert set(asked) == {(3, False), (2, False)}


@pytest.mark.parametrize(("method", "teaches"), [("grpo", True), ("dapo", False)])
def test_a_step_that_teaches_nothing_says_why(
    method: str,
    teaches: bool,
    tiny_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reward = "test_trainer:reward_beyond_one"
    summary = run(config(tiny_folder, steps=1, method=method, reward=reward), tmp_path)
    assert summary["finished"]
    warned = "step 1 teaches nothing: in each group, all responses have the same accuracy"
    assert (warned not in caplog.text) == teaches


def test_a_run_that_ended_before_its_first_checkpoint_cannot_be_resumed(
    tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint to resume from: start anew, with"):
        Trainer(config(tiny_folder), tmp_path, resume=True)
    RunFolder(tmp_path).close()  # what could not begin holds nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "test_trainer:reward_absent"}, "has no 'reward_absent'"),
        ({"data": "rows.jsonl"}, "rows.jsonl"),
        ({"dataset": DataConfig(difficulty=4)}, "difficulty is 4"),
    ],
)
def test_what_is_cheap_to_refuse_is_refused_before_the_model_is_loaded(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cppo.trainer.open_policy", lambda *given, **named: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        Trainer(config(Path("a/model"), **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_of_the_optimizer_and_the_adapters_reach_them(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """After a resume too, whose checkpoint was written under others."""
    first = config(tiny_folder, steps=1, method="grpo", policy=PolicyConfig(lora_rank=2))
    run(first, tmp_path)
    settings = dataclasses.replace(
        first,
        policy=PolicyConfig(lora_rank=2, lora_alpha=3.0),
        optimizer=OptimizerConfig(weight_decay=0.25, beta1=0.5, beta2=0.75),
    )
    for folder, resume in ((tmp_path, True), (tmp_path / "new", False)):
        trainer = Trainer(settings, folder, resume=resume)
        trainer.close()
        (group,) = trainer.learner.optimizer.param_groups
        assert (group["betas"], group["weight_decay"]) == ((0.5, 0.75), 0.25)
        (adapter,) = trainer.policy.model.peft_config.values()
        assert (adapter.r, adapter.lora_alpha) == (2, 3.0)


@pytest.mark.parametrize(
    ("targets", "adapted"), [(".*[qv]_proj", {"q_proj", "v_proj"}), ("all-linear", None)]
)
def test_adapters_are_where_they_are_asked_for(
    targets: str, adapted: set[str] | None, tiny_folder: Path, tmp_path: Path
) -> None:
    policy = PolicyConfig(lora_rank=2, lora_targets=targets)
    trainer = Trainer(config(tiny_folder, policy=policy), tmp_path)
    trainer.close()
    names = [name.split(".") for name, _ in trainer.policy.model.named_modules()]
    found = {parts[parts.index("lora_A") - 1] for parts in names if "lora_A" in parts}
    assert found == adapted if adapted else len(found) > 4


def test_a_run_without_a_folder_makes_its_own(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (
        Trainer(config(tiny_folder, reward="default", method="grpo")) for _ in range(2)
    )
    first.close()
    second.close()
    made = sorted((tmp_path / "runs").iterdir())
    assert made == sorted(tmp_path / trainer.folder.path for trainer in (first, second))
    assert all(re.fullmatch(rf"\d+-\d+-grpo-{tiny_folder.name}(-2)?", path.name) for path in made)


@pytest.mark.usefixtures("two_devices")
def test_two_processes_share_a_run_and_resume_it(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    train = [*launch, "-m", "cppo.cli", "train"]
    command = [
        *(*train, "--model", str(tiny_folder), "--steps", "2", "--output", str(folder)),
        *("--reward", REWARD, "--optimizer.tokens_per_micro_batch", "60"),
        *("--backend", os.environ[BACKEND]),
        *("--rollout.prompts", "4", "--rollout.responses", "2", "--rollout.max_new_tokens", "6"),
        *("--evaluation.items", "3", "--evaluation.k", "1", "--evaluation.every", "0"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, timeout=240, check=True)
    resume = [*train, "--resume", str(folder), "--steps", "3"]
    subprocess.run(resume, env=environment, timeout=240, check=True)
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(line["skipped"] == 0 for line in metrics)
    evaluations = lines(folder / "evaluation.jsonl")
    assert [(e["name"], e["step"], e["items"]) for e in evaluations] == [
        ("before", 0, 3),
        ("after", 3, 3),
    ]
    assert any(not torch.equal(w, weights_of(tiny_folder)[n]) for n, w in weights(folder).items())


def test_the_learning_rate_warms_up_and_decays_as_named() -> None:
    settings = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="linear")
    assert [learning_rate(settings, step, 8) for step in (1, 4, 5, 7)] == [0.25, 1.0, 1.0, 0.5]
    cosine = dataclasses.replace(settings, schedule="cosine", warmup_steps=0)
    assert learning_rate(cosine, 5, 8) == pytest.approx(0.5)
    assert learning_rate(dataclasses.replace(cosine, schedule="constant"), 8, 8) == 1.0
