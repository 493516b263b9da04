"""Laws of the methods: their options, and what they compute. B responses, T tokens."""

import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokens import (
    GOLDEN,
    assert_gradients_are_the_finite_differences,
    batch_of,
    check,
    every_response,
    golden_tokens,
    tokens_of,
    total,
)

from cppo.methods import CPPO, GRPO, METHODS, PAPO, PGPO, VPPO, build
from cppo.objective import aggregate
from cppo.reward import SECOND_LOOKS

every_method = pytest.mark.parametrize("name", list(METHODS))


# --- options ------------------------------------------------------------------------------------


@every_method
def test_every_method_builds_with_published_defaults_and_its_names_agree(name: str) -> None:
    method = build(name)
    assert isinstance(method, GRPO)
    assert build(name, {"clip_high": 0.33}).clip_high == 0.33
    view_names = [view.name for view in method.views]
    assert len(set(view_names)) == len(view_names)


def test_published_settings_are_the_defaults() -> None:
    dapo, dr_grpo, gspo = build("dapo"), build("dr_grpo"), build("gspo")
    assert (dapo.clip_low, dapo.clip_high, dapo.resample) == (0.2, 0.28, True)
    assert (dapo.aggregation, dapo.normalize) == ("token-mean", True)
    assert (dr_grpo.normalize, dr_grpo.aggregation) == (False, "sequence-sum-norm")
    assert (gspo.clip_low, gspo.clip_high, gspo.aggregation) == (3e-4, 4e-4, "sequence-mean")
    assert not build("grpo").resample
    papo, papo_dapo, vppo, pgpo = build("papo"), build("papo_dapo"), build("vppo"), build("pgpo")
    assert isinstance(papo, PAPO)
    assert isinstance(papo_dapo, PAPO)
    assert (papo.clip_low, papo.clip_high, papo.reference_kl, papo.weight) == (0.2, 0.3, 0.01, 0.02)
    assert (papo.entropy_weight, papo.masked_entropy_weight, papo.resample) == (0.0, 0.0, False)
    assert (papo_dapo.reference_kl, papo_dapo.weight, papo_dapo.entropy_weight) == (0.0, 0.01, 0.03)
    assert papo_dapo.masked_entropy_weight == 0.03
    assert isinstance(vppo, VPPO)
    assert (vppo.fraction, vppo.scale_low, vppo.entropy_weight) == (0.4, 0.9, 0.06)
    assert isinstance(pgpo, PGPO)
    assert (pgpo.threshold, pgpo.tau, pgpo.beta) == ("absolute", 0.4, 2.0)
    assert (pgpo.floor, pgpo.conserve_mass) == (0.0, True)
    for m in (papo_dapo, vppo, pgpo):
        assert (m.clip_low, m.clip_high, m.resample, m.reference_kl) == (0.2, 0.28, True, 0.0)
    sr1, visionary = build("vision_sr1"), build("visionary_r1")
    assert (sr1.clip_low, sr1.clip_high, sr1.dual_clip, sr1.reference_kl) == (0.2, 0.3, 3.0, 0.01)
    assert (sr1.advantage_epsilon, sr1.aggregation, sr1.resample) == (1e-6, "token-mean", False)
    assert (visionary.reference_kl, visionary.reference_kl_schedule) == (0.04, "cosine")
    assert (visionary.advantage_epsilon, visionary.aggregation) == (1e-4, "sequence-mean")
    for name, expected in {
        "cppo": (0.01, 0.1, 0.5, "k3", "floor", "keep", "image", 0.2, False),
        "cppo_areal": (0.01, 0.1, 0.5, "k1", "ceil", "cut", "item", 0.4, True),
    }.items():
        m = build(name)
        assert isinstance(m, CPPO)
        given = (m.weight, m.contrast_temperature, m.fraction, m.divergence, m.count, m.ties)
        assert (*given, m.draw, m.clip_high, m.batch_normalize) == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dr-grpo", {}, r"method 'dr-grpo' is not known; did you mean 'dr_grpo'\? Known: cppo, "),
        ("zzzz", {}, r"method 'zzzz' is not known\. Known: cppo, cppo_areal, dapo, "),
        ("grpo", {"clip_hi": 0.3}, r"'grpo' has no option 'clip_hi'; did you mean 'clip_high'\?"),
        ("grpo", {"fraction": 0.5}, r"'grpo' has no option 'fraction'"),
        ("cppo_areal", {"divergance": "k3"}, r"did you mean 'divergence'\?"),
    ],
)
def test_an_unknown_method_or_option_names_the_nearest(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clip_low", 0.0),
        ("clip_low", 1.01),
        ("clip_low", math.nan),
        ("clip_high", 0.0),
        ("dual_clip", 1.0),
        ("advantage_epsilon", 0.0),
        ("reference_kl", -0.1),
        ("reference_kl_schedule", "sine"),
        ("aggregation", "mean"),
        ("average_over", "rank"),
        ("weight", -1e-9),
        ("fraction", 0.0),
        ("fraction", 1.1),
        ("contrast_temperature", 0.0),
        ("divergence", "k2"),
        ("count", "round"),
        ("ties", "first"),
        ("score", "ratio"),
        ("draw", "step"),
        ("preserving", {}),
        ("preserving", {"rotate": {}}),
        ("removing", {"zoomcrop": {}}),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option} is .*; it must be "):
        build("cppo", {option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "much"}, r"weight is 'much'; it must be a number$"),
        ({"weight": True}, r"weight is True; it must be a number$"),
        ({"weight": None}, r"weight is None; it must be a number$"),
        ({"dual_clip": "3"}, r"dual_clip is '3'; it must be a number, or null$"),
        ({"normalize": "flase"}, r"normalize is 'flase'; it must be true or false$"),
        ({"gate": 1}, r"gate is 1; it must be true or false$"),
        ({"removing_views": 1.5}, r"removing_views is 1.5; it must be a whole number$"),
        ({"preserving": 5}, r"'cppo'.* wrong type"),
        ({"preserving": ["rotation"]}, r"'cppo'.* wrong type"),
        ({"preserving": {"rotation": 5}}, r"'cppo'.* wrong type"),
        ({"removing": {"blakout": {}}}, r"it must be some of .* \(did you mean 'blackout'\?\)$"),
        ({"preserving": {"rotation": {"degree": 5}}}, r"'degree' \(did you mean 'degrees'\?\)"),
        ({"removing": {"rotation": {"degrees": "a"}}}, r"degrees must be .*not 'a'"),
    ],
)
def test_values_and_perturbation_parameters_that_cannot_work_are_refused_at_once(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build("cppo", options)


@pytest.mark.parametrize("name", METHODS)
def test_no_word_passes_for_a_number_or_for_true(name: str) -> None:
    for option, value in dataclasses.asdict(build(name)).items():
        if isinstance(value, bool | int | float) or value is None:
            with pytest.raises(ValueError, match=rf"^{option} is 'no'; it must be "):
                build(name, {option: "no"})


def test_the_ends_of_the_ranges_are_allowed() -> None:
    edges = {"clip_low": 1.0, "fraction": 1.0, "reference_kl": 0.0}
    method = build("cppo", {**edges, "dual_clip": None})
    assert (method.clip_low, method.dual_clip) == (1.0, None)


# --- golden vectors -----------------------------------------------------------------------------


@every_response
@pytest.mark.parametrize("name", ["grpo", "cppo"])
def test_the_clipped_policy_loss_is_the_golden_one(name: str, response: dict[str, Any]) -> None:
    method, tokens = build(name), golden_tokens(response)
    loss = method.terms(tokens, method.plan(tokens))["policy"]
    assert loss.weight == 1.0
    check(loss.per_token[tokens.mask], response["expect"]["clipped_surrogate"])


@every_response
def test_gspos_policy_loss_is_the_golden_one_on_every_token(response: dict[str, Any]) -> None:
    method, tokens = build("gspo"), golden_tokens(response)
    plan = method.plan(tokens)
    loss = method.terms(tokens, plan)["policy"].per_token
    expected = response["expect"]["gspo_surrogate"]
    check(loss[tokens.mask], [expected] * len(response["logprobs"]))
    check(aggregate(loss, plan.averages["policy"].mask, plan.averages["policy"].mode), expected)


@every_response
@pytest.mark.parametrize(
    ("name", "options", "mask_key", "contrast_key"),
    [
        ("cppo", {}, "perception_mask_floor_keep", "contrastive_k3"),
        ("cppo_areal", {}, "perception_mask_ceil_cut", "contrastive_k1"),
        ("cppo", {"score": "absolute"}, "perception_mask_absolute", "contrastive_k3"),
    ],
)
def test_perception_tokens_and_their_contrast_are_the_golden_ones(
    name: str, options: dict[str, Any], mask_key: str, contrast_key: str, response: dict[str, Any]
) -> None:
    method, tokens = build(name, {**options, "weight": 0.7}), golden_tokens(response, advantage=0.5)
    plan = method.plan(tokens)
    mask, expect = plan.averages["perception"].mask, response["expect"]
    assert mask[0].tolist() == [*expect[mask_key], False]
    term = method.terms(tokens, plan)["perception"]
    assert term.weight == 0.7
    kept = [c if m else 0.0 for c, m in zip(expect[contrast_key], expect[mask_key], strict=True)]
    check(term.per_token, [*kept, 0.0])


@every_response
def test_without_a_positive_advantage_no_token_is_a_perception_token(
    response: dict[str, Any],
) -> None:
    method = build("cppo")
    for advantage in (-0.5, 0.0, 1e-9):  # the last is what rounding leaves of a mean
        tokens = golden_tokens(response, advantage=advantage)
        plan = method.plan(tokens)
        assert not plan.averages["perception"].mask.any()
        assert not method.terms(tokens, plan)["perception"].per_token.any()


@pytest.mark.parametrize(
    ("name", "key"),
    [("grpo", "grpo_advantages"), ("cppo", "grpo_advantages"), ("dr_grpo", "dr_grpo_advantages")],
)
def test_advantages_are_the_golden_ones(name: str, key: str) -> None:
    rewards = torch.tensor(GOLDEN["rewards"], dtype=torch.float64)
    check(build(name).score_groups(rewards, GOLDEN["group_size"]), GOLDEN["expect"][key])


# --- hand-worked numbers ------------------------------------------------------------------------


def test_dr_grpo_neither_divides_by_the_spread_nor_by_the_lengths() -> None:
    method = build("dr_grpo")
    advantages = method.score_groups(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
    check(advantages, [0.75, -0.25, -0.25, -0.25], 1e-6)
    tokens = tokens_of([0.0, 0.0, 0.0], advantage=0.75)
    plan = method.plan(tokens)
    average = plan.averages["policy"]
    loss = method.terms(tokens, plan)["policy"].per_token
    check(aggregate(loss, average.mask, average.mode, denominator=10.0), -3 * 0.75 / 10)


def test_the_epsilon_is_added_to_the_deviation_that_advantages_are_divided_by() -> None:
    """Rewards 1e-4 off their mean have a deviation of 2 ** 0.5 times that."""
    rewards = torch.tensor([2e-4, 0.0], dtype=torch.float64)
    for epsilon, advantage in ((1e-6, 1 / (math.sqrt(2) + 0.01)), (1e-4, 1 / (math.sqrt(2) + 1))):
        method = build("grpo", {"advantage_epsilon": epsilon})
        check(method.score_groups(rewards, 2), [advantage, -advantage], 1e-12)
    check(build("grpo").score_groups(rewards, 2)[0], 1 / (math.sqrt(2) + 0.01), 1e-12)


def test_vision_sr1_clips_wider_above_and_bounds_what_is_bad() -> None:
    """Rewards of a right answer with and without a description that suffices, and of wrong ones."""
    method = build("vision_sr1")
    advantages = method.score_groups(torch.tensor([2.0, 1.0, 1.1, 0.1], dtype=torch.float64), 4)
    deviation = math.sqrt(2 * (0.95**2 + 0.05**2) / 3) + 1e-6  # the mean is 1.05
    check(advantages, [0.95 / deviation, -0.05 / deviation, 0.05 / deviation, -0.95 / deviation])
    tokens = batch_of([[math.log(1.5)], [math.log(5.0)]], [1.0, -1.0])
    tokens = replace(tokens, reference_logprobs=tokens.seen.logprobs + math.log(2.0))
    policy, drift = (-1.3 + 3.0) / 2, 2.0 - math.log(2.0) - 1.0
    check(total(method, tokens), policy + 0.01 * drift)


def test_visionary_r1_weighs_responses_alike_and_lets_go_of_the_reference() -> None:
    """Rewards of two right answers, of which one has a caption that suffices."""
    method = build("visionary_r1")
    advantages = method.score_groups(torch.tensor([2.1, 2.0], dtype=torch.float64), 2)
    deviation = 0.1 / math.sqrt(2) + 1e-4
    check(advantages, [0.05 / deviation, -0.05 / deviation])
    tokens = batch_of([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [1.0, -2.0])
    tokens = replace(
        tokens,
        mask=torch.tensor([[True, False, False], [True, True, True]]),
        reference_logprobs=tokens.seen.logprobs + math.log(2.0),
    )
    policy, drift = (-1.0 + 2.0) / 2, 2.0 - math.log(2.0) - 1.0  # over tokens it would be 5 / 4
    for progress, weight in ((0.0, 0.04), (0.5, 0.02), (1.0, 0.0)):
        check(total(method, replace(tokens, progress=progress)), policy + weight * drift)


def test_every_second_look_that_a_method_names_is_a_reward_and_no_other_is() -> None:
    named = {name: build(name).second_look for name in METHODS}
    looks = {name: look for name, look in named.items() if look is not None}
    assert looks == {name: name for name in SECOND_LOOKS}


def test_batch_normalisation_centres_and_scales_over_all_groups() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    once = build("grpo").score_groups(rewards, 4)
    check(once, [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0], 1e-5)  # over a deviation of one half
    twice = build("grpo", {"batch_normalize": True}).score_groups(rewards, 4)
    check(twice, once / math.sqrt(3 / 7), 1e-5)  # 2.25 + 3 * 0.25 squared, over 8 - 1
    skewed = build("dr_grpo", {"batch_normalize": True}).score_groups(rewards, 4)
    check(skewed.std(), 1.0, 1e-5)
    assert torch.equal(build("cppo_areal").score_groups(rewards, 4), twice)


def test_batch_normalisation_leaves_a_batch_without_spread_at_zero() -> None:
    method = build("grpo", {"batch_normalize": True})
    assert method.score_groups(torch.tensor([0.1] * 6), 3).tolist() == [0.0] * 6


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_dual_clip_bounds_the_loss_of_bad_responses_alone(name: str) -> None:
    ratio, wide = 5.0, {"clip_low": 0.2, "clip_high": 0.2}
    free, bounded = build(name, wide), build(name, {**wide, "dual_clip": 3.0})
    for advantage, without, expected in (
        (-2.0, 10.0, 6.0),  # min(5 * 2, 3 * 2)
        (2.0, -2.4, -2.4),  # the upper clip, -1.2 * 2; the bound is for negative advantages
    ):
        tokens = tokens_of([math.log(ratio)], advantage)
        check(free.terms(tokens, free.plan(tokens))["policy"].per_token, without)
        check(bounded.terms(tokens, bounded.plan(tokens))["policy"].per_token, expected)
    tokens = tokens_of([math.log(2.0)], -2.0)
    check(bounded.terms(tokens, bounded.plan(tokens))["policy"].per_token, 4.0)  # not reached


def test_dapos_upper_clip_is_wider_than_its_lower_one() -> None:
    method = build("dapo")
    up, down = tokens_of([math.log(1.5)], 1.0), tokens_of([math.log(0.5)], -1.0)
    check(method.terms(up, method.plan(up))["policy"].per_token, -1.28)
    check(method.terms(down, method.plan(down))["policy"].per_token, 0.8)


@every_method
def test_the_reference_term_is_the_weighted_k3_divergence(name: str) -> None:
    method = build(name, {"reference_kl": 0.04})
    tokens = golden_tokens(GOLDEN["responses"][3])
    drift = math.log(2.0)
    reference = torch.where(tokens.mask, tokens.seen.logprobs + drift, math.nan)
    tokens = replace(tokens, reference_logprobs=reference)
    plan = method.plan(tokens)
    term = method.terms(tokens, plan)["reference_kl"]
    assert term.weight == 0.04
    check(term.per_token[tokens.mask], [2.0 - drift - 1.0] * int(tokens.mask.sum()))
    assert torch.equal(plan.averages["reference_kl"].mask, tokens.mask)
    assert plan.averages["reference_kl"].mode == method.aggregation
    without = build(name, {"reference_kl": 0.0})
    assert "reference_kl" not in without.terms(tokens, without.plan(tokens))
    for schedule, weights in {  # at the start, after a quarter, after half, at the end
        "constant": (0.04, 0.04, 0.04, 0.04),
        "linear": (0.04, 0.03, 0.02, 0.0),
        "cosine": (0.04, 0.02 * (1 + math.sqrt(0.5)), 0.02, 0.0),
    }.items():
        method = build(name, {"reference_kl": 0.04, "reference_kl_schedule": schedule})
        for progress, weight in zip((0.0, 0.25, 0.5, 1.0), weights, strict=True):
            then = replace(tokens, progress=progress)
            annealed = method.terms(then, method.plan(then))["reference_kl"]
            assert annealed.weight == pytest.approx(weight, abs=1e-12)


# --- plans and views ----------------------------------------------------------------------------


@every_method
def test_terms_and_averages_have_the_same_names_and_plans_no_gradient(name: str) -> None:
    method, tokens = build(name), golden_tokens(GOLDEN["responses"][3])
    tokens = replace(tokens, reference_logprobs=tokens.old_logprobs)
    tokens.seen.logprobs.requires_grad_(True)
    tokens.seen.entropy.requires_grad_(True)
    plan = method.plan(tokens)
    assert list(method.terms(tokens, plan)) == list(plan.averages)
    assert plan.advantages.shape == tokens.mask.shape
    assert not plan.advantages.requires_grad
    for average in plan.averages.values():
        assert average.mask.dtype == torch.bool
        assert not (average.mask & ~tokens.mask).any()


@pytest.mark.parametrize("name", [name for name in METHODS if not build(name).views])
def test_gradients_without_views_are_the_finite_differences(name: str) -> None:
    """Ratios lie within every method's clip, that of GSPO too."""
    tokens = batch_of([[1e-4, -2e-4, 5e-5], [0.0, 1e-4, -5e-5]], [1.5, -0.5])
    reference = tokens.seen.logprobs + torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.4, -0.5]])
    tokens = replace(tokens, reference_logprobs=reference)
    assert_gradients_are_the_finite_differences(build(name), tokens)


