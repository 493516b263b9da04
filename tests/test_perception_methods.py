"""Laws of PAPO, VPPO, PGPO, DVRP and NoisyRollout. B responses, T tokens.

The numbers that recur: of a token that is e^gap times as likely on a view, k3 is e^gap - gap - 1;
0.306853 at ln 2, 1.613706 at ln 4, 0.193147 at -ln 2.
"""

import math
from collections.abc import Callable
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
    golden_batch,
    golden_tokens,
    gradients,
    total,
    with_gradient,
)
from torch import Tensor

from cppo.methods import PAPO, PGPO, VPPO, Tokens, View, build
from cppo.methods.noisy_rollout import NoisyRollout
from cppo.objective import divergence

LN2, LN4 = math.log(2), math.log(4)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.0, 1e-9])


def close_to(tokens: Tokens) -> Tokens:
    """The same views, a little way from the policy on the image, with ratios within the clip."""
    generator = torch.Generator().manual_seed(3)

    def near(logprobs: Tensor) -> Tensor:
        return logprobs + 0.1 * torch.randn(logprobs.shape, generator=generator).double()

    views = {
        name: replace(view, logprobs=near(tokens.seen.logprobs))
        for name, view in tokens.views.items()
    }
    old = tokens.seen.logprobs + 0.02
    return replace(tokens, views=views, old_logprobs=old, reference_logprobs=near(old))


def small_batch(*views: str) -> Tokens:
    """Two responses of three tokens, and views close to them."""
    gaps = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    return close_to(batch_of(gaps, [1.5, -0.5], dict.fromkeys(views, gaps)))


# --- PAPO ---------------------------------------------------------------------------------------


@every_response
def test_papos_added_terms_are_the_golden_ones(response: dict[str, Any]) -> None:
    method, tokens = build("papo_dapo"), golden_tokens(response)
    terms = method.terms(tokens, method.plan(tokens))
    assert list(terms) == ["policy", "masked_divergence", "entropy", "masked_entropy"]
    added = sum(
        (term.weight * term.per_token for name, term in terms.items() if name != "policy"),
        torch.zeros(()),
    )
    check(added[tokens.mask], response["expect"]["papo_loss"])


def test_papo_of_a_hand_worked_response() -> None:
    # k3 of the two tokens: 0.306853 and 0.193147, on average 1/4. l is -1 and -1, masked l is
    # -1 + ln 2 and -1 - ln 2: both entropies are 1. The ratio is 1: the policy's loss is -A.
    tokens = batch_of([[0.0, 0.0]], [2.0], {"masked": [[LN2, -LN2]]})
    options = {"weight": 0.5, "entropy_weight": 0.1, "masked_entropy_weight": 0.03}
    check(total(build("papo", {**options, "reference_kl": 0}), tokens), -2 - 0.125 + 0.1 + 0.03)


def test_papo_raises_the_divergence_and_lowers_the_entropies() -> None:
    tokens = small_batch("masked")
    logprobs = tokens.seen.logprobs.clone().requires_grad_()
    masked = tokens.views["masked"]
    seen = replace(tokens, seen=replace(tokens.seen, logprobs=logprobs))
    still = replace(tokens, advantages=torch.zeros(2, dtype=torch.float64))
    alone = {"reference_kl": 0.0, "weight": 0.0, "masked_entropy_weight": 1.0}  # a constant
    for options, wanted in (
        ({**alone, "weight": 1.0}, divergence(logprobs, masked.logprobs).mean()),
        ({**alone, "entropy_weight": 1.0}, logprobs.mean()),
    ):
        method = build("papo", options)
        found = torch.autograd.grad(total(method, seen, method.plan(still)), logprobs)
        raised = torch.autograd.grad(wanted, logprobs)
        check(-found[0], raised[0])


