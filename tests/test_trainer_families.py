"""The whole path with families other than the built-in policy's, on the CPU alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_family
from test_trainer import _own_reward_is_importable, config, weights, weights_of  # noqa: F401

from cppo.config import OptimizerConfig
from cppo.trainer import Trainer


@pytest.mark.parametrize(("family", "packs"), [("internvl", True), ("gemma3", False)])
def test_other_families_train_on_real_pictures_packed_or_padded(
    family: str, packs: bool, tokenizer: Any, tmp_path: Path, shared_data: Callable[[str], Path]
) -> None:
    folder = save_family(family, tmp_path / "model", tokenizer)
    settings = config(
        folder,
        method="cppo",
        data=str(shared_data("geometry3k-mini")),
        optimizer=OptimizerConfig(learning_rate=1e-3, tokens_per_micro_batch=1500),
    )
    trainer = Trainer(settings, tmp_path / "run")
    try:
        assert trainer.policy.packs is packs
        summary = trainer.train()
    finally:
        trainer.close()
    assert summary["steps"] == 2
    assert summary["skipped_rows"].startswith("0 of")
    before, after = weights_of(folder), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("vision_tower" in name for name in changed)
    assert any("language_model" in name for name in changed)
