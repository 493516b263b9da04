"""What a step computes, counted by hooks: nothing is done twice for one version of the policy.

Counted are pictures through the image processor and through the vision tower, tokens through the
language model, and tokens projected to the vocabulary, each in the rollout and in the update.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BACKEND
from torch import Tensor

from cppo.config import (
    EvaluationConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    TrainConfig,
)
from cppo.samples import Sample
from cppo.trainer import Trainer

PROMPTS, RESPONSES = 2, 4


def reward_parity(response: str, answer: str, question: str) -> float:
    """Better or worse by chance, and the same for the same words."""
    return float(sum(response.encode()) % 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What one step passed through, and what it had to."""

    rollout: Counter[str]
    update: Counter[str]
    samples: list[Sample]
    perception: int  # tokens that the plan chose

    @property
    def mattering(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.advantage]

    @property
    def positive(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.advantage > 0]


def tokens_of(samples: list[Sample], *, blind: bool = False) -> int:
    """Each prompt once, and each response."""
    prompts = {id(s.prompt): s.prompt for s in samples}.values()
    hidden = sum(int(prompt.image_mask.sum()) for prompt in prompts) if blind else 0
    return sum(len(p.ids) for p in prompts) - hidden + responses_of(samples)


def responses_of(samples: list[Sample]) -> int:
    return sum(len(sample.ids) for sample in samples)


def pictures_of(samples: list[Sample]) -> int:
    return len({id(sample.prompt) for sample in samples})


