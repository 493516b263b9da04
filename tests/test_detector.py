"""Laws of the perception-token detector and of the measures that score it."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cppo.doctor
from cppo.detector import (
    perception_mask,
    precision,
    precision_at_k,
    rise,
    roc_auc,
    select_tokens,
    share_of,
)

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("tensors_on_device")]
GOLDEN = json.loads((Path(cppo.doctor.__file__).with_name("golden.json")).read_text())
VARIANTS: dict[str, dict[str, Any]] = {
    "perception_mask_floor_keep": {},
    "perception_mask_ceil_cut": {"count": "ceil", "ties": "cut"},
    "perception_mask_absolute": {"score": "absolute"},
}
FILLS = [math.nan, math.inf, -math.inf, 1e30, 0.3]
seeds = st.integers(0, 2**31 - 1)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_variant = pytest.mark.parametrize("key", VARIANTS)
laws = settings(max_examples=40, deadline=None)


def random_entropies(seed: int, B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Continuous entropies without ties, and a right-padded mask with holes."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    entropy, removed = torch.rand(2, B, T, generator=generator, dtype=torch.float64) + 0.1
    lengths = torch.randint(0, T + 1, (B, 1), generator=generator)
    mask = (torch.arange(T) < lengths) & (torch.rand(B, T, generator=generator) < 0.8)
    return entropy, removed, mask


def mask_of_one_response(
    entropy: list[float],
    removed: list[float],
    mask: list[bool],
    fraction: Fraction,
    count: str,
    ties: str,
    score: str,
) -> list[bool]:
    """The definition, one token after the other, on Python's float64."""
    scores = {
        t: (r - e) / (r + 1e-6) if score == "relative" else r - e
        for t, (e, r, m) in enumerate(zip(entropy, removed, mask, strict=True))
        if m and r - e > 0
    }
    if not scores:
        return [False] * len(entropy)
    rounded = math.floor if count == "floor" else math.ceil
    k = max(1, rounded(fraction * len(scores)))
    ranked = sorted(scores, key=lambda t: (-scores[t], t))
    if ties == "cut":
        kept = set(ranked[:k])
    else:
        kept = {t for t in scores if scores[t] >= scores[ranked[k - 1]]}
    return [t in kept for t in range(len(entropy))]


# --- golden vectors -----------------------------------------------------------------------------


@every_dtype
@every_variant
@pytest.mark.parametrize("response", GOLDEN["responses"], ids=lambda r: f"T{len(r['entropy'])}")
def test_mask_of_one_response_equals_the_golden_one(
    dtype: torch.dtype, key: str, response: dict[str, Any]
) -> None:
    entropy = torch.tensor([response["entropy"]], dtype=dtype)
    removed = torch.tensor([response["removed_entropy"]], dtype=dtype)
    mask = perception_mask(entropy, removed, torch.ones_like(entropy).bool(), **VARIANTS[key])
    assert mask.tolist() == [response["expect"][key]]


@every_dtype
@every_variant
@pytest.mark.parametrize("fill", FILLS)
def test_mask_of_the_padded_batch_equals_the_golden_one(
    dtype: torch.dtype, key: str, fill: float
) -> None:
    def pad(rows: list[list[Any]], value: float) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    responses = GOLDEN["responses"]
    response_mask = pad([[True] * len(r["entropy"]) for r in responses], False)
    mask = perception_mask(
        pad([r["entropy"] for r in responses], fill).to(dtype),
        pad([r["removed_entropy"] for r in responses], -fill).to(dtype),
        response_mask,
        **VARIANTS[key],
    )
    assert torch.equal(mask, pad([r["expect"][key] for r in responses], False))


# --- perception mask ----------------------------------------------------------------------------


@laws
@given(
    tokens=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), min_size=1),
    fraction=st.sampled_from(["0.1", "0.2", "0.3", "0.5", "0.6", "0.7", "0.9", "1"]),
    count=st.sampled_from(["floor", "ceil"]),
    ties=st.sampled_from(["keep", "cut"]),
    score=st.sampled_from(["relative", "absolute"]),
)
def test_mask_is_the_definition_token_by_token(
    tokens: list[tuple[int, int, bool]], fraction: str, count: Any, ties: Any, score: Any
) -> None:
    entropy = [e / 4 for e, _, _ in tokens]
    removed = [r / 4 for _, r, _ in tokens]
    kept = [m for _, _, m in tokens]
    mask = perception_mask(
        torch.tensor([entropy], dtype=torch.float64),
        torch.tensor([removed], dtype=torch.float64),
        torch.tensor([kept]),
        fraction=float(fraction),
        count=count,
        ties=ties,
        score=score,
    )
    expected = mask_of_one_response(entropy, removed, kept, Fraction(fraction), count, ties, score)
    assert mask[0].tolist() == expected