def test_papos_masked_branch_is_constant_unless_it_learns() -> None:
    for learns in (False, True):
        method = build("papo", {"learns_masked": learns})
        [view] = method.views
        assert (view.name, view.gradient, view.detects) == ("masked", learns, False)
        assert view.needed(ADVANTAGES).all()
        [(name, parameters)] = view.perturbations.items()
        assert (name, parameters["ratio"], parameters["patch_pixels"]) == ("patch_mask", 0.6, 14)
        assert parameters["fill"] == "black"


def test_papos_gradients_are_the_finite_differences() -> None:
    options = {"weight": 0.5, "entropy_weight": 0.2, "masked_entropy_weight": 0.3}
    for name in ("papo", "papo_dapo"):
        method = build(name, {**options, "reference_kl": 0.1, "learns_masked": True})
        assert_gradients_are_the_finite_differences(method, small_batch("masked"))


@pytest.mark.parametrize(
    ("name", "learning", "views"),
    [("papo", "learns_masked", ["masked"]), ("dvrp", "learns_views", ["masked", "noised"])],
)
def test_views_are_constant_unless_they_learn_whoever_scored_them(
    name: str, learning: str, views: list[str]
) -> None:
    weight = "masked_entropy_weight" if name == "papo" else "view_entropy_weight"
    for learns in (False, True):
        method, tokens = build(name, {learning: learns, weight: 0.3}), small_batch(*views)
        tokens, leaves = with_gradient(tokens)
        found = gradients(total(method, tokens), leaves)
        assert [found[view].any() for view in views] == [learns] * len(views)
        assert found["seen"].any()


def test_a_view_is_needed_by_terms_that_have_a_weight_alone() -> None:
    def needed(name: str, **options: float) -> list[str]:
        return [view.name for view in build(name, options).views]

    with pytest.raises(ValueError, match="above 0 where masked_entropy_weight is 0"):
        build("papo", {"weight": 0, "entropy_weight": 0.1})
    assert needed("dvrp", masked_weight=0, view_entropy_weight=0) == ["noised"]
    assert needed("dvrp", noised_weight=0, view_entropy_weight=0) == ["masked"]
    assert needed("dvrp", noised_weight=0) == ["masked", "noised"]


def test_a_pair_of_policies_apart_beyond_the_clamp_is_pushed_no_further() -> None:
    tokens = batch_of([[0.0]], [0.0], {"masked": [[-11.5]]})
    logprobs = tokens.seen.logprobs.clone().requires_grad_()
    seen = replace(tokens, seen=replace(tokens.seen, logprobs=logprobs))
    loss = total(build("papo", {"reference_kl": 0.0}), seen)
    assert loss.item() == pytest.approx(-0.02 * 10)
    assert torch.autograd.grad(loss, logprobs)[0].item() == 0


# --- VPPO ---------------------------------------------------------------------------------------


def test_vppos_filter_and_scales_are_the_golden_ones() -> None:
    tokens = golden_batch(GOLDEN["responses"])
    advantages = build("vppo").plan(tokens).advantages
    for number, response in enumerate(GOLDEN["responses"]):
        expect, length = response["expect"], len(response["logprobs"])
        factor = response["advantage"] * expect["vppo_alpha"]
        kept = [factor if kept else 0.0 for kept in expect["vppo_mask"]]
        check(advantages[number, :length], kept)


def test_vppo_of_a_hand_worked_batch() -> None:
    # Mean k3: 0.1534 and 0, normalised 1 and 0, on average 1/2: top = 0.9 + 0.1 / 0.5 = 1.1. Of two
    # tokens ceil(0.8) = 1 is kept, the earlier where they tie. The average is over all four.
    tokens = batch_of([[0.0, 0.0], [0.0, 0.0]], [2.0, -1.0], {"masked": [[0, LN2], [0, 0]]})
    method = build("vppo")
    plan = method.plan(tokens)
    check(plan.advantages, [[0, 2.2], [-0.9, 0]], 1e-7)
    assert plan.averages["policy"].mask.all()
    check(total(method, tokens), (-2.2 + 0.9) / 4 + 0.06, 1e-7)  # -l is 1 on each token


