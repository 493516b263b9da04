"""The laws of `cppo.evaluation`: hand-worked values, enumeration, and how often intervals hold."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cppo.config import DataConfig, EvalConfig
from cppo.evaluation import (
    Estimate,
    avg_at_k,
    maj_at_k,
    paired_difference,
    pass_at_k,
    summarise,
)
from cppo.reward import SECOND_LOOKS, Reward, SecondLook
from cppo.rollout import transformers as in_process

MATRICES = st.integers(1, 5).flatmap(
    lambda samples: st.lists(
        st.lists(st.sampled_from([0, 1]), min_size=samples, max_size=samples),
        min_size=1,
        max_size=5,
    )
)


def test_avg_at_k_is_the_mean_accuracy() -> None:
    assert avg_at_k([[1, 0, 0, 1], [1, 1, 1, 0]]).value == 5 / 8
    assert avg_at_k([[0.25], [0.5]]).value == 0.375
    assert avg_at_k([[1, 0], [1, 1]], 1).value == avg_at_k([[1, 0], [1, 1]], 2).value == 0.75


def test_pass_at_k_of_one_right_in_four_is_k_quarters() -> None:
    one_right = [[0, 0, 1, 0]]
    assert [pass_at_k(one_right, k).value for k in (1, 2, 3, 4)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0]
    )
    # Two right in four: the one pair of six that misses both.
    assert pass_at_k([[1, 0, 1, 0]], 2).value == pytest.approx(1 - 1 / 6)
    assert pass_at_k([[1, 0, 1, 0], [0, 0, 0, 0]], 2).value == pytest.approx((1 - 1 / 6) / 2)


def test_pass_at_k_counts_an_accuracy_from_one_half_as_right() -> None:
    assert pass_at_k([[0.5], [0.49]]).value == 0.5


@settings(max_examples=80, deadline=None)
@given(MATRICES, st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(
    matrix: list[list[int]], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(matrix[0])))
    shares = []
    for row in matrix:
        subsets = list(itertools.combinations(row, k))
        shares.append(sum(any(subset) for subset in subsets) / len(subsets))
    estimate = pass_at_k(matrix, k, resamples=1)
    assert estimate.value == pytest.approx(sum(shares) / len(shares), abs=1e-12)


def test_pass_at_k_is_exact_where_binomials_are_large() -> None:
    row = [1] + [0] * 1023
    assert pass_at_k([row], 512).value == pytest.approx(0.5, abs=1e-12)


def test_maj_at_k_scores_the_most_frequent_answer() -> None:
    assert maj_at_k([[1, 0, 1]], [["a", "b", "a"]]).value == 1.0
    assert maj_at_k([[0, 1, 0]], [["a", "b", "a"]]).value == 0.0
    assert maj_at_k([[1, 0, 1], [0, 1, 0]], [["a", "b", "a"], ["a", "b", "a"]]).value == 0.5


def test_a_tied_vote_scores_the_mean_over_the_tied_answers() -> None:
    assert maj_at_k([[1, 0]], [["a", "b"]]).value == 0.5
    assert maj_at_k([[0, 1]], [["b", "a"]]).value == 0.5
    assert maj_at_k([[0, 0, 1]], [["x", "y", "z"]]).value == pytest.approx(1 / 3)
    # The third answer has one vote of five and no part in the tie.
    votes = ["x", "y", "z", "y", "x"]
    assert maj_at_k([[1, 0, 0, 0, 1]], [votes]).value == 0.5


def test_samples_without_an_answer_abstain() -> None:
    assert maj_at_k([[0, 0, 0, 1]], [["", "", "", "a"]]).value == 1.0
    assert maj_at_k([[0, 0]], [["", ""]]).value == 0.0


def test_samples_of_one_answer_count_with_their_mean_accuracy() -> None:
    assert maj_at_k([[1, 0, 0]], [["a", "a", "b"]]).value == 0.5


def test_maj_at_k_votes_in_blocks_of_k() -> None:
    answers = [["a", "a", "b", "b", "b", "a", "b"]]
    accuracies = [[1, 1, 0, 0, 0, 1, 0]]
    assert maj_at_k(accuracies, answers, 3).value == 0.5  # a a b | b b a, and one left over
    assert maj_at_k(accuracies, answers, 7).value == 0.0
    assert maj_at_k(accuracies, answers, 2).value == 0.5  # a a | b b | b a


@settings(max_examples=80, deadline=None)
@given(MATRICES)
def test_with_one_sample_all_metrics_agree(matrix: list[list[int]]) -> None:
    answers = [["right" if sample else "wrong" for sample in row] for row in matrix]
    single = [row[:1] for row in matrix]
    mean = sum(row[0] for row in matrix) / len(matrix)
    options = {"resamples": 1}
    assert avg_at_k(single, **options).value == pytest.approx(mean)
    assert pass_at_k(single, **options).value == pytest.approx(mean)
    assert maj_at_k(single, [row[:1] for row in answers], **options).value == pytest.approx(mean)
    assert pass_at_k(matrix, 1, **options).value == pytest.approx(np.mean(matrix))
    assert maj_at_k(matrix, answers, 1, **options).value == pytest.approx(np.mean(matrix))


def test_a_paired_difference_is_after_minus_before_and_cancels_what_items_share() -> None:
    random = np.random.default_rng(0)
    hardness = random.integers(0, 2, size=(200, 1)).astype(float)
    before = np.repeat(hardness, 4, axis=1)
    after = before.copy()
    after[:20, 0] = 1 - after[:20, 0]
    change = (after - before).sum() / before.size
    estimate = paired_difference(before, after)
    assert estimate.value == pytest.approx(change)
    assert estimate.low <= change <= estimate.high
    # Unpaired, two sets of 200 such items differ by some 0.1 either way.
    assert estimate.high - estimate.low < 0.03
    assert paired_difference(before, before) == Estimate(value=0.0, low=0.0, high=0.0)
    assert paired_difference(after, before).value == pytest.approx(-change)


def test_a_paired_difference_takes_different_numbers_of_samples() -> None:
    assert paired_difference([[0, 1], [0, 0]], [[1], [1]]).value == 0.75


def test_the_interval_of_two_items_is_worked_by_hand() -> None:
    # Resamples of {0, 1}: mean 0 and mean 1 in a quarter each, so both quantiles lie at the ends.
    assert avg_at_k([[0], [1]]) == Estimate(value=0.5, low=0.0, high=1.0)
    assert avg_at_k([[1, 0], [0, 1]]) == Estimate(value=0.5, low=0.5, high=0.5)
    assert avg_at_k([[1]]) == Estimate(value=1.0, low=1.0, high=1.0)


def test_the_interval_is_that_of_the_binomial_distribution() -> None:
    items = 400
    matrix = np.repeat([[1.0], [0.0]], [100, 300], axis=0)
    estimate = avg_at_k(matrix, resamples=20_000)
    half_width = 1.96 * math.sqrt(0.25 * 0.75 / items)
    assert estimate.low == pytest.approx(0.25 - half_width, abs=0.005)
    assert estimate.high == pytest.approx(0.25 + half_width, abs=0.005)


def test_the_interval_depends_on_the_seed_alone() -> None:
    matrix = np.random.default_rng(1).integers(0, 2, size=(37, 3))
    assert avg_at_k(matrix, seed=3) == avg_at_k(matrix, seed=3)
    assert avg_at_k(matrix, seed=3) != avg_at_k(matrix, seed=4)
    assert avg_at_k(matrix, seed=3).value == avg_at_k(matrix, seed=4).value


def test_resamples_drawn_in_blocks_are_as_many_and_as_varied() -> None:
    items = 2**21 // 100  # 200 resamples a block
    matrix = np.random.default_rng(2).random((items, 1))
    estimate = avg_at_k(matrix, resamples=450)
    half_width = 1.96 * math.sqrt(1 / 12 / items)
    assert estimate.high - estimate.low == pytest.approx(2 * half_width, rel=0.2)


@pytest.mark.parametrize("chance", [0.2, 0.5, 0.8])
def test_ninety_five_of_a_hundred_intervals_hold_the_true_value(chance: float) -> None:
    random = np.random.default_rng(5)
    trials, held = 400, 0
    for trial in range(trials):
        # Items differ in hardness: each has its own chance, with the given mean.
        chances = random.beta(4 * chance, 4 * (1 - chance), size=(100, 1))
        matrix = random.random((100, 4)) < chances
        estimate = avg_at_k(matrix.astype(float), resamples=300, seed=trial)
        held += estimate.low <= chance <= estimate.high
    assert 0.91 <= held / trials <= 0.98


def test_a_summary_names_each_metric_with_its_k() -> None:
    accuracies = [[1, 0, 0, 0], [1, 1, 1, 0]]
    answers = [["a", "b", "b", "c"], ["a", "a", "a", ""]]
    summary = summarise(accuracies, answers, 2)
    assert list(summary) == ["avg@2", "pass@2", "maj@2"]
    assert summary["avg@2"] == avg_at_k(accuracies)
    assert summary["pass@2"] == pass_at_k(accuracies, 2)
    assert summary["maj@2"] == maj_at_k(accuracies, answers, 2)
    assert summary["maj@2"].value == (0.25 + 1.0) / 2
    assert list(summarise(accuracies, answers)) == ["avg@4", "pass@4", "maj@4"]


def test_what_is_no_matrix_of_accuracies_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        avg_at_k([1, 0, 1])
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        avg_at_k([])
    with pytest.raises(ValueError, match=r"shape \(2, 0\)"):
        avg_at_k([[], []])
    with pytest.raises(ValueError, match=r"between 0.0 and 1.5"):
        avg_at_k([[0, 1.5]])
    with pytest.raises(ValueError, match="no NaN"):
        avg_at_k([[0, math.nan]])


@pytest.mark.parametrize("k", [0, -1, 3])
def test_k_lies_between_one_and_the_number_of_samples(k: int) -> None:
    answers = [["a", "b"]]
    for metric in (avg_at_k, pass_at_k):
        with pytest.raises(ValueError, match=f"k is {k}, with 2 samples"):
            metric([[0, 1]], k)
    with pytest.raises(ValueError, match=f"k is {k}, with 2 samples"):
        maj_at_k([[0, 1]], answers, k)


def test_shapes_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 rows of lengths \[2\]; accuracies is 1 x 3"):
        maj_at_k([[0, 1, 1]], [["a", "b"]])
    with pytest.raises(ValueError, match=r"1 rows of lengths \[1\]; accuracies is 2 x 1"):
        maj_at_k([[0], [1]], [["a"]])
    with pytest.raises(ValueError, match="before has 1 items and after 2"):
        paired_difference([[0]], [[0], [1]])
    with pytest.raises(ValueError, match="resamples is 0"):
        avg_at_k([[0], [1]], resamples=0)


# --- the command --------------------------------------------------------------------------------


def always_right(response: str, answer: str, question: str, reply: str | None = None) -> Reward:
    return Reward(total=1.0, accuracy=1.0, format=0.0)


@pytest.mark.parametrize("compile", [False, True])
def test_sampling_is_compiled_where_that_is_asked_for(
    compile: bool, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cppo.evaluation.command import run

    asked: list[bool] = []

    def decoder(policy: Any, prompts: Any, responses: int, *, compile: bool) -> Any:
        asked.append(compile)
        return plain(policy, prompts, responses)

    plain = in_process.decoder
    monkeypatch.setattr(in_process, "decoder", decoder)
    run(EvalConfig(model=str(tiny_folder), k=2, count=2, max_new_tokens=4, compile=compile))
    assert set(asked) == {compile}


def test_an_evaluation_by_a_second_look_asks_and_reads_in_its_form(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cppo.evaluation.command import run  # not above: the worker that grades imports this file

    look = SecondLook(
        instruction=" Say it." * 20,
        ask=lambda said, question: None,
        grade=always_right,
        final=lambda said: "7",
    )
    monkeypatch.setitem(SECOND_LOOKS, "visionary_r1", look)
    config = EvalConfig(
        model=str(tiny_folder), reward="visionary_r1", k=2, count=2, max_new_tokens=32
    )
    asked = run(config)
    assert (asked.accuracies, asked.answers) == ([[1.0] * 2] * 2, [["7"] * 2] * 2)
    same = DataConfig(instruction=look.instruction)
    plain = run(replace(config, reward="default", dataset=same))
    assert plain.texts == asked.texts
    assert (plain.accuracies, plain.answers) == ([[0.0] * 2] * 2, [[""] * 2] * 2)
    bare = run(replace(config, dataset=DataConfig(instruction="")))
    assert bare.texts != asked.texts