@pytest.fixture
def count(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the first training step of a config with these changes."""
    monkeypatch.chdir(Path(__file__).parent)

    def run(
        method: str,
        *,
        frozen: bool = False,
        tokens: int = 100_000,
        options: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Counts:
        settings = TrainConfig(
            model=str(tiny_folder),
            data="builtin",
            reward="test_once:reward_parity",
            method=method,
            method_options=options or {},
            steps=1,
            backend=os.environ[BACKEND],
            checkpoint_every=0,
            policy=PolicyConfig(max_prompt_tokens=600, freeze_vision=frozen),
            rollout=RolloutConfig(prompts=PROMPTS, responses=RESPONSES, max_new_tokens=12),
            optimizer=OptimizerConfig(tokens_per_micro_batch=tokens, **changes),
            evaluation=EvaluationConfig(items=1, every=0, items_during=1, k=1),
        )
        trainer = Trainer(settings, tmp_path)
        try:
            with counting(trainer, monkeypatch) as counts:
                groups = trainer.collector.collect(1)
                rollout = Counter(counts)
                counts.clear()
                by_group = [trainer.collector.samples(group, 1) for group in groups]
                metrics = trainer._update(groups, by_group, 1)
        finally:
            trainer.close()
        samples = [sample for group in by_group for sample in group]
        found = Counts(
            rollout=rollout,
            update=Counter(counts),
            samples=samples,
            perception=int(metrics.get("perception_tokens", 0)),
        )
        assert 0 < len(found.positive) < len(found.mattering)  # there is something to leave out
        return found

    return run


@contextlib.contextmanager
def counting(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    policy = trainer.policy
    process, project = policy.family.pixels, trainer.backend.token_statistics

    def processed(images: Any) -> Any:
        counts["processed"] += len(images)
        return process(images)

    def projected(hidden: Tensor, *given: Any, **named: Any) -> Any:
        counts["projected"] += len(hidden)
        return project(hidden, *given, **named)

    def seen(_: Any, given: Any, named: dict[str, Any]) -> None:
        counts["seen"] += len(named["grid_thw"])

    def read(_: Any, given: Any, named: dict[str, Any]) -> None:
        hidden = given[0] if given else named["hidden_states"]
        sampled = hidden.shape[1] == 1  # token by token
        counts["sampled" if sampled else "read"] += hidden.shape[0] * hidden.shape[1]

    monkeypatch.setattr(policy.family, "pixels", processed)
    backend = dataclasses.replace(trainer.backend, token_statistics=projected)
    learner = trainer.learner
    for scorer in {id(s): s for s in (learner.scorer, learner.reference) if s}.values():
        monkeypatch.setattr(getattr(scorer, "module", scorer), "_backend", backend)
    hooks = [
        policy.base.model.visual.register_forward_pre_hook(seen, with_kwargs=True),
        policy.language.layers[0].register_forward_pre_hook(read, with_kwargs=True),
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def test_a_rollout_reads_each_prompt_and_picture_once(count: Any) -> None:
    found = count("grpo")
    assert found.rollout["processed"] == PROMPTS
    assert found.rollout["seen"] == PROMPTS
    assert found.rollout["read"] == tokens_of(found.samples) - responses_of(found.samples)
    assert found.rollout["sampled"] == responses_of(found.samples) - len(found.samples)


def test_an_update_without_views_is_one_pass_over_what_the_loss_depends_on(count: Any) -> None:
    """Its own first pass gives the old log-probabilities."""
    found = count("grpo")
    mattering = found.mattering
    assert found.update["processed"] == 0
    assert found.update["seen"] == pictures_of(mattering)
    assert found.update["read"] == tokens_of(mattering)
    assert found.update["projected"] == responses_of(mattering)


def test_views_are_processed_seen_and_read_once_for_positive_responses(count: Any) -> None:
    found = count("cppo")
    mattering, positive = found.mattering, found.positive
    assert found.update["processed"] == 2 * pictures_of(positive)
    assert found.update["seen"] == pictures_of(mattering) + 2 * pictures_of(positive)
    assert found.update["read"] == tokens_of(mattering) + 2 * tokens_of(positive)
    # Of the preserving view, which detects nothing, only the perception tokens.
    whole = responses_of(mattering) + responses_of(positive)
    assert found.update["projected"] == whole + found.perception
    assert 0 < found.perception < responses_of(positive)


def test_a_frozen_tower_sees_no_picture_again_that_it_saw_in_the_rollout(count: Any) -> None:
    found = count("cppo", frozen=True)
    assert found.rollout["seen"] == PROMPTS
    assert found.update["seen"] == 2 * pictures_of(found.positive)


def test_a_blind_view_costs_no_picture_and_no_image_tokens(count: Any) -> None:
    """It is scored before the loss, and without gradient, by itself."""
    found = count("pgpo")
    mattering = found.mattering
    assert found.update["processed"] == 0
    assert found.update["seen"] == pictures_of(mattering)
    assert found.update["read"] == tokens_of(mattering) + tokens_of(mattering, blind=True)
    assert found.update["projected"] == 2 * responses_of(mattering)


@pytest.mark.parametrize(
    ("method", "options", "passes"),
    [  # how often what matters, what is better, and everything is read
        ("cppo", {"gate": False}, (0, 0, 3)),
        ("cppo", {"removing_views": 2}, (1, 3, 0)),
        ("cppo", {"stop_gradient": ["removed"]}, (1, 2, 0)),
        ("cppo", {"stop_gradient": ["preserved"]}, (1, 2, 0)),
        ("vppo", {}, (2, 0, 0)),
        ("papo", {"learns_masked": True, "reference_kl": 0.0}, (0, 0, 2)),
        ("dvrp", {}, (0, 0, 3)),
        ("dvrp", {"masked_weight": 0.0, "view_entropy_weight": 0.0}, (0, 0, 2)),
        ("noisy_rollout", {}, (1, 0, 0)),
    ],
)
def test_an_option_costs_the_passes_that_its_loss_needs(
    count: Any, method: str, options: dict[str, Any], passes: tuple[int, int, int]
) -> None:
    found = count(method, options=options)
    parts = (found.mattering, found.positive, found.samples)
    for counted, part in (("read", tokens_of), ("seen", pictures_of)):
        expected = sum(n * part(samples) for n, samples in zip(passes, parts, strict=True))
        assert found.update[counted] == expected, counted


@pytest.mark.parametrize("tokens", [100_000, 1])
def test_a_constant_view_that_detects_nothing_is_projected_where_the_loss_reads_it(
    count: Any, tokens: int
) -> None:
    found = count("cppo", tokens=tokens, options={"stop_gradient": ["preserved"]})
    mattering, positive = responses_of(found.mattering), responses_of(found.positive)
    assert 0 < found.perception < positive
    learnt = positive + found.perception if tokens > 1 else 2 * positive + 2 * found.perception
    assert found.update["projected"] == mattering + learnt


def test_a_constant_view_that_no_plan_reads_is_scored_alone(count: Any) -> None:
    found = count("papo", frozen=True)
    everything = found.samples  # the divergences are of all responses
    assert found.update["seen"] == pictures_of(everything)  # masked; as it is in the rollout
    assert found.update["read"] == 2 * tokens_of(everything)


def test_several_steps_on_a_rollout_cost_one_pass_more_for_the_old_logprobs(count: Any) -> None:
    found = count("grpo", mini_batch_prompts=1, epochs=2)
    assert found.update["read"] == 3 * tokens_of(found.mattering)
    assert found.update["projected"] == 3 * responses_of(found.mattering)
    assert found.update["seen"] == 2 * pictures_of(found.mattering)  # the rollout's serve the first


def test_several_micro_batches_cost_a_pass_more_over_what_detects_and_no_other(count: Any) -> None:
    """What the average divides by must be known before the first gradient."""
    found = count("cppo", tokens=1)
    mattering, positive = found.mattering, found.positive

    def apart(samples: list[Sample]) -> int:  # each sample is a micro-batch
        return sum(tokens_of([sample]) for sample in samples)

    assert found.update["read"] == apart(mattering) + 2 * apart(positive) + 2 * apart(positive)
    # The image as it is was seen in the rollout; without gradient, what removes it is new, once.
    learnt = len(mattering) + 2 * len(positive)
    assert found.update["seen"] == pictures_of(positive) + learnt
    assert found.update["processed"] == 2 * pictures_of(positive)
    # First what detects; then what the loss reads, which is known.
    detecting = 2 * responses_of(positive)
    assert found.update["projected"] == detecting + responses_of(mattering) + 2 * found.perception


def test_averages_of_micro_batches_alone_need_no_pass_more(count: Any) -> None:
    found = count("cppo", tokens=1, options={"average_over": "micro-batch"})
    alone = sum(tokens_of([sample]) for sample in found.samples)  # all have a part in an average
    views = sum(tokens_of([sample]) for sample in found.positive)
    assert found.update["read"] == alone + 2 * views


def test_weights_that_are_a_responses_own_need_no_pass_more(count: Any) -> None:
    found = count("pgpo", tokens=1)
    mattering = found.mattering
    once = sum(tokens_of([sample]) + tokens_of([sample], blind=True) for sample in mattering)
    assert found.update["read"] == once


def test_a_filter_alone_compares_nothing_and_needs_no_pass_more(count: Any) -> None:
    found = count("vppo", tokens=1, options={"scale_low": 1.0})
    assert found.update["read"] == 2 * sum(tokens_of([sample]) for sample in found.mattering)


def test_responses_that_are_compared_are_all_looked_at_first(count: Any) -> None:
    """Though averages are of micro-batches alone; the masked view, which is constant, only then."""
    found = count("vppo", tokens=1, options={"average_over": "micro-batch"})
    alone = sum(tokens_of([sample]) for sample in found.samples)
    compared = sum(tokens_of([sample]) for sample in found.mattering)
    assert found.update["read"] == alone + 2 * compared