def test_vppos_scales_have_a_mean_of_one_and_keep_the_order_of_dependency() -> None:
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn(6, 5, generator=generator).mul(torch.arange(1, 7)[:, None] / 6).tolist()
    tokens = batch_of([[0.0] * 5] * 6, [1.0] * 6, {"masked": gaps})
    scales = build("vppo", {"fraction": 1.0, "scale_low": 0.7}).plan(tokens).advantages
    assert torch.equal(scales, scales[:, :1].expand(6, 5))
    check(scales.mean(), 1.0, 1e-6)
    assert scales.min().item() == pytest.approx(0.7)
    means = divergence(tokens.seen.logprobs, tokens.views["masked"].logprobs).mean(-1)
    assert scales[:, 0].argsort().tolist() == means.argsort().tolist()


def test_vppos_filter_and_scaling_can_be_had_alone() -> None:
    tokens = batch_of([[0.0, 0.0], [0.0, 0.0]], [2.0, -1.0], {"masked": [[0, LN2], [0, 0]]})
    filtered = build("vppo", {"scale_low": 1.0}).plan(tokens).advantages
    check(filtered, [[0, 2], [-1, 0]])
    scaled = build("vppo", {"fraction": 1.0}).plan(tokens).advantages
    check(scaled, [[2.2, 2.2], [-0.9, -0.9]], 1e-7)


def test_vppo_leaves_advantages_alone_where_no_response_depends_more_than_another() -> None:
    method = build("vppo", {"fraction": 1.0})
    for gaps in ([[0.0, 0.0]] * 2, [[LN2, 0.0], [0.0, LN2]], [[LN2, 0.0], [1e-4, LN2]]):
        tokens = batch_of([[0.0, 0.0]] * 2, [2.0, -1.0], {"masked": gaps})
        assert method.plan(tokens).advantages.tolist() == [[2, 2], [-1, -1]]


def test_vppo_leaves_out_responses_without_an_advantage_and_idle_ones() -> None:
    # Both would be the response with the least dependency, or a share of the mean.
    method = build("vppo")
    whole = batch_of([[0.0, 0.0]] * 2, [2.0, -1.0], {"masked": [[0, LN2], [0.5, 0]]})
    plan = method.plan(whole)
    more = batch_of(
        [[0.0, 0.0]] * 4, [2.0, -1.0, 0.0, 3.0], {"masked": [[0, LN2], [0.5, 0], [0, 0], [0, 0]]}
    )
    more.mask[3] = False
    found = method.plan(more)
    check(found.advantages[:2], plan.advantages)
    assert not found.advantages[2].any()
    assert found.averages["policy"].mask.sum() == 6  # the mean over all tokens
    assert found.averages["entropy"].mask.tolist() == [[True] * 2] * 2 + [[False] * 2] * 2
    nobody = batch_of([[0.0, 0.0]], [0.0], {"masked": [[0.0, 0.0]]})
    assert not method.plan(nobody).advantages.any()


def test_vppo_scales_over_the_mini_batch_of_all_processes_or_over_its_own() -> None:
    gaps = [[0, LN2], [0, 0], [LN4, LN4], [LN4, LN2]]
    whole = batch_of([[0.0, 0.0]] * 4, [1.0, -1.0, 2.0, -2.0], {"masked": gaps})
    expected = build("vppo").plan(whole).advantages
    calls: list[Tensor] = []

    def parts(gather: Callable[[int], Callable[[Tensor], Tensor]]) -> list[Tokens]:
        return [
            replace(
                batch_of([[0.0, 0.0]] * 2, advantages, {"masked": gaps[start : start + 2]}),
                gather=gather(number),
            )
            for number, (start, advantages) in enumerate([(0, [1.0, -1.0]), (2, [2.0, -2.0])])
        ]

    def noting(_: int) -> Callable[[Tensor], Tensor]:
        return lambda own: calls.append(own) or own  # type: ignore[func-returns-value]

    for tokens in parts(noting):
        build("vppo").plan(tokens)
    assert [len(own) for own in calls] == [2, 2]  # once in each process
    shared = torch.cat(calls)
    pieces = [build("vppo").plan(t).advantages for t in parts(lambda _: lambda own: shared)]
    check(torch.cat(pieces), expected)

    def forbidden(_: int) -> Callable[[Tensor], Tensor]:
        def collective(own: Tensor) -> Tensor:
            raise AssertionError("a process by itself waits for nobody")

        return collective

    alone = build("vppo", {"scale_over": "process"})
    pieces = [alone.plan(tokens).advantages for tokens in parts(forbidden)]
    check(pieces[0], [[0, 1.1], [-0.9, 0]], 1e-7)
    assert not torch.allclose(torch.cat(pieces), expected)


