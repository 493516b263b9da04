"""Laws of what CPPO offers beyond its published settings. B responses, T tokens."""

import itertools
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
    golden_tokens,
    gradients,
    total,
    with_gradient,
)
from torch import Tensor
from torch.nn.functional import softplus

from cppo.methods import CPPO, Scores, Tokens, build
from cppo.objective import divergence

LN2 = math.log(2)


def cppo(**options: Any) -> CPPO:
    method = build("cppo", options)
    assert isinstance(method, CPPO)
    return method


def entropies(*rows: list[float]) -> Tensor:
    """Of one response each; divergences too."""
    return torch.tensor(rows, dtype=torch.float64)


def seen_and_removed(removed: int = 1) -> Tokens:
    """Two responses of four tokens, of which entropy rises on half; views close to the image."""
    generator = torch.Generator().manual_seed(5)

    def noise() -> Tensor:
        return 0.1 * torch.randn(2, 4, generator=generator, dtype=torch.float64)

    tokens = batch_of([[0.01] * 4] * 2, [1.5, 0.5])
    names = ["preserved", *(f"removed_{n}" if n > 1 else "removed" for n in range(1, removed + 1))]
    entropy = 1 + entropies([0.5, -0.5, 0.4, -0.4], [-0.5, 0.3, -0.3, 0.2])
    views = {
        name: Scores(logprobs=tokens.seen.logprobs + noise(), entropy=entropy + noise())
        for name in names
    }
    seen = replace(tokens.seen, entropy=torch.ones(2, 4).double())
    return replace(tokens, seen=seen, views=views)


def perception(method: CPPO, tokens: Tokens) -> list[list[bool]]:
    return method.plan(tokens).averages["perception"].mask.tolist()  # type: ignore[no-any-return]


# --- which tokens -------------------------------------------------------------------------------


def test_tokens_can_be_kept_by_a_threshold_or_by_their_share_of_the_rise() -> None:
    # Entropy rises from 1 by 1, 0.25, 3, -0.5 and 0.75; relative to the removed view's 1/2, 1/5,
    # 3/4, - and 3/7. Their sum is 5 in nats.
    tokens = batch_of([[0.0] * 5], [1.0], {"preserved": [[0.1] * 5], "removed": [[0.2] * 5]})
    views = {
        **tokens.views,
        "removed": replace(tokens.views["removed"], entropy=entropies([2.0, 1.25, 4, 0.5, 1.75])),
    }
    tokens = replace(
        tokens, seen=replace(tokens.seen, entropy=torch.ones(1, 5).double()), views=views
    )
    nats: dict[str, Any] = {"score": "absolute"}
    for options, kept in (
        ({"keep": "rise_above"}, [0, 1, 2, 4]),
        ({"keep": "rise_above", "threshold": 0.45}, [0, 2]),
        ({"keep": "rise_above", "threshold": 0.75, **nats}, [0, 2]),
        ({"keep": "rise_above", "threshold": 3.0, **nats}, []),
        ({"keep": "share_of_rise", "fraction": 0.6, **nats}, [2]),
        ({"keep": "share_of_rise", "fraction": 0.7, **nats}, [2]),
        ({"keep": "share_of_rise", "fraction": 0.7, "count": "ceil", **nats}, [0, 2]),
        ({"keep": "share_of_rise", "fraction": 0.8, **nats}, [0, 2]),
        ({"keep": "share_of_rise", "fraction": 1.0, **nats}, [0, 1, 2, 4]),
        ({"keep": "share_of_rise", "fraction": 0.1, **nats}, [2]),
    ):
        assert perception(cppo(**options), tokens) == [[t in kept for t in range(5)]], options


