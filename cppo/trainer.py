"""The training loop: collect, score, update; with evaluation, checkpoints and a log around it.

Processes agree on the prompts of a step, and each has its share of them. What is random depends on
the seed, the step and the process alone, so that a resumed run goes on exactly as it would have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cppo import checkpoint
from cppo.collect import Collector, Encoder, Group
from cppo.config import TrainConfig, check
from cppo.console import Console, StopRequest, percent, points
from cppo.data import Feed, SkipLedger
from cppo.device import choose, resolve_attention, resolve_precision
from cppo.evaluation.metrics import Estimate, avg_at_k, paired_difference
from cppo.evaluation.run import Outcome, Questions, evaluate
from cppo.learner import Diverged, Learner
from cppo.methods import GRPO, build
from cppo.policy import Policy, save
from cppo.processes import Processes
from cppo.report.samples import describe
from cppo.reward import SECOND_LOOKS, Grader, SecondLook, final_answer
from cppo.rollout import Sampling
from cppo.run_folder import RunFolder, claim
from cppo.samples import Sample
from cppo.sources import open_data, open_policy

logger = logging.getLogger(__name__)


class Trainer:
    """One run, from its settings to its summary. `after_step` is told each step's metrics."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path | None = None,
        *,
        resume: bool = False,
        after_step: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    ) -> None:
        """`folder` None makes a new one under runs/, named after the time, method and model."""
        check(config)
        self.config = config
        self._tell = after_step
        self._open = contextlib.ExitStack()
        try:
            self._set_up(folder, resume)
        except BaseException:  # no process, and no lock on the folder, is left behind
            self.close()
            raise

    def _set_up(self, folder: Path | None, resume: bool) -> None:
        """What is cheap to refuse comes before the model is loaded."""
        config = self.config
        self.method = build(config.method, config.method_options)
        self.look = _second_look(config, self.method)
        if config.deterministic:
            torch.use_deterministic_algorithms(True)  # before the backend prepares its device
        self.backend = choose(config.backend)
        precision = resolve_precision(self.backend, config.precision)
        attention = resolve_attention(self.backend, config.attention, precision=precision)
        self.processes = Processes(
            self.backend, precision, timeout_seconds=60 * config.timeout_minutes
        )
        self._open.callback(self.processes.close)
        rank, world, main = self.processes.rank, self.processes.world, self.processes.main
        if config.rollout.prompts % world:
            raise ValueError(
                f"rollout.prompts is {config.rollout.prompts}; "
                f"it must be a multiple of the {world} processes"
            )
        self.console = Console(active=main)
        train, held_out = (open_data(config.data, config.dataset, s) for s in ("train", "eval"))
        self.grader = Grader(
            config.reward if self.look is None else self.look.spec,
            timeout_seconds=config.rewards.timeout_seconds,
            workers=config.rewards.workers,
        )
        self._open.callback(self.grader.close)
        if folder is None:
            made = [claim(config.method, config.model)] if main else []
            (folder,) = self.processes.gather(made)
        self.folder = RunFolder(folder, active=main)
        self._open.callback(self.folder.close)
        with self.processes.main_first():
            self.policy: Policy = open_policy(
                config.model,
                config.policy,
                difficulty=config.dataset.difficulty,
                precision=precision,
                attention=attention,
                device=self.processes.device,
                console=self.console,
                training=True,
            )
        self.ledger = SkipLedger(
            self.folder.skipped if main else None, max_share=config.dataset.max_skipped_share
        )
        instruction = config.dataset.instruction
        if instruction is None and self.look is not None:
            instruction = self.look.instruction
        self.encoder = Encoder(
            self.policy, instruction=instruction, max_tokens=config.policy.max_prompt_tokens
        )
        self.feed = Feed(
            train,
            self.ledger,
            seed=config.seed,
            check=self.encoder.check,
            rank=rank,
            world=world,
            gather=self.processes.gather,
        )
        self.learner = Learner(
            self.policy, self.method, config, backend=self.backend, processes=self.processes
        )
        self.collector = Collector(
            policy=self.policy,
            method=self.method,
            feed=self.feed,
            encoder=self.encoder,
            grader=self.grader,
            settings=config.rollout,
            steps=config.steps,
            seed=config.seed,
            rank=rank,
            world=world,
            gather=self.processes.gather,
        )
        self.questions = Questions(
            held_out, self.encoder, self.ledger, count=config.evaluation.items
        )
        self.step = 0
        self.before: list[list[float]] | None = None
        self.feed_state = self.feed.state()
        if resume:
            self._resume()
        settings = dataclasses.asdict(config)
        settings["method_options"] = dataclasses.asdict(self.method)
        self.folder.write_config(settings)

    # --- the loop ----------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Evaluates, trains, evaluates; returns what `summary.json` holds."""
        started, steps = time.monotonic(), self.config.steps
        stop = StopRequest()
        with stop.listening():
            if self.before is None:
                self.before = self._evaluate(len(self.questions), "before").accuracies
            with self.console.progress("training", steps) as show:
                while self.step < steps and not self._anyone(stop.signal > 0):
                    metrics = self._train_step(self.step + 1)
                    self.step += 1
                    self.feed_state = self.feed.state()
                    self.folder.log_metrics(self.step, metrics)
                    self._tell(self.step, metrics)
                    show(
                        self.step,
                        f"accuracy {metrics['accuracy']:.2f}  reward {metrics['reward']:.2f}",
                    )
                    self._after_step()
            self._write_checkpoint()
            if self.processes.main:
                save(self.policy, self.folder.model)
            finished = self.step >= steps
            summary: dict[str, Any] = {
                "steps": self.step,
                "finished": finished,
                "stopped_by": 0 if finished else max(self.processes.gather([stop.signal])),
            }
            if finished:
                after = self._evaluate(len(self.questions), "after")
                summary |= self._compare(after)
        summary |= {
            "seconds": time.monotonic() - started,
            "skipped_rows": self.ledger.summary(),
            "reward_failures": dict(sum(self.processes.gather([self.grader.failures]), Counter())),
            "run_folder": self.folder.path,
        }
        self.folder.write_summary(summary)
        return summary

    def close(self) -> None:
        """Ends the reward's processes, leaves the others, and lets go of the run folder."""
        self._open.close()

    def _train_step(self, step: int) -> dict[str, float]:
        seconds: dict[str, float] = {}
        self.backend.memory.reset_peak()
        with _timed(seconds, "rollout_seconds"):
            groups = self.collector.collect(step)
        if self.backend.device != "cpu":
            # What the rollout held has other sizes than what follows. The CPU's allocator joins it.
            self.backend.memory.release()
        # Where groups without spread are replaced, those that are left over are no part of a batch.
        batch = [g for g in groups if not self.method.resample or g.teaches(self.method)]
        with _timed(seconds, "views_seconds"):
            by_group = [self.collector.samples(group, step) for group in batch]
        if self.config.samples_every and step % self.config.samples_every == 0:
            records = describe(
                self.policy,
                self.learner.scorer,
                self.method,
                groups[0],
                seed=self.config.seed,
                step=step,
            )
            self.folder.log_samples(records)
        with _timed(seconds, "update_seconds"):
            metrics = self._update(groups, by_group, step)
        metrics["peak_memory_gib"] = self.backend.memory.peak_bytes() / 2**30
        return {**self._rollout_metrics(groups), **metrics, **seconds}

    def _update(
        self, groups: Sequence[Group], by_group: list[list[Sample]], step: int
    ) -> dict[str, float]:
        """All optimizer steps on one rollout; metrics are their means."""
        first = groups[0]
        idle = Sample(prompt=first.prompt, ids=first.responses[0].ids, advantage=0.0, idle=True)
        try:
            metrics = self.learner.learn(by_group, idle, step)
        except Diverged as error:
            self._write_checkpoint()
            raise Diverged(
                f"{error}, or look for bad values in {self.folder.path / 'metrics.jsonl'}. The "
                f"weights are saved under {self.folder.checkpoints}."
            ) from error
        kept = sum(self.processes.gather([group.teaches(self.method) for group in groups]))
        if kept == 0 and self.processes.main:
            what = "accuracy, which is what counts where groups are resampled"
            logger.warning(
                "step %d teaches nothing: in each group, all responses have the same %s",
                *(step, what if self.method.resample else "reward"),
            )
        return {**metrics, "kept_groups": float(kept)}

    def _after_step(self) -> None:
        evaluation, every = self.config.evaluation, self.config.checkpoint_every
        if evaluation.every and self.step % evaluation.every == 0 and self.step < self.config.steps:
            self._evaluate(evaluation.items_during, f"step {self.step}")
        if every and self.step % every == 0 and self.step < self.config.steps:
            self._write_checkpoint()

    # --- evaluation --------------------------------------------------------------------------

    def _evaluate(self, count: int, name: str) -> Outcome:
        """On the first `count` of the held-out items."""
        settings, processes = self.config.evaluation, self.processes
        sampling = Sampling(
            responses=settings.k,
            max_new_tokens=self.config.rollout.max_new_tokens,
            temperature=settings.temperature,
            batch_responses=self.config.rollout.batch_responses,
            compile=self.config.rollout.compile,
        )
        count = min(count, len(self.questions))
        share = _contiguous(count, processes.rank, processes.world)
        with self.console.progress("evaluation", len(share)) as show:
            own = evaluate(
                self.policy,
                self.questions.part(share),
                self.grader,
                sampling,
                seed=self.config.seed,
                final=final_answer if self.look is None else self.look.final,
                progress=show,
            )
        outcome = Outcome.joined(self.processes.gather([own]))
        results = outcome.summary()
        note = "  ".join(f"{metric} {percent(value)}" for metric, value in results.items())
        self.console.say(f"{name}: {note}  ({count} held-out items)")
        record, kinds = (
            {n: dataclasses.asdict(estimate) for n, estimate in estimates.items()}
            for estimates in (results, outcome.kind_summary())
        )
        self.folder.log_evaluation(
            self.step, {"name": name, "items": count, **record, "kinds": kinds}
        )
        return outcome

    def _compare(self, after: Outcome) -> dict[str, Any]:
        assert self.before is not None
        k = self.config.evaluation.k
        difference = paired_difference(self.before, after.accuracies)
        first = avg_at_k(self.before)
        last = after.summary()[f"avg@{k}"]
        rows = [("before", percent(first)), ("after", percent(last))]
        rows.append(("difference", points(difference)))
        self.console.table(f"avg@{k} on {len(self.questions)} held-out items", ("", "95 %"), rows)
        named: dict[str, Estimate] = {"before": first, "after": last, "difference": difference}
        return {name: dataclasses.asdict(estimate) for name, estimate in named.items()}

    # --- checkpoints -------------------------------------------------------------------------

    def _write_checkpoint(self) -> None:
        state = {
            "feed": self.feed_state,
            "before": self.before,
            "bad_steps": self.learner.bad_steps,
            "processes": self.processes.state(),
        }

        if self.processes.main:
            checkpoint.write(self.folder.checkpoints, self.step, state, self.learner.save)
        self.processes.gather([])  # nobody goes on, and perhaps ends, before it is written

    def _resume(self) -> None:
        found = checkpoint.newest(self.folder.checkpoints)
        if found is None:
            raise ValueError(
                f"{self.folder.path} has no whole checkpoint to resume from: start anew, with "
                "another --output"
            )
        self.learner.restore(found.folder)
        self.processes.restore(found.state["processes"])
        self.step, self.before = found.step, found.state["before"]
        self.learner.bad_steps = found.state["bad_steps"]
        self.feed_state = dict(found.state["feed"])
        if self.before is not None and len(self.before) != len(self.questions):
            raise ValueError(
                f"{self.folder.path} was evaluated on {len(self.before)} items before training, "
                f"which {len(self.questions)} cannot be compared with: leave evaluation.items as "
                "it was"
            )
        self.feed.restore(self.feed_state)
        self.folder.rewind(self.step)
        self.console.say(f"resuming {self.folder.path} after step {self.step}")

    # --- processes ---------------------------------------------------------------------------

    def _anyone(self, condition: bool) -> bool:
        return any(self.processes.gather([condition]))

    def _rollout_metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        rows = [
            (
                *(reward.total, reward.accuracy, reward.format, reward.second_look),
                *(len(r.ids), not r.finished, a > 0),
            )
            for group in groups
            for reward, r, a in zip(group.rewards, group.responses, group.advantages, strict=True)
        ]
        means = torch.tensor(self.processes.gather(rows), dtype=torch.float64).mean(0).tolist()
        earned = ("reward", "accuracy", "format", "second_look_accuracy")
        names = (*earned, "response_tokens", "cut_off", "positive")
        metrics = dict(zip(names, means, strict=True))
        if self.look is None:
            del metrics["second_look_accuracy"]
        return metrics


def _second_look(config: TrainConfig, method: GRPO) -> SecondLook | None:
    """The method's own reward, if it has one; ValueError where there is to be another."""
    if method.second_look is None:
        return None
    if config.reward != "default":
        raise ValueError(
            f"reward is {config.reward!r}, but method {config.method!r} has a reward of its own, "
            "for what the policy answers without the image: leave reward at 'default', or take "
            "another method"
        )
    return SECOND_LOOKS[method.second_look]


def _contiguous(count: int, rank: int, world: int) -> range:
    return range(count * rank // world, count * (rank + 1) // world)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