def test_a_broken_dependency_shows_in_every_advantage() -> None:
    tokens = batch_of([[0.0, 0.0]] * 2, [1.0, -1.0], {"masked": [[0, math.nan], [0, 0]]})
    assert build("vppo", {"fraction": 1.0}).plan(tokens).advantages.isnan().all()


def test_vppos_gradients_are_the_finite_differences_and_the_filter_stops_them() -> None:
    tokens = small_batch("masked")
    constant = {"without": ["masked"]}
    assert_gradients_are_the_finite_differences(build("vppo"), tokens, **constant)
    method = build("vppo", {"entropy_weight": 0.0})
    assert_gradients_are_the_finite_differences(method, tokens, **constant)
    logprobs = tokens.seen.logprobs.clone().requires_grad_()
    seen = replace(tokens, seen=replace(tokens.seen, logprobs=logprobs))
    plan = method.plan(tokens)
    [gradient] = torch.autograd.grad(total(method, seen, plan), logprobs)
    assert (gradient != 0).sum(-1).tolist() == [2, 2]  # ceil(0.4 * 3)
    assert torch.equal(gradient != 0, plan.advantages != 0)
    ratio = math.exp(-0.02)
    check(gradient, -plan.advantages * ratio / 6)


def test_vppo_asks_for_its_view_where_there_is_an_advantage() -> None:
    method = build("vppo")
    assert isinstance(method, VPPO)
    [view] = method.views
    assert (view.name, view.gradient, view.detects) == ("masked", False, True)
    assert view.needed(ADVANTAGES).tolist() == [True, True, False, False]
    assert view.needed(torch.tensor([math.nan])).item()
    [(name, parameters)] = view.perturbations.items()
    assert (name, parameters["ratio"], parameters["patch_pixels"]) == ("patch_mask", 0.5, 14)


# --- PGPO ---------------------------------------------------------------------------------------


@every_response
def test_pgpos_weights_are_the_golden_ones(response: dict[str, Any]) -> None:
    method, tokens = build("pgpo"), golden_tokens(response)
    weights = method.plan(tokens).advantages / response["advantage"]
    check(weights[tokens.mask], response["expect"]["pgpo_weights"])


# S = 0, 0.306853, 1.613706; log(1+S) = 0, 0.267622, 0.960769; I = 0, 0.278550, 1.
GAPS = [[0.0, LN2, LN4]]
IMPORTANCE = math.log(3 - 1 - LN2) / math.log(5 - 1 - LN4)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"conserve_mass": False}, [0, IMPORTANCE / 0.4, 3]),
        ({}, [3 * w / (IMPORTANCE / 0.4 + 3) for w in (0, IMPORTANCE / 0.4, 3)]),
        ({"conserve_mass": False, "floor": 0.1}, [0.1, IMPORTANCE / 0.4, 3]),
        ({"floor": 0.1}, [3 * w / (IMPORTANCE / 0.4 + 3.1) for w in (0.1, IMPORTANCE / 0.4, 3)]),
        ({"conserve_mass": False, "tau": 0.2}, [0, 1 + 2 * (IMPORTANCE - 0.2) / 0.8, 3]),
        ({"conserve_mass": False, "beta": 0.0}, [0, IMPORTANCE / 0.4, 1]),
        ({"conserve_mass": False, "tau": 0.0}, [1, 1 + 2 * IMPORTANCE, 3]),
        ({"conserve_mass": False, "tau": 1.0}, [0, IMPORTANCE, 1]),
        # floor(0.4 * 3) = 1 token lies below the second smallest I, which is then tau.
        ({"conserve_mass": False, "threshold": "quantile"}, [0, 1, 3]),
        ({"conserve_mass": False, "threshold": "quantile", "tau": 0.99}, [0, IMPORTANCE, 1]),
        ({"conserve_mass": False, "threshold": "quantile", "tau": 1.0}, [0, IMPORTANCE, 1]),
        ({"conserve_mass": False, "threshold": "quantile", "tau": 0}, [1, 1 + 2 * IMPORTANCE, 3]),
    ],
)
def test_pgpos_weights_of_a_hand_worked_response(
    options: dict[str, Any], weights: list[float]
) -> None:
    assert pytest.approx(0.278550, abs=1e-6) == IMPORTANCE
    tokens = batch_of([[0.0] * 3], [-2.0], {"blind": GAPS})
    advantages = build("pgpo", options).plan(tokens).advantages
    check(advantages / -2, weights, 1e-7)