def test_tokens_can_be_ranked_by_the_divergence_whatever_their_entropy_does() -> None:
    # k3 of the removed view: 0.307, 0, 1.614, 0.193; candidates are those above zero, half of
    # three, rounded down, is one. The first token's entropy rises most.
    gaps = [[LN2, 0.0, 2 * LN2, -LN2]]
    tokens = batch_of([[0.0] * 4], [1.0], {"preserved": [[0.0] * 4], "removed": gaps})
    removed = replace(tokens.views["removed"], entropy=entropies([9.0, 0, 0, 0]))
    tokens = replace(tokens, views={**tokens.views, "removed": removed})
    assert perception(cppo(), tokens) == [[True, False, False, False]]
    assert perception(cppo(score="divergence"), tokens) == [[False, False, True, False]]
    every = {"score": "divergence", "fraction": 1.0}
    assert perception(cppo(**every), tokens) == [[True, False, True, True]]
    # k1 is positive only where the token is less likely on the removed view.
    assert perception(cppo(**every, divergence="k1"), tokens) == [[False, False, False, True]]
    over_the_vocabulary = replace(removed, divergence=entropies([0.1, 0.5, 0.2, 0.0]))
    tokens = replace(tokens, views={**tokens.views, "removed": over_the_vocabulary})
    assert perception(cppo(**every, divergence="full"), tokens) == [[True, True, True, False]]
    above = {**every, "divergence": "full", "keep": "rise_above", "threshold": 0.15}
    assert perception(cppo(**above), tokens) == [[False, True, True, False]]


def test_only_responses_with_a_positive_advantage_have_perception_tokens_however_chosen() -> None:
    for options in ({"score": "divergence"}, {"keep": "rise_above"}, {"keep": "share_of_rise"}):
        tokens = golden_tokens(GOLDEN["responses"][6], advantage=1.0)
        assert any(perception(cppo(**options), tokens)[0])
        for advantage in (-1.0, 0.0, 1e-9):
            tokens = golden_tokens(GOLDEN["responses"][6], advantage=advantage)
            assert not any(perception(cppo(**options), tokens)[0])


def test_several_removing_views_are_averaged() -> None:
    # Entropies 1 and 4 average to 2.5, 3 and 0 to 1.5: against 1.75 only the first token's rises.
    # Their k3 average to (0.306853 + 0.193147) / 2 = 1/4 there; preserved, it is 0.193147.
    names = ("removed", "removed_2")
    tokens = batch_of(
        [[0.0, 0.0]],
        [1.0],
        {"preserved": [[-LN2, 0]], "removed": [[LN2, 0]], "removed_2": [[-LN2, 0]]},
    )
    views = dict(tokens.views)
    for name, row in zip(names, ([1.0, 3.0], [4.0, 0.0]), strict=True):
        views[name] = replace(views[name], entropy=entropies(row))
    seen = replace(tokens.seen, entropy=entropies([1.75, 1.75]))
    tokens = replace(tokens, seen=seen, views=views)
    method = cppo(removing_views=2, contrast_temperature=0.5)
    assert [view.name for view in method.views] == ["preserved", *names]
    assert [view.detects for view in method.views] == [False, True, True]
    assert perception(method, tokens) == [[True, False]]
    contrast = method.terms(tokens, method.plan(tokens))["perception"].per_token
    margin = torch.tensor((LN2 - 0.5 - 0.25) / 0.5, dtype=torch.float64)
    check(contrast, [softplus(margin).item(), 0])
    alike = {"removed_2": views["removed"], "removed_3": views["removed"]}
    thrice = replace(tokens, views={**views, **alike})
    one, three = cppo(), cppo(removing_views=3)
    check(total(three, thrice), total(one, tokens))