def test_mask_of_a_hand_worked_response() -> None:
    # Rises 0.1, -0.1, 0.4, 0.3, 0.2; relative 0.5, -, 0.4, 0.75, 0.2; half of 4 candidates is 2.
    entropy = torch.tensor([[0.1, 0.3, 0.6, 0.1, 0.8]])
    removed = torch.tensor([[0.2, 0.2, 1.0, 0.4, 1.0]])
    everything = torch.ones(1, 5, dtype=torch.bool)
    assert perception_mask(entropy, removed, everything).tolist() == [
        [True, False, False, True, False]
    ]
    assert perception_mask(entropy, removed, everything, score="absolute").tolist() == [
        [False, False, True, True, False]
    ]
    only_last_two = torch.tensor([[False, False, False, True, True]])
    assert perception_mask(entropy, removed, only_last_two).tolist() == [
        [False, False, False, True, False]
    ]


@pytest.mark.parametrize("candidates", range(1, 101))
def test_count_is_exact_where_floating_point_is_not(candidates: int) -> None:
    entropy = torch.zeros(1, candidates)
    removed = torch.arange(1, candidates + 1)[None].float()
    everything = torch.ones(1, candidates, dtype=torch.bool)
    for percent in (1, 7, 10, 14, 28, 29, 30, 35, 55, 56, 57, 58, 70, 90, 100):
        for count, rounded in (("floor", math.floor), ("ceil", math.ceil)):
            mask = perception_mask(
                entropy,
                removed,
                everything,
                fraction=percent / 100,
                count=count,  # type: ignore[arg-type]
                score="absolute",
            )
            assert mask.sum() == max(1, rounded(Fraction(percent * candidates, 100)))


def test_a_third_of_thirty_is_ten() -> None:
    entropy, removed = torch.zeros(1, 30), torch.arange(1, 31)[None].float()
    everything = torch.ones(1, 30, dtype=torch.bool)
    for count in ("floor", "ceil"):
        mask = perception_mask(
            entropy, removed, everything, fraction=1 / 3, count=count, score="absolute"
        )
        assert mask.sum() == 10


@laws
@given(seed=seeds, key=st.sampled_from(list(VARIANTS)))
def test_padding_does_not_move_the_mask(seed: int, key: str) -> None:
    entropy, removed, response_mask = random_entropies(seed, 4, 9)
    mask = perception_mask(entropy, removed, response_mask, **VARIANTS[key])
    assert not (mask & ~response_mask).any()
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    for tensor in (entropy, removed):
        fill = torch.tensor(FILLS, dtype=torch.float64)[
            torch.randint(len(FILLS), (4, 9), generator=generator)
        ]
        tensor[~response_mask] = fill[~response_mask]
    assert torch.equal(perception_mask(entropy, removed, response_mask, **VARIANTS[key]), mask)


@laws
@given(seed=seeds, key=st.sampled_from(list(VARIANTS)))
def test_a_response_is_masked_alone_as_in_any_batch(seed: int, key: str) -> None:
    tensors = random_entropies(seed, 5, 8)
    whole = perception_mask(*tensors, **VARIANTS[key])
    order = torch.randperm(
        5, generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    )
    assert torch.equal(
        perception_mask(*(tensor[order] for tensor in tensors), **VARIANTS[key]), whole[order]
    )
    for b in range(5):
        alone = perception_mask(*(tensor[b : b + 1] for tensor in tensors), **VARIANTS[key])
        assert torch.equal(alone[0], whole[b])


@laws
@given(seed=seeds, scale=st.floats(0.1, 100))
def test_relative_mask_ignores_a_common_scale_of_entropies(seed: int, scale: float) -> None:
    entropy, removed, response_mask = random_entropies(seed, 4, 12)
    mask = perception_mask(entropy, removed, response_mask, epsilon=0)
    assert torch.equal(
        perception_mask(entropy * scale, removed * scale, response_mask, epsilon=0), mask
    )
    torch.testing.assert_close(
        rise(entropy * scale, removed * scale), rise(entropy, removed), atol=2e-4, rtol=2e-4
    )


