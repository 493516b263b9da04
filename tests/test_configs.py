"""Laws of configs/: each file parses, says nothing but differences, and trains."""

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from cppo.cli import _parse
from cppo.config import TrainConfig, check
from cppo.methods import CPPO, METHODS, PAPO, PGPO, VPPO, build
from cppo.perturb import perturb
from cppo.trainer import Trainer

FILES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*"))
CONFIGS = [path for path in FILES if not path.name.startswith("study-")]  # see test_study.py
SPELLED_OUT = {"quickstart.yaml": {"model", "data", "method"}}  # equal to defaults, on purpose
REWARD = """
import hashlib

def by_hash(response, answer, question):
    "Any number, as long as responses differ in it."
    return hashlib.blake2b(response.encode()).digest()[0] / 255
"""


def parsed(path: Path) -> TrainConfig:
    made = _parse("train", TrainConfig, ["--config", str(path)])
    assert made is not None
    config: TrainConfig = made[0]
    return config


def leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings_in(path: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def test_there_are_configs_and_nothing_else() -> None:
    assert {path.suffix for path in FILES} == {".yaml"}
    assert "quickstart.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_accepted_and_each_of_its_values_takes_effect(path: Path) -> None:
    config = parsed(path)
    check(config)
    taken = dict(leaves(asdict(config)))
    for name, value in leaves(settings_in(path)):
        assert taken[name] == value, name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_holds_nothing_that_is_a_default(path: Path) -> None:
    settings = settings_in(path)
    options = settings.pop("method_options", {})
    defaults = dict(leaves(asdict(TrainConfig())))
    same = {name for name, value in leaves(settings) if value == defaults[name]}
    assert same == SPELLED_OUT.get(path.name, set())
    method = asdict(METHODS[settings.get("method", defaults["method"])]())
    assert {name for name, value in options.items() if value == method[name]} == set()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_where_it_is_from(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_gives_perturbations_parameters_that_they_take(path: Path) -> None:
    config = parsed(path)
    image = Image.new("RGB", (40, 30), "white")
    for view in build(config.method, config.method_options).views:
        for name, parameters in view.perturbations.items():
            assert perturb(image, name, 0, **parameters).size == image.size


@pytest.mark.parametrize("size", ["3b", "7b"])
@pytest.mark.parametrize("data", ["virl39k", "geometry3k"])
def test_the_synchronous_configs_hold_the_published_settings(size: str, data: str) -> None:
    [path] = [path for path in CONFIGS if path.stem == f"cppo-qwen2.5-vl-{size}-{data}"]
    config = parsed(path)
    method = asdict(build(config.method, config.method_options))
    assert (config.rollout.prompts, config.rollout.responses) == (512, 5)
    assert (config.policy.max_prompt_tokens, config.rollout.max_new_tokens) == (512, 4096)
    assert (config.optimizer.mini_batch_prompts, config.optimizer.learning_rate) == (64, 1e-6)
    assert (config.optimizer.max_grad_norm, config.rollout.temperature) == (1.0, 1.0)
    published = {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "reference_kl": 0.01,
        "average_over": "micro-batch",
        "weight": 0.01,
        "contrast_temperature": 0.1,
        "divergence": "k3",
        "fraction": 0.5,
        "count": "floor",
        "ties": "keep",
        "draw": "image",
    }
    assert {name: method[name] for name in published} == published
    assert sorted(method["preserving"]) == ["colour_jitter", "perspective", "rotation"]
    assert sorted(method["removing"]) == ["occlusion", "zoom_crop"]


@pytest.mark.parametrize(("data", "side"), [("virl39k", 320), ("geometry3k", 448)])
def test_the_asynchronous_configs_hold_the_published_settings(data: str, side: int) -> None:
    [path] = [path for path in CONFIGS if path.stem == f"cppo-areal-qwen2.5-vl-3b-{data}"]
    config = parsed(path)
    method = asdict(build(config.method, config.method_options))
    assert (config.rollout.prompts, config.rollout.responses) == (32, 4)
    assert (config.policy.max_pixels, config.rollout.max_new_tokens) == (side**2, 512)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (2e-6, 0.01)
    published = {
        "clip_low": 0.4,
        "clip_high": 0.4,
        "reference_kl": 0.0,
        "batch_normalize": True,
        "divergence": "k1",
        "count": "ceil",
        "ties": "cut",
        "draw": "item",
    }
    assert {name: method[name] for name in published} == published
    assert "gaussian_blur" in method["preserving"]


def test_papos_configs_hold_the_published_settings() -> None:
    # By size and form: gamma, both etas, upper clip, reference KL.
    published = {
        "papo-qwen2.5-vl-3b": (0.02, 0.0, 0.3, 0.01),
        "papo-qwen2.5-vl-7b": (0.02, 0.05, 0.3, 0.01),
        "papo-dapo-qwen2.5-vl-3b": (0.01, 0.03, 0.28, 0.0),
        "papo-dapo-qwen2.5-vl-7b": (0.01, 0.03, 0.28, 0.0),
    }
    for name, (gamma, eta, clip_high, reference_kl) in published.items():
        [path] = [path for path in CONFIGS if path.stem == f"{name}-virl39k"]
        config = parsed(path)
        method = build(config.method, config.method_options)
        assert isinstance(method, PAPO)
        assert method.weight == gamma
        assert method.entropy_weight == method.masked_entropy_weight == eta
        assert (method.clip_high, method.reference_kl) == (clip_high, reference_kl)
        assert method.resample == ("dapo" in name)
        assert not method.learns_masked


def test_the_configs_of_vppo_and_pgpo_hold_the_published_settings() -> None:
    for name, responses, kind in (
        ("vppo-qwen2.5-vl-7b", 8, VPPO),
        ("pgpo-qwen2.5-vl-3b", 5, PGPO),
        ("pgpo-qwen2.5-vl-7b", 5, PGPO),
    ):
        [path] = [path for path in CONFIGS if path.stem == f"{name}-virl39k"]
        config = parsed(path)
        method = build(config.method, config.method_options)
        assert isinstance(method, kind)
        assert (method.clip_low, method.clip_high, method.resample) == (0.2, 0.28, True)
        assert (config.rollout.prompts, config.rollout.responses) == (384, responses)
        assert (config.optimizer.mini_batch_prompts, config.optimizer.learning_rate) == (128, 1e-6)
        assert config.rollout.max_new_tokens == 2048
        assert config.rollout.top_p == 0.99


# A step of each, on a small model and a few rows.


def write_rows(path: Path, config: TrainConfig) -> None:
    """Rows under the config's own names of columns."""
    columns = config.dataset
    rows = []
    for number in range(12):
        file = io.BytesIO()
        picture = Image.radial_gradient("L").resize((60 + number, 50)).convert("RGB")
        picture.paste((20 * number, 90, 160), (5, 5, 25, 25))
        picture.save(file, "PNG")
        row: dict[str, Any] = {
            columns.images: [{"bytes": file.getvalue(), "path": None}],
            columns.question: f"<image>What is right of shape {number}?",
            columns.answer: str(number),
        }
        if columns.kind:
            row[columns.kind] = f"kind {number % 2}"
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path)


def cut_down(config: TrainConfig, model: Path, data: str) -> TrainConfig:
    return replace(
        config,
        model=str(model),
        data=data,
        reward="reward_of_a_dry_run:by_hash",
        steps=1,
        backend="cpu",
        samples_every=1,
        dataset=replace(config.dataset, eval_share=0.3),
        rollout=replace(config.rollout, prompts=2, responses=2, max_new_tokens=8),
        optimizer=replace(
            config.optimizer,
            mini_batch_prompts=min(config.optimizer.mini_batch_prompts, 1),
            tokens_per_micro_batch=300,
        ),
        evaluation=replace(config.evaluation, items=2, items_during=1, k=1),
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains(
    path: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_of_a_dry_run.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    config = parsed(path)
    data = "builtin"
    if config.data != "builtin":
        data = str(tmp_path / "rows.parquet")
        write_rows(Path(data), config)
    config = cut_down(config, tiny_folder, data)
    trainer = Trainer(config, tmp_path / "run")
    try:
        summary = trainer.train()
    finally:
        trainer.close()
    assert (summary["finished"], summary["steps"], summary["reward_failures"]) == (True, 1, {})

    [metrics] = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert metrics["kept_groups"] == 2
    assert metrics["skipped"] == 0
    assert metrics["grad_norm"] > 0
    method = build(config.method, config.method_options)
    wanted = {"policy", *(["reference_kl"] if method.reference_kl else [])}
    if isinstance(method, CPPO):
        wanted.add("perception")
        assert metrics["perception_tokens"] >= 1
    if isinstance(method, PAPO):
        wanted |= {"masked_divergence", *(["masked_entropy"] if method.entropy_weight else [])}
    if isinstance(method, PAPO | VPPO) and method.entropy_weight:
        wanted.add("entropy")
    assert {name for name in metrics if name.startswith("loss/")} == {f"loss/{n}" for n in wanted}
    assert all(value is not None and math.isfinite(value) for value in metrics.values())
    assert trainer.policy.has_adapters == (config.policy.lora_rank > 0)

    before, after = weights_in(tiny_folder), weights_in(tmp_path / "run/model")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("visual" in name for name in changed)
    assert any("language_model" in name or "layers" in name for name in changed)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