def test_without_the_gate_all_responses_are_contrasted() -> None:
    # The same response four times, half of whose entropies rise: one token of it is kept.
    tokens = seen_and_removed()

    def alike(scores: Scores) -> Scores:
        logprobs, entropy = (v[:1].expand(4, 4) for v in (scores.logprobs, scores.entropy))
        return Scores(logprobs=logprobs, entropy=entropy)

    tokens = replace(
        tokens,
        mask=tokens.mask[:1].expand(4, 4),
        advantages=torch.tensor([1.0, -1.0, 0.0, 1e-9], dtype=torch.float64),
        old_logprobs=tokens.old_logprobs[:1].expand(4, 4),
        seen=alike(tokens.seen),
        views={name: alike(view) for name, view in tokens.views.items()},
    )
    gated, free = cppo(), cppo(gate=False)
    [kept, *others] = perception(gated, tokens)
    assert sum(kept) == 1
    assert others == [[False] * 4] * 3
    assert perception(free, tokens) == [kept] * 4
    assert [view.needed(tokens.advantages).tolist() for view in gated.views] == [
        [True, False, False, False]
    ] * 2
    assert all(view.needed(tokens.advantages).all() for view in free.views)
    check(total(free, tokens), total(gated, tokens))  # an average over what is alike


# --- what the contrast is of, and whom it moves ---------------------------------------------------


def test_the_contrast_can_be_of_divergences_over_the_whole_vocabulary() -> None:
    tokens = seen_and_removed()
    full = {"preserved": 0.3, "removed": 0.1}
    views = {
        name: replace(view, divergence=entropies(*[[full[name]] * 4] * 2).requires_grad_())
        for name, view in tokens.views.items()
    }
    tokens = replace(tokens, views=views)
    method = cppo(divergence="full", weight=1.0)
    assert [view.full_divergence for view in method.views] == [True, True]
    assert not any(view.full_divergence for view in cppo().views)
    plan = method.plan(tokens)
    assert plan.averages["perception"].mask.sum() == 2
    contrast = method.terms(tokens, plan)["perception"].per_token
    mask = plan.averages["perception"].mask
    check(contrast, torch.where(mask, softplus(torch.tensor(2.0).double()), 0.0))
    to_preserved, to_removed = (views[name].divergence for name in ("preserved", "removed"))
    assert to_preserved is not None
    assert to_removed is not None
    found = torch.autograd.grad(contrast.sum(), [to_preserved, to_removed])
    slope = 10 / (1 + math.exp(-2))  # of softplus(10 x) at 2
    check(found[0], mask.double() * slope)
    check(found[1], -mask.double() * slope)


@pytest.mark.parametrize(
    "stopped",
    [
        names
        for size in range(3)
        for names in itertools.combinations(("image", "preserved", "removed"), size)
    ],
)
def test_the_contrast_sends_no_gradient_where_it_is_stopped_and_the_same_elsewhere(
    stopped: tuple[str, ...],
) -> None:
    method = cppo(stop_gradient=list(stopped), policy_term=False)
    for view in method.views:
        assert view.gradient == (view.name not in stopped)
    tokens, leaves = with_gradient(seen_and_removed())
    found = gradients(total(method, tokens), leaves)
    free = gradients(total(cppo(policy_term=False), tokens), leaves)
    assert free["seen"].any()
    still = {"seen" if name == "image" else name for name in stopped}
    for name, gradient in found.items():
        check(gradient, torch.zeros_like(free[name]) if name in still else free[name])


def test_the_policy_term_still_moves_the_image_where_the_contrast_does_not() -> None:
    tokens, leaves = with_gradient(seen_and_removed())
    stopped = gradients(total(cppo(stop_gradient=["image"]), tokens), leaves)["seen"]
    check(stopped, gradients(total(build("grpo"), tokens), leaves)["seen"])
    assert stopped.any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": "k1"},
        {"keep": "rise_above"},
        {"keep": "share_of_rise"},
        {"score": "divergence"},
        {"removing_views": 3},
        {"gate": False},
        {"policy_term": False},
        {"policy_term": False, "reference_kl": 0.1},
    ],
)
def test_gradients_are_the_finite_differences(options: dict[str, Any]) -> None:
    method = cppo(weight=0.5, **options)
    tokens = seen_and_removed(options.get("removing_views", 1))
    tokens = replace(tokens, reference_logprobs=tokens.old_logprobs - 0.1)
    assert_gradients_are_the_finite_differences(method, tokens)