@laws
@given(seed=seeds, fraction=st.sampled_from([0.1, 0.25, 0.5, 0.75]))
def test_a_larger_fraction_only_adds_tokens(seed: int, fraction: float) -> None:
    tensors = random_entropies(seed, 4, 12)
    smaller = perception_mask(*tensors, fraction=fraction)
    larger = perception_mask(*tensors, fraction=fraction + 0.2)
    assert not (smaller & ~larger).any()


def test_where_nothing_rises_nothing_is_kept() -> None:
    entropy = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    everything = torch.ones(2, 2, dtype=torch.bool)
    assert not perception_mask(entropy, entropy, everything).any()
    assert not perception_mask(entropy, entropy - 0.1, everything).any()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_a_batch_without_tokens_has_an_empty_mask(shape: tuple[int, int]) -> None:
    entropy = torch.zeros(shape)
    mask = perception_mask(entropy, entropy, entropy.bool())
    assert mask.shape == shape
    assert mask.dtype == torch.bool


def test_a_fall_never_outranks_a_rise() -> None:
    # An entropy that rounding took below zero turns the sign of the relative rise; with no epsilon,
    # zero over zero has none at all.
    entropy = torch.tensor([[0.5, 0.2, 0.0]])
    removed = torch.tensor([[-2e-6, 0.3, 0.0]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    for epsilon in (1e-6, 0):
        mask = perception_mask(entropy, removed, everything, epsilon=epsilon)
        assert mask.tolist() == [[False, True, False]]


@pytest.mark.parametrize(("removed", "kept"), [(0.3, True), (0.1, False)])
def test_a_one_token_response_is_kept_where_it_rises(removed: float, kept: bool) -> None:
    mask = perception_mask(
        torch.tensor([[0.2]]), torch.tensor([[removed]]), torch.tensor([[True]]), fraction=0.01
    )
    assert mask.item() is kept


def test_entropies_of_zero_do_not_divide_by_zero() -> None:
    zero, everything = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    assert (rise(zero, zero) == 0).all()
    assert not perception_mask(zero, zero, everything).any()


def test_bfloat16_entropies_are_ranked_in_float32() -> None:
    # Relative rises 0.689 and 0.693, which bfloat16 would round to a tie.
    entropy = torch.tensor([[0.28125, 0.484375]], dtype=torch.bfloat16)
    removed = torch.tensor([[0.90625, 1.578125]], dtype=torch.bfloat16)
    mask = perception_mask(entropy, removed, torch.ones(1, 2, dtype=torch.bool), epsilon=0)
    assert mask.tolist() == [[False, True]]
    assert rise(entropy, removed).dtype == torch.float32


def test_the_mask_carries_no_gradient() -> None:
    entropy = torch.rand(2, 3, requires_grad=True)
    mask = perception_mask(entropy, entropy + 1, torch.ones(2, 3, dtype=torch.bool))
    assert not mask.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, r"fraction=0 is outside \(0, 1\]"),
        ({"fraction": 1.5}, r"fraction=1.5 is outside"),
        ({"fraction": math.nan}, r"fraction=nan is outside"),
        ({"count": "round"}, "count='round' is unknown: choose one of floor, ceil"),
        ({"ties": "drop"}, "ties='drop' is unknown: choose one of keep, cut"),
        ({"score": "ratio"}, "score='ratio' is unknown: choose one of relative, absolute"),
        ({"keep": "all"}, "keep='all' is unknown: choose one of fraction, rise_above, share_of"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(
    options: dict[str, Any], message: str
) -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        perception_mask(x, x, x.bool(), **options)


def test_shapes_that_differ_are_refused() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"response_mask \(2, 2\)"):
        perception_mask(x, x, torch.ones(2, 2, dtype=torch.bool))


# --- keeping by threshold or share ----------------------------------------------------------------


def kept_of_one_response(
    scores: list[int], candidates: list[bool], keep: str, fraction: Fraction, count: str, ties: str
) -> list[bool]:
    """The definition on whole numbers, one token after the other."""
    ranked = sorted((t for t, c in enumerate(candidates) if c), key=lambda t: (-scores[t], t))
    if keep == "rise_above":
        return [t in ranked and score > 2 for t, score in enumerate(scores)]
    goal = fraction * sum(scores[t] for t in ranked)
    sums = [sum(scores[t] for t in ranked[:k]) for k in range(len(ranked) + 1)]
    if count == "floor":
        k = max(k for k, reached in enumerate(sums) if reached <= goal)
    else:
        k = min(k for k, reached in enumerate(sums) if reached >= goal)
    kept = set(ranked[: max(1, k)])
    last = min((scores[t] for t in kept), default=0)
    tied = {t for t in ranked if scores[t] == last and ties == "keep"}
    return [t in kept | tied for t in range(len(scores))]


@laws
@given(
    tokens=st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=12),
    keep=st.sampled_from(["rise_above", "share_of_rise"]),
    fraction=st.sampled_from(["0.1", "0.2", "1/3", "0.5", "0.7", "0.9", "1"]),
    count=st.sampled_from(["floor", "ceil"]),
    ties=st.sampled_from(["keep", "cut"]),
    scale=st.sampled_from([1.0, 0.1, 1e-3]),
)
def test_kept_tokens_are_the_definition_token_by_token(
    tokens: list[tuple[int, bool]], keep: Any, fraction: str, count: Any, ties: Any, scale: float
) -> None:
    scores, candidates = [s for s, _ in tokens], [c for _, c in tokens]
    for dtype in (torch.float32, torch.float64):
        mask = select_tokens(
            torch.tensor([scores], dtype=dtype) * scale,
            torch.tensor([candidates]),
            keep=keep,
            fraction=float(Fraction(fraction)),
            threshold=2.5 * scale,
            count=count,
            ties=ties,
        )
        expected = kept_of_one_response(scores, candidates, keep, Fraction(fraction), count, ties)
        assert mask[0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", ["floor", "ceil"])
def test_of_equal_rises_a_share_is_that_share_of_the_tokens(count: Any, dtype: torch.dtype) -> None:
    rounded = {"floor": math.floor, "ceil": math.ceil}[count]
    for number in range(1, 31):
        scores = torch.full((1, number), 0.1, dtype=dtype)  # 0.1 + 0.1 + 0.1 exceeds 0.3
        for percent in (1, 10, 20, 30, 60, 70, 90, 100):
            kept = select_tokens(
                scores,
                scores > 0,
                keep="share_of_rise",
                fraction=percent / 100,
                count=count,
                ties="cut",
            )
            assert kept.sum() == max(1, rounded(Fraction(percent * number, 100)))


@pytest.mark.parametrize("keep", ["rise_above", "share_of_rise"])
@laws
@given(seed=seeds, fill=st.sampled_from(FILLS))
def test_what_is_no_candidate_does_not_move_what_is_kept(keep: Any, seed: int, fill: float) -> None:
    scores, _, candidates = random_entropies(seed, 4, 9)
    kept = select_tokens(scores, candidates, keep=keep, threshold=0.5)
    assert not (kept & ~candidates).any()
    filled = torch.where(candidates, scores, fill)
    assert torch.equal(select_tokens(filled, candidates, keep=keep, threshold=0.5), kept)
    for b in range(4):
        alone = select_tokens(scores[b : b + 1], candidates[b : b + 1], keep=keep, threshold=0.5)
        assert torch.equal(alone[0], kept[b])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_of_a_batch_without_tokens_nothing_is_kept(shape: tuple[int, int]) -> None:
    for keep in ("fraction", "rise_above", "share_of_rise"):
        scores = torch.zeros(shape)
        assert select_tokens(scores, scores.bool(), keep=keep).shape == shape  # type: ignore[arg-type]


def test_shares_of_numbers_are_exact_where_floating_point_is_not() -> None:
    numbers = torch.arange(0, 200)
    for percent in range(1, 101):
        for count, rounded in (("floor", math.floor), ("ceil", math.ceil)):
            expected = [rounded(Fraction(percent * n, 100)) for n in range(200)]
            assert share_of(numbers, percent / 100, count).tolist() == expected  # type: ignore[arg-type]


# --- rise ---------------------------------------------------------------------------------------


def test_rise_of_hand_worked_tokens() -> None:
    entropy = torch.tensor([[0.1, 0.5, 0.4]], dtype=torch.float64)
    removed = torch.tensor([[0.4, 0.5, 0.2]], dtype=torch.float64)
    expected = torch.tensor([[0.3, 0.0, -0.2]], dtype=torch.float64)
    torch.testing.assert_close(rise(entropy, removed, score="absolute"), expected)
    torch.testing.assert_close(rise(entropy, removed, epsilon=0), expected / removed)
    torch.testing.assert_close(rise(entropy, removed, epsilon=0.1), expected / (removed + 0.1))


# --- measures -----------------------------------------------------------------------------------


@laws
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_roc_auc_is_the_share_of_pairs_in_the_right_order(tokens: list[tuple[int, bool]]) -> None:
    positive = [score for score, label in tokens if label]
    negative = [score for score, label in tokens if not label]
    auc = roc_auc(
        torch.tensor([score for score, _ in tokens]), torch.tensor([label for _, label in tokens])
    )
    if not positive or not negative:
        assert math.isnan(auc)
        return
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert auc == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_roc_auc_of_perfect_reversed_and_constant_scores() -> None:
    labels = torch.tensor([[False, False], [True, True]])
    scores = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    assert roc_auc(scores, labels) == 1
    assert roc_auc(-scores, labels) == 0
    assert roc_auc(torch.zeros(2, 2), labels) == 0.5


@laws
@given(
    tokens=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12),
    seed=seeds,
)
def test_precision_at_k_does_not_depend_on_positions(
    tokens: list[tuple[int, bool]], seed: int
) -> None:
    scores = torch.tensor([score for score, _ in tokens])
    labels = torch.tensor([label for _, label in tokens])
    order = torch.randperm(
        len(tokens), generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    )
    for k in range(1, len(tokens) + 1):
        value = precision_at_k(scores, labels, k)
        assert value == pytest.approx(precision_at_k(scores[order], labels[order], k), abs=1e-12)
    assert value == pytest.approx(labels.double().mean().item(), abs=1e-12)


