"""Evaluation: sample k responses an item, grade them, estimate with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cppo.evaluation.metrics import Estimate, avg_at_k, summarise
from cppo.policy import Policy, Prompt
from cppo.reward import Grader, extract_answer
from cppo.rollout import Sampling, generate


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
    def mean(accuracies: Sequence[Sequence[float]]) -> Estimate:
        """avg@k of accuracies alone."""
        return avg_at_k(accuracies)

    @staticmethod
    def joined(parts: Sequence[Outcome]) -> Outcome:
        """One outcome of several processes' parts."""
        names = ("rows", "kinds", "accuracies", "formats", "answers", "texts")
        return Outcome(
            **{n: [entry for part in parts for entry in getattr(part, n)] for n in names}
        )


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    grader: Grader,
    sampling: Sampling,
    *,
    seed: int,
    progress: Callable[[int, str], None] = lambda done, note: None,
) -> Outcome:
    """Samples `sampling.responses` responses for each prompt and grades them.

    `progress` is told the number of items done, now and then.
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    texts: list[list[str]] = []
    for group in generate(policy, prompts, sampling, generator):
        texts.append([response.text for response in group])
        progress(len(texts), "")
    rewards = iter(
        grader.grade(
            [
                (text, prompt.item.answer, prompt.item.question)
                for prompt, group in zip(prompts, texts, strict=True)
                for text in group
            ]
        )
    )
    graded = [[next(rewards) for _ in group] for group in texts]
    return Outcome(
        rows=[prompt.item.row for prompt in prompts],
        kinds=[prompt.item.kind for prompt in prompts],
        accuracies=[[reward.accuracy for reward in group] for group in graded],
        formats=[[reward.format for reward in group] for group in graded],
        answers=[[extract_answer(text) for text in group] for group in texts],
        texts=texts,
    )