def test_cppo_areal_of_a_hand_worked_response() -> None:
    # All three entropies rise, by 3/4, 1/2 and 1/5 of the removed view's: ceil(3/2) = 2 are kept.
    # There l- - l+ is -0.2 and 0: ln(1 + e^-2) = 0.126928 and ln 2, on average 0.410038. Ratios are
    # 1, so the policy's loss is -2.
    gaps = {"preserved": [[0.1, 0.2, 0.0]], "removed": [[-0.1, 0.2, 0.0]]}
    tokens = batch_of([[0.0] * 3], [2.0], gaps)
    removed = replace(tokens.views["removed"], entropy=entropies([4.0, 2.0, 1.25]))
    seen = replace(tokens.seen, entropy=torch.ones(1, 3).double())
    tokens = replace(tokens, seen=seen, views={**tokens.views, "removed": removed})
    method = build("cppo_areal", {"weight": 0.5})
    perceived = method.plan(tokens).averages["perception"].mask
    assert perceived.tolist() == [[True, True, False]]
    check(total(method, tokens), -2 + 0.5 * 0.410038, 1e-6)
    assert_gradients_are_the_finite_differences(method, tokens)


def test_the_contrast_trains_alone_without_the_policy_term() -> None:
    tokens = seen_and_removed()
    alone, both = cppo(policy_term=False, weight=0.3), cppo(weight=0.3)
    plan = alone.plan(tokens)
    assert list(plan.averages) == list(alone.terms(tokens, plan)) == ["perception"]
    check(total(alone, tokens), total(both, tokens) - total(build("grpo"), tokens))


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        ("constant", (0.8, 0.8, 0.8, 0.8)),
        ("linear", (0.8, 0.6, 0.4, 0.0)),
        ("cosine", (0.8, 0.4 * (1 + math.sqrt(0.5)), 0.4, 0.0)),
    ],
)
def test_the_contrasts_weight_falls_to_zero_as_scheduled(
    schedule: str, weights: tuple[float, ...]
) -> None:
    method = cppo(weight=0.8, weight_schedule=schedule)
    for progress, weight in zip((0.0, 0.25, 0.5, 1.0), weights, strict=True):
        tokens = replace(seen_and_removed(), progress=progress)
        term = method.terms(tokens, method.plan(tokens))["perception"]
        assert term.weight == pytest.approx(weight, abs=1e-12)


def test_a_divergence_of_the_sampled_token_is_what_the_contrast_is_made_of() -> None:
    tokens = seen_and_removed()
    method = cppo(weight=1.0, policy_term=False)
    mask = method.plan(tokens).averages["perception"].mask
    to_preserved, to_removed = (
        divergence(tokens.seen.logprobs, tokens.views[name].logprobs)
        for name in ("preserved", "removed")
    )
    check(total(method, tokens), softplus((to_preserved - to_removed) / 0.1)[mask].mean())


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep": "most"}, "keep"),
        ({"threshold": -0.1}, "threshold"),
        ({"keep": "rise_above", "threshold": 1.0}, "threshold"),
        ({"score": "entropy"}, "score"),
        ({"weight_schedule": "step"}, "weight_schedule"),
        ({"gate": "off"}, "gate"),
        ({"removing_views": 0}, "removing_views"),
        ({"removing_views": 1.5}, "removing_views"),
        ({"threshold": 0.5}, "threshold"),  # nothing would read it
        ({"weight": 0.0}, "weight"),
        ({"stop_gradient": ["blind"]}, "stop_gradient"),
        ({"stop_gradient": "removed"}, "stop_gradient"),
        ({"stop_gradient": ["image", "preserved", "removed"]}, "stop_gradient"),
        ({"stop_gradient": ["removed"], "divergence": "full"}, "stop_gradient"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(
    options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{named} is .*; it must be "):
        cppo(**options)