def test_pgpos_weights_conserve_the_mass_and_keep_the_order_of_dependency() -> None:
    generator = torch.Generator().manual_seed(1)
    gaps = torch.randn(4, 9, generator=generator).tolist()
    tokens = batch_of([[0.0] * 9] * 4, [1.0] * 4, {"blind": gaps})
    for options in ({}, {"threshold": "quantile"}, {"floor": 0.1, "beta": 5.0}):
        weights = build("pgpo", options).plan(tokens).advantages
        check(weights.mean(-1), torch.ones(4))
        dependency = divergence(tokens.seen.logprobs, tokens.views["blind"].logprobs)
        ranked = weights.gather(1, dependency.argsort(-1))
        assert (ranked.diff(dim=-1) >= 0).all()


def test_pgpo_sees_dependency_beyond_the_clamp_of_other_methods() -> None:
    # A token that is e^-15 times as likely to a blind policy depends more than one at e^-12.
    tokens = batch_of([[0.0] * 3], [1.0], {"blind": [[0.0, -12.0, -15.0]]})
    weights = build("pgpo", {"conserve_mass": False}).plan(tokens).advantages
    expected = math.log(12 + math.exp(-12)) / math.log(15 + math.exp(-15))
    check(weights, [0, 1 + 2 * (expected - 0.4) / 0.6, 3], 1e-7)


@pytest.mark.parametrize("gaps", [[0.0, 0.0], [LN2, LN2], [0.0, 1e-5]])
def test_a_response_that_depends_no_more_here_than_there_keeps_weights_of_one(
    gaps: list[float],
) -> None:
    for options in ({}, {"conserve_mass": False, "floor": 0.1}, {"threshold": "quantile"}):
        tokens = batch_of([[0.0, 0.0]], [-2.0], {"blind": [gaps]})
        assert build("pgpo", options).plan(tokens).advantages.tolist() == [[-2.0, -2.0]]


def test_pgpos_gradients_are_the_finite_differences_weighted_token_by_token() -> None:
    tokens, method = small_batch("blind"), build("pgpo")
    assert_gradients_are_the_finite_differences(method, tokens, without=["blind"])
    logprobs = tokens.seen.logprobs.clone().requires_grad_()
    seen = replace(tokens, seen=replace(tokens.seen, logprobs=logprobs))
    plan = method.plan(tokens)
    [gradient] = torch.autograd.grad(total(method, seen, plan), logprobs)
    check(gradient, -plan.advantages * math.exp(-0.02) / 6)


def test_pgpo_asks_to_be_scored_blind_once_where_there_is_an_advantage() -> None:
    method = build("pgpo")
    assert isinstance(method, PGPO)
    [view] = method.views
    blind = View(name="blind", blind=True, gradient=False, detects=True, nonzero_only=True)
    assert view == blind
    assert not view.perturbations
    assert view.needed(ADVANTAGES).tolist() == [True, True, False, False]