def test_precision_at_k_of_hand_worked_scores() -> None:
    scores = torch.tensor([0.9, 0.8, 0.5, 0.5, 0.5, 0.1])
    labels = torch.tensor([True, False, True, False, False, True])
    assert precision_at_k(scores, labels, 1) == 1
    assert precision_at_k(scores, labels, 2) == 0.5
    assert precision_at_k(scores, labels, 3) == pytest.approx((1 + 1 / 3) / 3)
    assert precision_at_k(scores, labels, 5) == pytest.approx(2 / 5)


def test_precision_of_a_mask_is_the_labelled_share_of_what_it_keeps() -> None:
    labels = torch.tensor([[True, False, True, False]])
    assert precision(torch.tensor([[True, True, True, False]]), labels) == pytest.approx(2 / 3)
    assert math.isnan(precision(torch.zeros(1, 4, dtype=torch.bool), labels))


def test_measures_refuse_what_cannot_be_ranked() -> None:
    labels = torch.tensor([True, False])
    for measure in (roc_auc, lambda scores, labels: precision_at_k(scores, labels, 1)):
        with pytest.raises(ValueError, match="NaN"):
            measure(torch.tensor([math.nan, 1.0]), labels)
        with pytest.raises(ValueError, match="shapes differ"):
            measure(torch.zeros(3), labels)
    for k in (0, 3):
        with pytest.raises(ValueError, match=rf"k={k} is outside 1 \.\. 2"):
            precision_at_k(torch.zeros(2), labels, k)
    with pytest.raises(ValueError, match="shapes differ"):
        precision(torch.ones(3, dtype=torch.bool), labels)


@laws
@given(seed=seeds)
def test_planted_perception_tokens_are_found(seed: int) -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    labels = torch.rand(4, 20, generator=generator) < 0.3
    labels[:, 0], labels[:, 1] = True, False
    entropy = torch.rand(4, 20, generator=generator) * 0.2 + 0.1
    noise = torch.rand(4, 20, generator=generator) * 0.01
    removed = entropy + torch.where(labels, 1.0, 0.0) + noise
    everything = torch.ones_like(labels)
    assert roc_auc(rise(entropy, removed), labels) == 1
    assert precision_at_k(rise(entropy, removed), labels, int(labels.sum())) == 1
    mask = perception_mask(entropy, removed, everything, fraction=0.05, ties="cut")
    assert mask.sum(-1).tolist() == [1, 1, 1, 1]
    assert precision(mask, labels) == 1
