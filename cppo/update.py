"""One optimizer step: score the samples' views, plan, and descend on the method's loss.

Every average runs over the global batch, whatever micro-batches and processes it is cut into: what
the averages divide by is known before the first backward pass. Where a method needs to see a view
before that, and there is more than one micro-batch, a first pass without gradient shows it:
processes may differ in what they score there, as data parallelism allows, and sharded weights do
not.

Shapes: B samples of this process, T response tokens (right-padded).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from cppo.methods import GRPO, Average, Plan, Scores, Tokens, View
from cppo.objective import aggregate, count_units
from cppo.policy import Row, packed_tokens
from cppo.processes import Processes
from cppo.samples import (
    AS_IT_IS,
    Sample,
    chosen_tokens,
    detached,
    flat,
    joined,
    on_views,
    rows_of,
    split,
    spread,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ahead:
    """What is known of a micro-batch before the pass with gradient."""

    plan: Plan
    constant: Mapping[str, Scores]  # of the views that detect without gradient


class Updater:
    """Takes optimizer steps for one method."""

    def __init__(
        self,
        *,
        scorer: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: GRPO,
        processes: Processes,
        tokens_per_micro_batch: int,
        max_grad_norm: float,
        max_new_tokens: int,
        count_tokens: Callable[[Sequence[Row]], int] = packed_tokens,
    ) -> None:
        self._scorer, self._optimizer, self._method = scorer, optimizer, method
        self._processes = processes
        self._budget, self._count_tokens = tokens_per_micro_batch, count_tokens
        self._max_grad_norm = max_grad_norm
        self._max_new_tokens = max_new_tokens
        self._progress = 0.0

    def step(self, samples: Sequence[Sample], *, progress: float = 0.0) -> dict[str, float]:
        """One optimizer step on the samples of all processes; returns metrics of the global batch.

        `progress` is the share of the training that is done, in [0, 1], for what changes with it.

        A non-finite loss or gradient leaves the weights alone; "skipped" is then 1. Samples that
        no term of the loss depends on are not scored; averages are over them too. Where there are
        no others in any process, there is no step, and nothing to report.
        """
        scored = [sample for sample in samples if self.matters(sample)]
        if not any(self._processes.gather([bool(scored)])):
            return {}
        self._progress = progress
        unscored = [sample for sample in samples if not (sample.idle or self.matters(sample))]
        views = self._method.views
        micro_batches = self._cut(scored or [replace(samples[0], idle=True)], views)
        plans_ahead = self._method.plans_ahead
        ahead = self._plan_ahead(micro_batches) if plans_ahead and len(micro_batches) > 1 else []
        # Where scores decide nothing that is counted, all is known without.
        unplanned = unscored if plans_ahead else [*itertools.chain(*micro_batches), *unscored]
        real = sum(any(not sample.idle for sample in batch) for batch in micro_batches)
        share = 1.0 / sum(self._processes.gather([real]))
        self._optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        finite = True
        denominators: dict[str, Tensor] | None = None
        for number, micro_batch in enumerate(micro_batches):
            last = number + 1 == len(micro_batches)
            with contextlib.nullcontext() if last else self._processes.no_sync(self._scorer):
                tokens, plan = self._learn(micro_batch, ahead[number] if ahead else None)
                if denominators is None:
                    plans = [a.plan for a in ahead] or [plan]
                    denominators = self._denominators(plans if plans_ahead else [], unplanned)
                loss = self._loss(tokens, plan, denominators, share, sums)
                finite = finite and bool(loss.isfinite())
                self._processes.backward(loss * self._processes.world)
        norm = self._processes.clip(self._optimizer, self._scorer.parameters(), self._max_grad_norm)
        skipped = not all(self._processes.gather([finite and bool(norm.isfinite())]))
        self._processes.step(self._optimizer, finite=not skipped)
        if skipped:
            self._optimizer.zero_grad()
        return {**self._means(sums), "grad_norm": float(norm), "skipped": float(skipped)}

    def matters(self, sample: Sample) -> bool:
        """Whether the loss depends on its scores: it is better or worse than its group, has views
        to be scored on, is to stay close to the reference policy, or has a part in a micro-batch's
        own average."""
        if sample.idle:
            return False
        method = self._method
        everywhere = method.reference_kl > 0 or method.average_over == "micro-batch"
        advantaged = not abs(sample.advantage) <= 1e-6  # NaN: broken, which is to show
        return everywhere or bool(sample.views) or (method.policy_term and advantaged)

    def score_without_gradient(
        self, samples: Sequence[Sample], scorer: nn.Module | None = None
    ) -> list[Tensor]:
        """Each sample's log-probabilities, (length,), under `scorer` or the policy as it is."""
        found: dict[int, Tensor] = {}
        with torch.no_grad():
            for micro_batch in self._cut(samples, ()):
                logprobs = (scorer or self._scorer)(flat(rows_of(micro_batch, ()))).logprobs.cpu()
                for sample, row in zip(micro_batch, logprobs, strict=True):
                    found[id(sample)] = row[: len(sample.ids)]
        return [found[id(sample)] for sample in samples]

    # --- pieces ------------------------------------------------------------------------------

    def _cut(self, samples: Sequence[Sample], views: Sequence[View]) -> list[list[Sample]]:
        """Micro-batches within the budget, groups whole where they fit; as many in every process,
        idle ones made up. Prompts of like lengths come together."""
        groups: dict[int, list[Sample]] = {}
        for sample in sorted(samples, key=lambda sample: len(sample.prompt.ids)):
            groups.setdefault(id(sample.prompt), []).append(sample)
        cut: list[list[Sample]] = []
        for group in groups.values():
            whole = self._cost(group, views) <= self._budget
            for part in [group] if whole else [[sample] for sample in group]:
                if cut and self._cost([*cut[-1], *part], views) <= self._budget:
                    cut[-1] += part
                else:
                    cut.append([*part])
        most = max(self._processes.gather([len(cut)]))
        shortest = min(samples, key=lambda sample: len(sample.prompt.ids) + len(sample.ids))
        idle = [replace(shortest, views={}, idle=True)]
        return cut + [idle] * (most - len(cut))

    def _cost(self, samples: Sequence[Sample], views: Sequence[View]) -> int:
        """What samples cost on their image and on the views they have."""
        return self._count_tokens(flat(rows_of(samples, views)))

    def _plan_ahead(self, micro_batches: Sequence[Sequence[Sample]]) -> list[_Ahead]:
        """Plans for the whole mini-batch at once; views that detect without gradient are scored
        here only.

        A plan reads the scores of samples that a detecting view is scored for, and of no others.
        """
        detecting = [view for view in self._method.views if view.detects]
        constant = [view.name for view in detecting if not view.gradient]
        scored = [self._score(batch, detecting, seen_beside=detecting) for batch in micro_batches]
        plans = split(self._method.plan(joined(scored)), scored)
        return [
            _Ahead(plan=plan, constant={name: tokens.views[name] for name in constant})
            for plan, tokens in zip(plans, scored, strict=True)
        ]

    def _learn(self, samples: Sequence[Sample], ahead: _Ahead | None) -> tuple[Tokens, Plan]:
        """The pass with gradient, and the plan: known ahead, or made on the way, of what it reads.

        Of a view that the plan does not read, only the tokens that it chose go on to the
        vocabulary.
        """
        learning = [view for view in self._method.views if view.gradient]
        later = [view for view in learning if view.read_on and (ahead or not view.detects)]
        rows = rows_of(samples, [view for view in learning if view not in later])
        chosen = on_views(samples, later, rows[AS_IT_IS])
        constant = dict(ahead.constant) if ahead else {}
        still = [v for v in self._method.views if not v.gradient and v.name not in constant]
        in_part = [view for view in still if view.read_on and not view.detects]
        constant |= self._constant(samples, [view for view in still if view not in in_part])
        plans = [ahead.plan] if ahead else []

        def tokens_of(scores: Scores) -> Tokens:
            tokens = self._tokens(samples, {**rows, **chosen}, scores)
            return replace(tokens, views={**tokens.views, **constant})

        def choose(scores: Scores) -> list[Tensor]:
            if not plans:
                plans.append(self._method.plan(detached(tokens_of(scores))))
            return chosen_tokens(plans[0], later, chosen)

        scores = self._scorer(flat(rows), flat(chosen), choose)
        constant |= self._constant(samples, in_part, plans[0])
        return tokens_of(scores), plans[0]

    def _constant(
        self, samples: Sequence[Sample], views: Sequence[View], plan: Plan | None = None
    ) -> dict[str, Scores]:
        """Scores on views without gradient, and on nothing else: on the tokens that the plan chose
        for each, where there is one."""
        tokens = self._score(samples, views, seen_beside=(), plan=plan)
        return {view.name: tokens.views[view.name] for view in views}

    def _score(
        self,
        samples: Sequence[Sample],
        views: Sequence[View],
        *,
        seen_beside: Sequence[View],
        plan: Plan | None = None,
    ) -> Tokens:
        """Scores samples without gradient on the views they have, with a plan on the tokens that it
        chose for each, and those that one of `seen_beside` is scored for on their image; the rest
        is zero."""
        rows, names = rows_of(samples, views), {view.name for view in seen_beside}
        rows[AS_IT_IS] = {
            number: row
            for number, row in rows[AS_IT_IS].items()
            if names & samples[number].views.keys()
        }
        if not flat(rows):
            return self._unscored(samples)
        with torch.no_grad():
            if plan is None:
                scores = self._scorer(flat(rows))
            else:
                chosen = chosen_tokens(plan, views, rows)
                scores = self._scorer((), flat(rows), lambda _: chosen)
        return self._tokens(samples, rows, scores)

    def _tokens(
        self, samples: Sequence[Sample], rows: Mapping[str, Mapping[int, Row]], scores: Scores
    ) -> Tokens:
        """Tokens of samples, given the scores of their rows, in order; zero where there is none."""
        blank, start = self._unscored(samples), 0
        found = {AS_IT_IS: blank.seen, **blank.views}
        for name, own in rows.items():
            if own:
                places = torch.tensor([*own], dtype=torch.long, device=self._device)
                part = slice(start, start + len(own))
                found[name] = spread(scores, part, places, blank.mask)
                start += len(own)
        seen = found.pop(AS_IT_IS)
        return replace(blank, seen=seen, views=found, **self._known(samples, seen))

    def _unscored(self, samples: Sequence[Sample]) -> Tokens:
        """Tokens of samples as far as they are known without the policy."""
        device, width = self._device, max(len(sample.ids) for sample in samples)
        lengths = torch.tensor([0 if s.idle else len(s.ids) for s in samples], device=device)
        mask = torch.arange(width, device=device)[None] < lengths[:, None]
        zeros = torch.zeros(mask.shape, device=device)
        advantages = torch.tensor([sample.advantage for sample in samples], device=device)
        return Tokens(
            mask=mask,
            advantages=advantages,
            old_logprobs=zeros,
            seen=Scores(logprobs=zeros, entropy=zeros),
            views={
                view.name: Scores(
                    logprobs=zeros,
                    entropy=zeros,
                    divergence=zeros if view.full_divergence else None,
                )
                for view in self._method.views
            },
            gather=self._gather,
            progress=self._progress,
        )

    def _gather(self, values: Tensor) -> Tensor:
        """Of all processes, (N,), in order of rank."""
        if not self._method.plans_ahead:
            raise RuntimeError(
                f"the plan of {type(self._method).__name__} gathers values of all responses, but "
                "sees a part of them at a time: give it plans_ahead = True"
            )
        return torch.tensor(self._processes.gather(values.tolist())).to(values)

    def _known(self, samples: Sequence[Sample], seen: Scores) -> dict[str, Any]:
        """The log-probabilities of other policies that samples bring along.

        Where a sample brings no old ones, and on idle samples, the policy as it is stands in.
        """
        now = seen.logprobs.detach()

        def filled(given: list[Tensor | None]) -> Tensor:
            if all(row is None for row in given):
                return now
            brought = torch.tensor([row is not None for row in given], device=now.device)
            rows = [now.new_zeros(0, device="cpu") if row is None else row for row in given]
            padded = torch.stack([pad(row, (0, now.shape[1] - len(row))) for row in rows])
            return torch.where(brought[:, None], padded.to(now), now)

        references = [sample.reference_logprobs for sample in samples]
        missing = any(s.reference_logprobs is None and not s.idle for s in samples)
        return {
            "old_logprobs": filled([sample.old_logprobs for sample in samples]),
            "reference_logprobs": None if missing else filled(references),
        }

    def _denominators(
        self, plans: Sequence[Plan], unplanned: Sequence[Sample]
    ) -> dict[str, Tensor]:
        """What each average divides by: its units over all micro-batches and processes, in these
        plans and in samples that are planned without scores."""
        if unplanned:  # not in every process: nothing of it is gathered
            alone = replace(self._unscored(unplanned), gather=lambda values: values)
            plans = [*plans, self._method.plan(alone)]
        names = list(plans[0].averages)
        counts = [sum(self._units(plan.averages[name]) for plan in plans) for name in names]
        totals = self._processes.sum(
            torch.stack([torch.as_tensor(count) for count in counts]).float()
        )
        return dict(zip(names, totals, strict=True))

    def _units(self, average: Average) -> Tensor:
        """What this average alone divides by."""
        longest = self._max_new_tokens if average.mode == "sequence-sum-norm" else 1
        return count_units(average.mask, average.mode) * longest

    def _loss(
        self,
        tokens: Tokens,
        plan: Plan,
        denominators: Mapping[str, Tensor],
        share: float,
        sums: dict[str, Tensor],
    ) -> Tensor:
        """What this micro-batch adds to the loss; what is worth watching is added to `sums`. Where
        micro-batches are averaged each by itself, its average has this share in all."""
        # Whatever the terms leave out, the policy has a part in it: idle processes go back too.
        total = 0.0 * tokens.seen.logprobs.where(tokens.mask, 0.0).sum()
        for name, term in self._method.terms(tokens, plan).items():
            average = plan.averages[name]
            alone = self._method.average_over == "micro-batch"
            divisor = self._units(average) if alone else denominators[name]
            value = aggregate(term.per_token, average.mask, average.mode, denominator=divisor)
            value = share * value if alone else value
            total = total + term.weight * value
            _add(sums, f"loss/{name}", value.detach(), 0)
        self._watch(tokens, plan, sums)
        return total

    def _watch(self, tokens: Tokens, plan: Plan, sums: dict[str, Tensor]) -> None:
        mask = tokens.mask
        count = mask.sum()
        clipped = self._method.log_ratio(tokens).clamp(-20, 20).exp()
        outside = (clipped > 1 + self._method.clip_high) | (clipped < 1 - self._method.clip_low)
        ratio = (tokens.seen.logprobs.detach() - tokens.old_logprobs).clamp(-20, 20).exp()
        _add(sums, "entropy", (tokens.seen.entropy.detach() * mask).sum(), count)
        _add(sums, "clip_share", (outside & mask).sum(), count)
        _add(sums, "old_kl", ((ratio - 1 - ratio.log()) * mask).sum(), count)
        for name, average in plan.averages.items():
            if name not in ("policy", "reference_kl"):
                _add(sums, f"{name}_share", average.mask.sum(), count)
                _add(sums, f"{name}_tokens", average.mask.sum(), 0)

    def _means(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        totals = self._processes.sum(torch.stack(list(sums.values())))
        return {
            name: float(value if count == 0 else value / count)
            for name, (value, count) in zip(sums, totals.tolist(), strict=True)
        }

    @property
    def _device(self) -> torch.device:
        return next(self._scorer.parameters()).device


def _add(sums: dict[str, Tensor], name: str, value: Tensor, count: Tensor | int) -> None:
    pair = torch.stack([value.float(), torch.as_tensor(count, device=value.device).float()])
    sums[name] = sums[name] + pair if name in sums else pair
