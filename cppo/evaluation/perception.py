"""The detector against ground truth, on the built-in task's reference solutions.

There every response token is known to be perception or reasoning, so the tokens that the detector
ranks by their rise in entropy can be scored exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from cppo.builtin import Puzzle, label_tokens
from cppo.detector import Score, perception_mask, precision, precision_at_k, rise, roc_auc
from cppo.methods import View
from cppo.policy import Policy, Row, Scorer, encode_item, encode_view


@dataclass(frozen=True, kw_only=True)
class DetectorReport:
    """How well a score rule finds perception tokens.

    `base_rate` is what a random choice would reach; `precision_at_k` takes as many tokens as there
    are perception tokens; `mask_precision` is of the mask that training uses (fraction 0.5).
    """

    score: str
    tokens: int
    base_rate: float
    roc_auc: float
    precision_at_k: float
    mask_precision: float
    mask_recall: float


def measure_detector(
    policy: Policy, scorer: Scorer, puzzles: list[Puzzle], removed: View, *, seed: int = 0
) -> list[DetectorReport]:
    """Scores the reference solutions with and without the evidence; one report a score rule."""
    seen, blind, labels = [], [], []
    for puzzle in puzzles:
        ids, perception = label_tokens(policy.tokenizer, puzzle)
        prompt = encode_item(policy, puzzle.item, instruction="", max_tokens=10**6)
        without = encode_view(policy, prompt, removed, seed=seed, step=0)
        response = torch.tensor(ids)
        seen.append(Row(prompt=prompt, response=response))
        blind.append(Row(prompt=without, response=response))
        labels.append(torch.tensor(perception))
    with policy.evaluating():
        entropy, removed_entropy = scorer(seen).entropy.cpu(), scorer(blind).entropy.cpu()
    truth = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in labels], True)
    reports = []
    for score in get_args(Score):
        scores = rise(entropy, removed_entropy, score=score)[mask]
        chosen = perception_mask(entropy, removed_entropy, mask, score=score)
        reports.append(
            DetectorReport(
                score=score,
                tokens=int(mask.sum()),
                base_rate=float(truth[mask].float().mean()),
                roc_auc=roc_auc(scores, truth[mask]),
                precision_at_k=precision_at_k(scores, truth[mask], int(truth[mask].sum())),
                mask_precision=precision(chosen[mask], truth[mask]),
                mask_recall=float((chosen & truth).sum() / truth.sum()),
            )
        )
    return reports