# --- DVRP ---------------------------------------------------------------------------------------


def test_dvrp_of_a_hand_worked_response() -> None:
    # Masked: k3 0.306853, -l 1 - ln 2. Noised: k3 0.193147, -l 1 + ln 2. A ratio of 1: -A.
    views = {"masked": [[LN2]], "noised": [[-LN2]]}
    tokens = batch_of([[0.0]], [2.0], views)
    expected = -2 - 0.01 * 0.306853 + 0.01 * 0.193147 + 0.05 * (1 - LN2) + 0.05 * (1 + LN2)
    check(total(build("dvrp"), tokens), expected, 1e-7)
    without = {"masked_weight": 0, "noised_weight": 0, "view_entropy_weight": 0}
    check(total(build("dvrp", without), tokens), -2)


def test_dvrps_gradients_are_the_finite_differences() -> None:
    options = {"masked_weight": 0.5, "noised_weight": 0.4, "view_entropy_weight": 0.3}
    tokens = small_batch("masked", "noised")
    assert_gradients_are_the_finite_differences(build("dvrp", options), tokens)


def test_dvrps_views_are_masked_and_noised_and_learn_unless_told_otherwise() -> None:
    for learns in (True, False):
        masked, noised = build("dvrp", {"learns_views": learns}).views
        assert (masked.name, noised.name) == ("masked", "noised")
        assert masked.perturbations["patch_mask"]["ratio"] == 0.6
        assert noised.perturbations == {"diffusion_noise": {"step": 500}}
        for view in (masked, noised):
            assert (view.gradient, view.detects) == (learns, False)
            assert view.needed(ADVANTAGES).all()


# --- NoisyRollout -------------------------------------------------------------------------------


def test_noise_falls_as_published() -> None:
    # floor(500 (1 - sigmoid(30 (t - 40) / 60))): half at step 40; sigmoid(4) = 0.982 at 48.
    method = NoisyRollout()
    steps = {}
    for step in (1, 27, 40, 48, 53, 60):
        view = method.rollout_view(step / 60)
        steps[step] = view.perturbations["diffusion_noise"]["step"] if view else None
    assert steps == {1: 499, 27: 499, 40: 250, 48: 8, 53: None, 60: None}
    assert method.views == ()
    steep = NoisyRollout(noise_slope=1e6)
    assert steep.rollout_view(0.0) == View(
        name="noised", perturbations={"diffusion_noise": {"step": 500}}
    )
    assert steep.rollout_view(1.0) is None


def test_other_methods_sample_on_the_images() -> None:
    for name in ("grpo", "cppo", "vppo"):
        assert build(name).rollout_view(0.0) is None


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("papo", "weight", -0.1),
        ("papo", "entropy_weight", -0.1),
        ("papo", "masked_entropy_weight", math.nan),
        ("papo", "masking", {}),
        ("papo", "masking", {"patchmask": {}}),
        ("vppo", "fraction", 0.0),
        ("vppo", "scale_low", 1.1),
        ("vppo", "scale_over", "rank"),
        ("vppo", "entropy_weight", -1),
        ("pgpo", "threshold", "relative"),
        ("pgpo", "tau", 1.1),
        ("pgpo", "beta", -1),
        ("pgpo", "floor", -0.1),
        ("dvrp", "masked_weight", -1),
        ("dvrp", "noised_weight", -1),
        ("dvrp", "view_entropy_weight", -1),
        ("dvrp", "noising", {"noise": {}}),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option} is .*; it must be "):
        build(name, {option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [("noise_step", 1000), ("noise_step", 0.5), ("noise_slope", -1), ("noise_midpoint", 2)],
)
def test_noise_that_cannot_be_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option} is .*; it must be "):
        NoisyRollout(**{option: value})


def test_perturbation_parameters_that_cannot_work_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="ratio must be a number from 0 to 1"):
        build("papo", {"masking": {"patch_mask": {"ratio": 2}}})
    assert isinstance(build("papo", {"masking": {"blackout": {}}}), PAPO)
