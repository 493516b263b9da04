"""Which response tokens depend on the picture, and how well a detector finds those that do.

Shapes: B responses, T tokens (right-padded). Entropies are in nats, of the temperature-scaled
distribution. Padding may hold anything, NaN and infinity included.
"""

from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Count = Literal["floor", "ceil"]
Ties = Literal["keep", "cut"]
Score = Literal["relative", "absolute"]
Keep = Literal["fraction", "rise_above", "share_of_rise"]


def _check_option(name: str, given: str, options: Any) -> None:
    allowed = get_args(options)
    if given not in allowed:
        raise ValueError(f"{name}={given!r} is unknown: choose one of {', '.join(allowed)}")


def _check_shapes(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes differ: {given}; pass tensors of one shape")


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rise(
    entropy: Tensor,
    removed_entropy: Tensor,
    *,
    score: Score = "relative",
    epsilon: float = 1e-6,
) -> Tensor:
    """How much each token's entropy rises once the evidence is removed from the picture.

    `entropy` and `removed_entropy` are (B, T), in nats, under the original and the removed view.
    "absolute" is removed - original, in nats; "relative" divides it by removed + epsilon, so that
    it lies below one. Both are positive exactly where the entropy rises. Returns (B, T), float32
    or wider. Raises ValueError for shapes that differ or an unknown score. Source: 2601.00501.
    """
    _check_shapes(entropy=entropy, removed_entropy=removed_entropy)
    _check_option("score", score, Score)
    removed_entropy = _widen(removed_entropy)
    difference = removed_entropy - _widen(entropy)
    return difference if score == "absolute" else difference / (removed_entropy + epsilon)


def perception_mask(
    entropy: Tensor,
    removed_entropy: Tensor,
    response_mask: Tensor,
    *,
    keep: Keep = "fraction",
    fraction: float = 0.5,
    threshold: float = 0.0,
    count: Count = "floor",
    ties: Ties = "keep",
    score: Score = "relative",
    epsilon: float = 1e-6,
) -> Tensor:
    """The perception tokens: the top fraction of the tokens whose entropy rises.

    `entropy`, `removed_entropy` (nats) and `response_mask` are (B, T). Candidates are the response
    tokens whose entropy rises; of these, `select_tokens` keeps the best by `rise`: k = fraction *
    candidates of each response unless `keep` says otherwise, none where nothing rises.

    Returns booleans (B, T), without gradient. Raises ValueError for shapes that differ, an unknown
    option or a fraction outside (0, 1]. Source: 2601.00501 (floor and keep, or ceil and cut, as the
    two published codes do).
    """
    _check_shapes(entropy=entropy, removed_entropy=removed_entropy, response_mask=response_mask)
    entropy, removed_entropy = entropy.detach(), removed_entropy.detach()
    return select_tokens(
        rise(entropy, removed_entropy, score=score, epsilon=epsilon),
        response_mask.bool() & (removed_entropy > entropy),
        keep=keep,
        fraction=fraction,
        threshold=threshold,
        count=count,
        ties=ties,
    )


def select_tokens(
    scores: Tensor,
    candidates: Tensor,
    *,
    keep: Keep = "fraction",
    fraction: float = 0.5,
    threshold: float = 0.0,
    count: Count = "floor",
    ties: Ties = "keep",
) -> Tensor:
    """The candidates that score best, response by response.

    `scores` and `candidates` are (B, T). What is kept of each response:
    "fraction": its k best, k = `fraction` * candidates rounded by `count`, at least one.
    "share_of_rise": its best that make up `fraction` of the sum of its candidates' scores, which
    must not be negative: with "floor" as many as do not exceed it, at least one; with "ceil" as few
    as reach it. A rounding error of 1e-5 of the sum does not count.
    "rise_above": those that score above `threshold`; there may be none.

    Of tokens tied at the last place, "keep" takes all and "cut" the earliest. The fraction of a
    number of tokens is read as in `share_of`. Returns booleans (B, T), without gradient. Raises
    ValueError for shapes that differ, an unknown option or a fraction outside (0, 1].
    """
    _check_shapes(scores=scores, candidates=candidates)
    _check_option("keep", keep, Keep)
    _check_option("count", count, Count)
    _check_option("ties", ties, Ties)
    candidates = candidates.bool()
    scores = scores.detach().masked_fill(~candidates, -torch.inf)
    if keep == "rise_above":
        return candidates & (scores > threshold)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(dim=-1)  # a stable sort puts the earlier of two equals first
    k = share_of(candidates.sum(-1, keepdim=True), fraction, count)
    if keep == "share_of_rise":
        gains = _widen(scores).masked_fill(~candidates, 0.0)
        total = gains.sum(-1, keepdim=True)
        # Some devices have no cumulative sum that is the same each time; the CPU has.
        fixed = torch.are_deterministic_algorithms_enabled()
        sorted_down = gains.gather(-1, order)
        reached = (sorted_down.cpu() if fixed else sorted_down).cumsum(-1).to(scores.device)
        if count == "floor":
            k = (reached <= (fraction + 1e-5) * total).sum(-1, keepdim=True)
        else:
            k = (reached < (fraction - 1e-5) * total).sum(-1, keepdim=True) + 1
    k = k.clamp(min=1)
    if ties == "cut":
        return candidates & (place < k)
    kth_score = torch.where(place == k - 1, scores, 0.0).sum(-1, keepdim=True)
    return candidates & (scores >= kth_score)


def share_of(numbers: Tensor, fraction: float, count: Count = "floor") -> Tensor:
    """`fraction` of whole `numbers`, rounded down ("floor") or up ("ceil").

    The fraction is read as the nearest ratio of integers with a denominator up to a million, so
    that 0.1 of 30 is 3 and 1/3 of 30 is 10. Raises ValueError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} is outside (0, 1]: pass the share of rising tokens")
    share = Fraction(fraction).limit_denominator(1_000_000)
    product = share.numerator * numbers
    if count == "ceil":
        product = product + share.denominator - 1
    return product // share.denominator


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """The chance that a labelled token scores above an unlabelled one; ties count one half.

    `scores` and `labels` (true where the token does depend on the picture) have one shape, any.
    Select the tokens to judge first, padding out. NaN where a class is missing: there is no pair
    to compare. Raises ValueError for shapes that differ and for NaN scores.
    """
    _check_shapes(scores=scores, labels=labels)
    if scores.isnan().any():
        raise ValueError("scores hold NaN and cannot be ranked: select the response tokens first")
    scores, labels = scores.cpu(), labels.cpu().bool().flatten()  # in float64 below
    _, level, level_sizes = torch.unique(scores.flatten(), return_inverse=True, return_counts=True)
    mean_rank = level_sizes.cumsum(0) - (level_sizes - 1).double() / 2
    positives = int(labels.sum())
    pairs = positives * (labels.numel() - positives)
    if pairs == 0:
        return float("nan")
    rank_sum = float(mean_rank[level[labels]].sum())
    return (rank_sum - positives * (positives + 1) / 2) / pairs


def precision_at_k(scores: Tensor, labels: Tensor, k: int) -> float:
    """The share of labelled tokens among the k that score highest.

    Where tokens tie for the last places, their labelled share counts: the expectation over random
    order, so that positions never matter. Shapes as in `roc_auc`. Raises ValueError for shapes that
    differ, NaN scores and a k outside 1 .. number of tokens.
    """
    _check_shapes(scores=scores, labels=labels)
    if scores.isnan().any():
        raise ValueError("scores hold NaN and cannot be ranked: select the response tokens first")
    if not 1 <= k <= scores.numel():
        raise ValueError(f"k={k} is outside 1 .. {scores.numel()}, the number of tokens")
    scores, hits = scores.cpu().flatten(), labels.cpu().bool().flatten().double()
    kth_score = scores.topk(k).values[-1]
    above, tied = scores > kth_score, scores == kth_score
    open_places = k - int(above.sum())
    return float(hits[above].sum() + open_places * hits[tied].mean()) / k


def precision(mask: Tensor, labels: Tensor) -> float:
    """The share of labelled tokens among those a mask keeps; NaN where it keeps none.

    `mask` and `labels` have one shape, any. Raises ValueError where the shapes differ.
    """
    _check_shapes(mask=mask, labels=labels)
    return float(labels.bool()[mask.bool()].float().mean())