def test_cppo_asks_for_its_views_for_positive_advantages_only() -> None:
    for name, draw in (("cppo", "image"), ("cppo_areal", "item")):
        preserved, removed = build(name).views
        advantages = torch.tensor([1.0, -1.0, 0.0, 1e-9, 0.01])
        for view in (preserved, removed):
            assert view.needed(advantages).tolist() == [True, False, False, False, True]
            assert (view.gradient, view.draw) == (True, draw)
        assert (preserved.name, preserved.detects) == ("preserved", False)
        assert (removed.name, removed.detects) == ("removed", True)
        assert set(removed.perturbations) == {"occlusion", "zoom_crop"}
        kinds = {"colour_jitter", "perspective", "rotation"}
        blurred = {"gaussian_blur"} if name == "cppo_areal" else set()
        assert set(preserved.perturbations) == kinds | blurred


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_methods_without_contrast_ask_for_no_view(name: str) -> None:
    assert build(name).views == ()


def test_the_contrast_sends_gradient_to_all_three_views() -> None:
    method, tokens = build("cppo"), golden_tokens(GOLDEN["responses"][6], advantage=1.0)
    of_views = [scores.logprobs for scores in (tokens.seen, *tokens.views.values())][:3]
    for logprobs in of_views:
        logprobs.requires_grad_(True)
    plan = method.plan(tokens)
    mask = plan.averages["perception"].mask
    aggregate(method.terms(tokens, plan)["perception"].per_token, mask).backward()
    for logprobs in of_views:
        assert logprobs.grad is not None
        assert logprobs.grad[mask].any()
        assert not logprobs.grad[~mask].any()
