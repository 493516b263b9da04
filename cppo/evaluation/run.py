"""Evaluation: sample k responses an item, grade them, estimate with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch

from cppo.collect import Encoder
from cppo.data import Item, SkipLedger, Source, usable
from cppo.evaluation.metrics import Estimate, avg_at_k, summarise
from cppo.policy import Policy, Prompt
from cppo.reward import Grader, extract_answer, final_answer
from cppo.rollout import Sampling, generate


class Questions:
    """The first `count` usable rows of a source, read again whenever they are asked for: decoded
    and encoded, thousands of pictures would not fit in memory.

    Rows that cannot be used go to the ledger.
    """

    def __init__(self, source: Source, encoder: Encoder, ledger: SkipLedger, *, count: int) -> None:
        self._source, self._encoder = source, encoder
        self._show: Callable[[Prompt], Prompt] = lambda prompt: prompt
        self._indices: list[int] = []
        for index, item in usable(source, ledger, check=encoder.check):
            encoder.take([item])
            self._indices.append(index)
            if len(self._indices) == count:
                break

    def __len__(self) -> int:
        return len(self._indices)

    def part(self, places: Sequence[int]) -> Questions:
        """The questions at these places alone."""
        part = copy(self)
        part._indices = [self._indices[place] for place in places]
        return part

    def shown(self, show: Callable[[Prompt], Prompt]) -> Questions:
        """The same questions, each prompt as `show` makes it: on another view of its images."""
        shown = copy(self)
        shown._show = show
        return shown

    def batches(self, size: int) -> Iterator[list[Prompt]]:
        """Encoded, `size` at a time."""
        for start in range(0, len(self), size):
            items = [self._source.read(index) for index in self._indices[start : start + size]]
            for item in items:
                self._encoder.check(item)
            yield [self._show(prompt) for prompt in self._encoder.take(items)]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What k responses to each item earned. The lists run over items, then responses."""

    rows: list[str]
    kinds: list[str]
    accuracies: list[list[float]]
    formats: list[list[float]]
    answers: list[list[str]]
    texts: list[list[str]]

    def summary(self) -> dict[str, Estimate]:
        """avg@k, pass@k and maj@k, each with its 95 % bootstrap interval over items."""
        return summarise(self.accuracies, self.answers, len(self.accuracies[0]))

    def kind_summary(self) -> dict[str, Estimate]:
        """avg@k of each kind of question; empty where items have no kinds."""
        rows_of: dict[str, list[list[float]]] = {}
        for kind, row in zip(self.kinds, self.accuracies, strict=True):
            if kind:
                rows_of.setdefault(kind, []).append(row)
        return {kind: avg_at_k(rows) for kind, rows in sorted(rows_of.items())}

    @staticmethod
    def joined(parts: Sequence[Outcome]) -> Outcome:
        """One outcome of several processes' parts."""
        names = ("rows", "kinds", "accuracies", "formats", "answers", "texts")
        return Outcome(
            **{n: [entry for part in parts for entry in getattr(part, n)] for n in names}
        )


def evaluate(
    policy: Policy,
    questions: Questions,
    grader: Grader,
    sampling: Sampling,
    *,
    seed: int,
    final: Callable[[str], str | None] = final_answer,
    progress: Callable[[int, str], None] = lambda done, note: None,
) -> Outcome:
    """Samples `sampling.responses` responses for each question and grades them.

    `final` reads the answer that a response votes for. `progress` is told the number of items done,
    now and then.
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    items: list[Item] = []
    texts: list[list[str]] = []
    for prompts in questions.batches(max(1, sampling.batch_responses // sampling.responses)):
        groups = generate(policy, prompts, sampling, generator)
        texts += [[response.text for response in group] for group in groups]
        items += [replace(prompt.item, images=()) for prompt in prompts]
        progress(len(texts), "")
    rewards = iter(
        grader.grade(
            [
                (text, item.answer, item.question)
                for item, group in zip(items, texts, strict=True)
                for text in group
            ]
        )
    )
    graded = [[next(rewards) for _ in group] for group in texts]
    return Outcome(
        rows=[item.row for item in items],
        kinds=[item.kind for item in items],
        accuracies=[[reward.accuracy for reward in group] for group in graded],
        formats=[[reward.format for reward in group] for group in graded],
        answers=[[extract_answer(text, final) for text in group] for group in texts],
        texts=texts,
    )
