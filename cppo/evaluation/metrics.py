"""avg@k, pass@k and maj@k with confidence intervals, from accuracies alone.

Legend: N items, S samples drawn for each item, k samples that a metric speaks of (k <= S). An
accuracy lies in [0, 1]; pass@k counts a sample as correct from 0.5 on.

Every interval is a percentile bootstrap over items: it says how far the value would move with
other items from the same source, not with other samples for these items. It is the interval's
nature that it has no width where every item scores the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Accuracies = npt.ArrayLike  # (N, S)
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def avg_at_k(
    accuracies: Accuracies, k: int | None = None, *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean accuracy. Its expectation is the same for every k, so all S samples are used.

    Args:
        accuracies: (N, S), in [0, 1].
        k: At most S, which it is by default.
        resamples: Bootstrap resamples of the items, for the 95 % interval.
        seed: Of the bootstrap; the same seed gives the same interval.

    Raises:
        ValueError: The accuracies are no such matrix, or k does not lie in 1 to S.
    """
    matrix, _ = _checked(accuracies, k)
    return _bootstrap(matrix.mean(axis=1), resamples=resamples, seed=seed)


def pass_at_k(
    accuracies: Accuracies, k: int | None = None, *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Chance that at least one of k samples is correct: 1 - C(S - c, k) / C(S, k), c correct.

    The estimator is unbiased (2107.03374, sec. 2.1). Arguments and errors as in `avg_at_k`.
    """
    matrix, k = _checked(accuracies, k)
    samples = matrix.shape[1]
    passed = [
        1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
        for correct in (matrix >= 0.5).sum(axis=1).tolist()
    ]
    return _bootstrap(np.array(passed), resamples=resamples, seed=seed)


def maj_at_k(
    accuracies: Accuracies,
    answers: Sequence[Sequence[str]],
    k: int | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Accuracy of the answer that most of k samples give.

    Each item's samples are cut into floor(S / k) blocks of k, which vote separately and are
    averaged. Samples without an answer (``""``) abstain; where all do, the item scores 0. A tie
    scores the mean over the tied answers: what a fair draw among them would score on average.

    Args:
        answers: (N, S), canonical forms (`cppo.reward.extract_answer`): equal strings are one
            answer. Samples of one answer that differ in accuracy count with their mean.

    Other arguments and errors as in `avg_at_k`; also a ValueError where answers are not (N, S).
    """
    matrix, k = _checked(accuracies, k)
    shape = (len(answers), {len(row) for row in answers})
    if shape != (matrix.shape[0], {matrix.shape[1]}):
        raise ValueError(
            f"answers has {shape[0]} rows of lengths {sorted(shape[1])}; accuracies is"
            f" {matrix.shape[0]} x {matrix.shape[1]}, and both must be (items, samples)"
        )
    voted = [
        sum(_vote(row[at : at + k], given[at : at + k]) for at in starts) / len(starts)
        for starts in [range(0, matrix.shape[1] - k + 1, k)]
        for row, given in zip(matrix.tolist(), answers, strict=True)
    ]
    return _bootstrap(np.array(voted), resamples=resamples, seed=seed)


def paired_difference(
    before: Accuracies, after: Accuracies, *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """How much mean accuracy rose, as ``after - before`` on the same items.

    Items are resampled in pairs, so what makes an item hard cancels.

    Args:
        before: (N, S), in [0, 1].
        after: (N, S'), row for row the same items; the number of samples may differ.

    Raises:
        ValueError: One is no such matrix, or they have different numbers of items.
    """
    (first, _), (second, _) = _checked(before, None), _checked(after, None)
    if len(first) != len(second):
        raise ValueError(
            f"before has {len(first)} items and after {len(second)}; a paired difference needs"
            " the same items in both, row for row"
        )
    difference = second.mean(axis=1) - first.mean(axis=1)
    return _bootstrap(difference, resamples=resamples, seed=seed)


def summarise(
    accuracies: Accuracies,
    answers: Sequence[Sequence[str]],
    k: int | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """``{"avg@k": ..., "pass@k": ..., "maj@k": ...}``, k being the number; see each metric."""
    _, k = _checked(accuracies, k)
    options = {"resamples": resamples, "seed": seed}
    return {
        f"avg@{k}": avg_at_k(accuracies, k, **options),
        f"pass@{k}": pass_at_k(accuracies, k, **options),
        f"maj@{k}": maj_at_k(accuracies, answers, k, **options),
    }


def _vote(accuracies: Sequence[float], answers: Sequence[str]) -> float:
    given: dict[str, list[float]] = {}
    for accuracy, answer in zip(accuracies, answers, strict=True):
        if answer:
            given.setdefault(answer, []).append(accuracy)
    most = max(map(len, given.values()), default=0)
    winners = [sum(each) / most for each in given.values() if len(each) == most]
    return sum(winners) / len(winners) if winners else 0.0


def _checked(accuracies: Accuracies, k: int | None) -> tuple[_Floats, int]:
    matrix: _Floats = np.asarray(accuracies, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"accuracies has the shape {matrix.shape}; expected (items, samples), neither of them 0"
        )
    if not np.all((matrix >= 0) & (matrix <= 1)):
        raise ValueError(
            f"accuracies lie between {matrix.min()} and {matrix.max()}; expected 0 to 1 and no NaN"
        )
    samples = matrix.shape[1]
    k = samples if k is None else k
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, with {samples} samples an item; expected 1 to {samples}")
    return matrix, k


def _bootstrap(scores_N: _Floats, *, resamples: int, seed: int) -> Estimate:
    """The mean of one score per item, with its 95 % percentile interval."""
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; at least 1 is needed")
    random = np.random.default_rng(seed)
    count = len(scores_N)
    block = max(1, 2**22 // count)  # resamples at once: some 32 MB of indices
    means: list[npt.NDArray[Any]] = []
    for start in range(0, resamples, block):
        drawn = random.integers(count, size=(min(block, resamples - start), count))
        means.append(scores_N[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(value=float(scores_N.mean()), low=float(low), high=float(high))
