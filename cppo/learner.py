"""What becomes of a rollout: all optimizer steps on it, and the state that they go on from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cppo.config import OptimizerConfig, TrainConfig
from cppo.device import Backend
from cppo.methods import GRPO
from cppo.policy import Policy, Scorer
from cppo.policy.loading import frozen_copy
from cppo.processes import Processes
from cppo.samples import Sample
from cppo.update import Updater


class Diverged(RuntimeError):  # noqa: N818 - named for what happened
    """Too many steps in a row whose loss or gradient was not finite."""


class Learner:
    """Learns with one method from the samples of one rollout after another."""

    def __init__(
        self,
        policy: Policy,
        method: GRPO,
        config: TrainConfig,
        *,
        backend: Backend,
        processes: Processes,
    ) -> None:
        settings, rollout = config.optimizer, config.rollout
        self._policy, self._method, self._config = policy, method, config
        self._processes = processes
        scorer = Scorer(policy, backend, temperature=rollout.temperature)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in scorer.parameters() if parameter.requires_grad],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            # Not foreach, which would hold a copy of all weights for a moment; nor fused, which
            # does not count parameters' versions, that features of pictures are known by.
            foreach=False,
        )
        self.reference: Scorer | None = None
        if method.reference_kl and not policy.has_adapters:
            frozen = frozen_copy(policy)
            self.reference = Scorer(frozen, backend, temperature=rollout.temperature)
        self.scorer = processes.wrap(scorer)
        self._updater = Updater(
            scorer=self.scorer,
            optimizer=self.optimizer,
            method=method,
            processes=processes,
            tokens_per_micro_batch=settings.tokens_per_micro_batch,
            max_grad_norm=settings.max_grad_norm,
            max_new_tokens=rollout.max_new_tokens,
            count_tokens=policy.count_tokens,
        )
        self.bad_steps = 0  # in a row

    def learn(
        self, by_group: Sequence[Sequence[Sample]], idle: Sample, step: int
    ) -> dict[str, float]:
        """All optimizer steps on one rollout; metrics are their means.

        `by_group` are this process's samples, `idle` stands in where it has none for an optimizer
        step that others take. Raises Diverged.
        """
        settings, prompts = self._config.optimizer, self._config.rollout.prompts
        mini_batches = math.ceil(prompts / (settings.mini_batch_prompts or prompts))
        by_group = self._with_known_logprobs(
            by_group, idle, stale=mini_batches * settings.epochs > 1
        )
        rate = learning_rate(settings, step, self._config.steps)
        progress = (step - 1) / self._config.steps
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        updates: list[dict[str, float]] = []
        order = torch.Generator()
        for epoch in range(settings.epochs):
            order.manual_seed(self._config.seed + 1_000_003 * step + epoch)
            shuffled = torch.randperm(len(by_group), generator=order).tolist()
            for number in range(mini_batches):
                chosen = [by_group[i] for i in shuffled[number::mini_batches]]
                batch = [sample for group in chosen for sample in group]
                update = self._updater.step(batch or [idle], progress=progress)
                if self._policy.sight:  # what the tower made of pictures is out of date
                    self._policy.features.clear()
                if update:
                    updates.append(update)
                    self._mind(update, step)
        names = updates[0] if updates else {}
        means = {name: sum(u[name] for u in updates) / len(updates) for name in names}
        return {**means, "learning_rate": rate}

    def save(self, folder: Path) -> None:
        """Writes weights and the optimizer's state. The weights are what training changes, and no
        more: beneath adapters they stay as loaded."""
        model = self._policy.model
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        weights = {name: w for name, w in model.state_dict().items() if name in trained}
        torch.save(weights, folder / "weights.pt")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def restore(self, folder: Path) -> None:
        """Goes on from what `save` wrote, under the settings that are given now."""
        weights = torch.load(folder / "weights.pt", map_location="cpu")
        self._policy.model.load_state_dict(weights, strict=False)
        optimizer = torch.load(folder / "optimizer.pt", map_location="cpu")
        settings = self.optimizer.param_groups
        for group, given in zip(optimizer["param_groups"], settings, strict=True):
            group.update({name: given[name] for name in ("betas", "weight_decay", "foreach")})
        self.optimizer.load_state_dict(optimizer)

    def _with_known_logprobs(
        self, by_group: Sequence[Sequence[Sample]], idle: Sample, *, stale: bool
    ) -> list[list[Sample]]:
        """Adds the sampling policy's log-probabilities where it will have moved, and the
        reference's where the method holds on to it."""
        samples = [sample for group in by_group for sample in group]
        mattering = [sample for sample in samples if self._updater.matters(sample)]
        if not any(self._processes.gather([bool(mattering)])):
            return [list(group) for group in by_group]
        known: dict[str, list[Any]] = {}
        scored = mattering or [idle]  # every process takes part in each pass
        if stale:
            known["old_logprobs"] = self._updater.score_without_gradient(scored)
        if self._method.reference_kl:
            adapters = self.reference is None
            with self._policy.without_adapters() if adapters else nullcontext():
                known["reference_logprobs"] = self._updater.score_without_gradient(
                    scored, self.reference
                )
        knowing = {
            id(sample): replace(sample, **{name: values[i] for name, values in known.items()})
            for i, sample in enumerate(mattering)
        }
        return [[knowing.get(id(sample), sample) for sample in group] for group in by_group]

    def _mind(self, update: dict[str, float], step: int) -> None:
        """Stops a run whose steps have stopped being finite, not by too high a loss scale."""
        bad = update["skipped"] and self._processes.loss_scale <= 1
        self.bad_steps = self.bad_steps + 1 if bad else 0
        limit = self._config.optimizer.max_bad_steps
        if self.bad_steps >= limit:
            raise Diverged(
                f"{limit} steps in a row had a loss or gradient that is not finite (at step "
                f"{step}; the last gradient norm was {update['grad_norm']}). They left the weights "
                "alone. Lower optimizer.learning_rate, or use --precision float32"
            )


def learning_rate(settings: OptimizerConfig, step: int, steps: int) -> float:
    """The rate at a step, counted from 1: linear warm-up, then constant, linear or cosine decay."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    done = (step - 1 - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }
    return settings.learning_rate * decay[settings.schedule]
