"""Laws of the optimizer step, on a real small policy in float64: what it descends on is the plain
loss of the whole batch, however that batch is cut into micro-batches and spread over processes."""

import contextlib
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, ITEMS, as_loaded, save_family
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cppo.builtin import ShapesTask
from cppo.data import Item
from cppo.device import choose
from cppo.methods import GRPO, METHODS, Average, Plan, Scores, Term, Tokens, View, build
from cppo.objective import aggregate, count_units, divergence
from cppo.policy import Policy, Row, Scorer, encode_item, encode_view, load
from cppo.policy.padded import pad_rows
from cppo.processes import Processes
from cppo.samples import Sample
from cppo.update import Updater

TEMPERATURE = 0.8
MAX_NEW_TOKENS = 12
LENGTHS = (3, 9, 5, 1, 7, 2)
ADVANTAGES = (1.25, -0.75, 0.5, 0.875, -1.125, 0.0)  # exact in float32
SPREADS = (1e-4, 0.3, 0.0, 0.1, 1e-4, 0.3)  # of old log-probabilities: some ratios are clipped
WEIGHTS: dict[str, dict[str, Any]] = {  # so that what a method adds counts
    "cppo": {"weight": 1.0},
    "cppo_areal": {"weight": 1.0},
    "papo": {"weight": 1.0, "entropy_weight": 0.5},
    "papo_dapo": {"weight": 1.0, "masked_entropy_weight": 0.5, "learns_masked": True},
    "vppo": {"scale_low": 0.2},
    "dvrp": {"masked_weight": 1.0, "noised_weight": 0.7, "view_entropy_weight": 0.5},
}
PUZZLES = tuple(map(ShapesTask(split="train", size=100, seed=3).read, (0, 3)))
ADAPTED: dict[str, Any] = {
    "lora": {
        "r": 4,
        "lora_alpha": 1,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    },
    "gradient_checkpointing": True,
}
TOLERANCE = 1e-6  # relative; transformers' norms compute in float32 whatever the weights are


@dataclass(frozen=True, kw_only=True)
class Blind(GRPO):
    """A toy: tokens count by their entropy on a blackened image, and are to stay close to it."""

    learns_blind: bool = False

    @property
    def views(self) -> tuple[View, ...]:
        view = View(name="blind", perturbations={"blackout": {}}, detects=True)
        return (replace(view, gradient=self.learns_blind),)

    def plan(self, tokens: Tokens) -> Plan:
        plan, mask = super().plan(tokens), tokens.mask
        weights = torch.where(mask, tokens.views["blind"].entropy * tokens.seen.entropy, 0.0)
        share = Average(mask=mask & (weights > weights.mean(-1, keepdim=True)))
        averages = {**plan.averages, "distance": share}
        return Plan(advantages=plan.advantages * weights, averages=averages)

    def terms(self, tokens: Tokens, plan: Plan) -> dict[str, Term]:
        distance = divergence(tokens.seen.logprobs, tokens.views["blind"].logprobs)
        return {**super().terms(tokens, plan), "distance": Term(per_token=distance, weight=0.5)}


# --- building blocks ----------------------------------------------------------------------------


def load_policy(folder: str | Path, dtype: torch.dtype = torch.float64, **options: Any) -> Policy:
    return load(str(folder), dtype=dtype, attention="sdpa", **options)


@pytest.fixture(scope="module")
def policy(tiny_folder: Path) -> Policy:
    """One for all tests here, each of which leaves the weights as they were."""
    return load_policy(tiny_folder)


def make_scorer(policy: Policy) -> Scorer:
    return Scorer(policy, choose("cpu"), temperature=TEMPERATURE)


def make_samples(
    policy: Policy, method: GRPO, items: Sequence[Item] = PUZZLES, *, every_view: bool = False
) -> list[Sample]:
    """Two prompts with three responses each, of ragged lengths and older policies."""
    random = torch.Generator().manual_seed(7)
    scorer, samples = make_scorer(policy), []
    for start, item in zip((0, 3), items, strict=True):
        prompt = encode_item(policy, item, instruction="", max_tokens=999)
        shown = {v.name: encode_view(policy, prompt, v, seed=1, step=2) for v in method.views}
        for i in range(start, start + 3):
            ids = torch.randint(10, 300, LENGTHS[i : i + 1], generator=random)
            advantage = torch.tensor([ADVANTAGES[i]])
            needed = {
                v.name for v in method.views if every_view or v.needed(advantage).tolist() == [True]
            }
            with torch.no_grad():
                seen = scorer([Row(prompt=prompt, response=ids)]).logprobs[0]
            noise = torch.randn(2, len(ids), generator=random, dtype=torch.float64)
            samples.append(
                Sample(
                    prompt=prompt,
                    ids=ids,
                    advantage=ADVANTAGES[i],
                    views={name: view for name, view in shown.items() if name in needed},
                    old_logprobs=seen + SPREADS[i] * noise[0],
                    reference_logprobs=seen + 0.5 * noise[1],
                )
            )
    return samples


def budget(cut: str, samples: Sequence[Sample]) -> int:
    """Tokens of a micro-batch that hold all samples, one group with its views, or one sample."""
    groups = [[s for s in samples if s.prompt is p] for p in {s.prompt for s in samples}]
    tokens = [
        len(group[0].prompt.ids) * (1 + max(len(s.views) for s in group))
        + max(len(s.ids) for s in group) * sum(1 + len(s.views) for s in group)
        for group in groups
    ]
    return {"whole": 1_000_000, "group": max(tokens), "sample": 1}[cut]


def learning(policy: Policy) -> list[Tensor]:
    return [p for p in policy.model.parameters() if p.requires_grad]


def weights_of(policy: Policy) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learning(policy)])


def descend(
    policy: Policy,
    method: GRPO,
    samples: Sequence[Sample],
    cut: str = "whole",
    *,
    max_grad_norm: float = 1e9,
    progress: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """What a step of plain gradient descent at rate 1 subtracts from the weights, and its metrics;
    the weights are put back."""
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    start, scorer = weights_of(policy), make_scorer(policy)
    metrics = Updater(
        scorer=scorer,
        optimizer=torch.optim.SGD(scorer.parameters(), lr=1.0),
        method=method,
        processes=Processes(choose("cpu"), torch.float32),
        tokens_per_micro_batch=budget(cut, samples),
        max_grad_norm=max_grad_norm,
        max_new_tokens=MAX_NEW_TOKENS,
    ).step(samples, progress=progress)
    change = start - weights_of(policy)
    policy.model.load_state_dict(before, strict=False)
    return change, metrics


def plain_loss(
    policy: Policy, method: GRPO, samples: Sequence[Sample], scorer: Scorer | None = None
) -> Tensor:
    """The loss of a whole batch by its definition, every response scored by itself."""
    scorer = scorer or make_scorer(policy)

    def padded(rows: list[Tensor]) -> Tensor:
        return pad_sequence(rows, batch_first=True)

    def scored(view: View | None) -> Scores:
        rows = []
        for sample in samples:
            prompt = sample.prompt if view is None else sample.views.get(view.name)
            if prompt is None:
                zeros = torch.zeros(1, len(sample.ids), dtype=torch.float64)
                rows.append([zeros, zeros, zeros])
                continue
            as_is = Row(prompt=sample.prompt, response=sample.ids)
            row = Row(prompt=prompt, response=sample.ids, against=as_is)
            *_, found = scorer([as_is, row]).divergence
            scores = scorer([Row(prompt=prompt, response=sample.ids)])
            rows.append([scores.logprobs, scores.entropy, found[None]])
        statistics = [padded([row[kind][0] for row in rows]) for kind in range(3)]
        if view is not None and not view.gradient:
            statistics = [values.detach() for values in statistics]
        logprobs, entropy, divergence = statistics
        return Scores(logprobs=logprobs, entropy=entropy, divergence=divergence)

    tokens = Tokens(
        mask=padded([torch.ones(len(s.ids), dtype=torch.bool) for s in samples]),
        advantages=torch.tensor([s.advantage for s in samples]),
        old_logprobs=padded([s.old_logprobs for s in samples]),
        seen=scored(None),
        views={view.name: scored(view) for view in method.views},
        reference_logprobs=padded([s.reference_logprobs for s in samples]),
    )
    with torch.no_grad():
        plan = method.plan(tokens)
    total = torch.zeros((), dtype=torch.float64)
    for name, term in method.terms(tokens, plan).items():
        mask, mode = plan.averages[name].mask, plan.averages[name].mode
        longest = MAX_NEW_TOKENS if mode == "sequence-sum-norm" else 1
        value = aggregate(term.per_token, mask, mode, denominator=count_units(mask, mode) * longest)
        total = total + term.weight * value
    return total


def plain_gradient(policy: Policy, loss: Tensor) -> Tensor:
    # Some towers have parts that no feature passes.
    gradients = torch.autograd.grad(
        loss, learning(policy), allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in gradients])


def check(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert expected.norm() > 1e-3
    assert (actual - expected).norm() <= tolerance * expected.norm()


@contextlib.contextmanager
def watching(policy: Policy) -> Iterator[list[list[bytes]]]:
    """The pictures of each pass through the vision tower."""
    passes: list[list[bytes]] = []

    def note(_: Any, given: tuple[Tensor], named: dict[str, Tensor]) -> None:
        patches = given[0].detach().split(named["grid_thw"].prod(-1).tolist())
        passes.append([picture.numpy().tobytes() for picture in patches])

    hook = policy.base.model.visual.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


def as_seen(policy: Policy, pixels: Tensor) -> bytes:
    return pixels.to(policy.base.model.visual.dtype).numpy().tobytes()


# --- the loss does not depend on how the batch is cut -------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, WEIGHTS.get(name, {})) for name in METHODS},
    "reference": ("grpo", {"reference_kl": 0.5, "dual_clip": 1.5}),
    "cppo by sequence": ("cppo", {"weight": 1.0, "aggregation": "sequence-mean"}),
    "cppo alone": ("cppo", {"weight": 1.0, "policy_term": False, "removing_views": 2}),
    "cppo in full": ("cppo", {"weight": 1.0, "divergence": "full", "score": "divergence"}),
    "cppo alone, the image constant": (
        "cppo",
        {"weight": 1.0, "policy_term": False, "stop_gradient": ["image"]},
    ),
    "cppo without its gate": ("cppo", {"weight": 1.0, "gate": False}),
    "cppo in part": ("cppo", {"weight": 1.0, "stop_gradient": ["removed"]}),
    "cppo in the other part": ("cppo", {"weight": 1.0, "stop_gradient": ["preserved"]}),
    "cppo, both views constant": (
        "cppo",
        {"weight": 1.0, "stop_gradient": ["preserved", "removed"]},
    ),
    "papo, one term left out": (
        "papo",
        {"weight": 0.0, "masked_entropy_weight": 0.5, "learns_masked": True},
    ),
    "dvrp, one view left out": ("dvrp", {"masked_weight": 0.0, "view_entropy_weight": 0.0}),
}
TOYS = {"toy": Blind(), "toy that learns blind": Blind(learns_blind=True)}
every_case = pytest.mark.parametrize("case", [*CASES, *TOYS])


def method_of(case: str) -> GRPO:
    return TOYS[case] if case in TOYS else build(*CASES[case])


@every_case
def test_the_step_descends_on_the_plain_loss_however_the_batch_is_cut(
    policy: Policy, case: str
) -> None:
    method = method_of(case)
    samples = make_samples(policy, method)
    expected = plain_gradient(policy, plain_loss(policy, method, samples))
    watched: list[dict[str, float]] = []
    for cut in ("whole", "group", "sample"):
        change, metrics = descend(policy, method, samples, cut)
        check(change, expected)
        watched.append(metrics)
    assert watched[0]["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-6)
    assert watched[0]["skipped"] == 0.0
    for metrics in watched[1:]:
        assert metrics == pytest.approx(watched[0], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("cut", ["whole", "group"])
@pytest.mark.parametrize(
    ("case", "option", "schedule"),
    [
        ("cppo", "weight", "weight_schedule"),
        ("visionary_r1", "reference_kl", "reference_kl_schedule"),
    ],
)
def test_what_falls_over_the_training_falls_in_the_step(
    policy: Policy, case: str, option: str, schedule: str, cut: str
) -> None:
    method = replace(build(case), **{option: 1.0, schedule: "cosine"})
    samples = make_samples(policy, method)
    halfway = replace(method, **{option: 0.5, schedule: "constant"})
    expected = plain_gradient(policy, plain_loss(policy, halfway, samples))
    check(descend(policy, method, samples, cut, progress=0.5)[0], expected)
    at_first = descend(policy, method, samples, cut)[0]
    assert (at_first - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("case", ["cppo", "gspo", "toy"])
def test_the_order_of_the_samples_does_not_matter(policy: Policy, case: str) -> None:
    method = method_of(case)
    samples = make_samples(policy, method)
    expected, metrics = descend(policy, method, samples, "group")
    shuffled = [samples[i] for i in (4, 0, 5, 2, 1, 3)]
    change, shuffled_metrics = descend(policy, method, shuffled, "group")
    check(change, expected)
    assert shuffled_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "cppo", "papo", "pgpo"])
def test_averages_over_micro_batches_are_means_of_their_means(policy: Policy, name: str) -> None:
    method = build(name, {**WEIGHTS.get(name, {}), "average_over": "micro-batch"})
    samples = make_samples(policy, method)
    losses = [plain_loss(policy, method, group) for group in (samples[:3], samples[3:])]
    expected = plain_gradient(policy, torch.stack(losses).mean())
    check(descend(policy, method, samples, "group")[0], expected)
    over_all = descend(policy, replace(method, average_over="global"), samples, "group")[0]
    difference = (over_all - expected).norm() / expected.norm()
    if name == "dr_grpo":  # its denominator counts responses, and the groups are of equal size
        assert difference < TOLERANCE
    else:
        assert difference > 0.05


def test_a_plan_that_gathers_must_be_made_ahead(policy: Policy) -> None:
    class Comparing(GRPO):
        def plan(self, tokens: Tokens) -> Plan:
            plan = super().plan(tokens)
            return replace(
                plan, advantages=plan.advantages - tokens.gather(plan.advantages[:, 0]).mean()
            )

    method = Comparing()
    with pytest.raises(RuntimeError, match="plans_ahead = True"):
        descend(policy, method, make_samples(policy, method), "group")


# --- views --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["whole", "group"])
def test_gating_the_views_is_exact(policy: Policy, cut: str) -> None:
    method = build("cppo", {"weight": 1.0})
    gated, everything = make_samples(policy, method), make_samples(policy, method, every_view=True)
    assert [len(sample.views) for sample in gated] == [2, 0, 2, 2, 0, 0]
    assert [len(sample.views) for sample in everything] == [2] * 6
    expected, metrics = descend(policy, method, everything, cut)
    change, gated_metrics = descend(policy, method, gated, cut)
    check(change, expected)
    assert metrics["perception_tokens"] > 0
    for watched in ("loss/policy", "loss/perception", "perception_tokens", "grad_norm"):
        assert gated_metrics[watched] == pytest.approx(metrics[watched], rel=1e-5), watched
    without = descend(policy, build("grpo"), gated, cut)[0]
    assert (change - without).norm() > 0.01 * without.norm()  # the contrast is there to be gated


@pytest.mark.parametrize("adapted", [False, True], ids=["float64", "float32, lora, checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_the_step_that_its_own_attention_over_padded_rows_gives(
    family: str, adapted: bool, tmp_path: Path, tokenizer: Any
) -> None:
    """However the batch is cut, gated or not; one of the prompts has several pictures."""
    folder = save_family(family, tmp_path, tokenizer)
    tolerance = 1e-5 if adapted else TOLERANCE
    torch.manual_seed(0)  # adapters are drawn
    policy = load_policy(folder, torch.float32, **ADAPTED) if adapted else load_policy(folder)
    method = build("cppo", {"weight": 1.0})
    gated = make_samples(policy, method, ITEMS[:2])
    everything = make_samples(policy, method, ITEMS[:2], every_view=True)
    padded = make_scorer(policy)
    padded._arrange = pad_rows
    with as_loaded(policy):
        loss = plain_loss(policy, method, everything, padded)
        expected = plain_gradient(policy, loss)
    for samples in (gated, everything):
        for cut in ("whole", "group") if adapted else ("whole", "group", "sample"):
            change, metrics = descend(policy, method, samples, cut)
            check(change, expected, tolerance)
            assert metrics["perception_tokens"] > 0
            found = metrics["loss/policy"] + metrics["loss/perception"]  # whose weight is 1
            assert found == pytest.approx(float(loss.detach()), rel=1e-5)


def test_each_picture_passes_the_vision_tower_once_a_scoring_call(policy: Policy) -> None:
    method = build("cppo", {"preserving": {"rotation": {}}})  # none that may leave it as it is
    samples = make_samples(policy, method)
    pictures = {
        as_seen(policy, prompt.pixels)
        for sample in samples
        for prompt in (sample.prompt, *sample.views.values())
    }
    assert len(pictures) == 6  # two prompts, each as it is, preserved and removed
    with watching(policy) as passes:
        descend(policy, method, samples)
    assert [sorted(seen) for seen in passes] == [sorted(pictures)]

    with watching(policy) as passes:
        descend(policy, method, samples, "group")
    for seen in passes:
        assert len(seen) == len(set(seen))
    assert len(passes) == 4  # two micro-batches, scored without gradient and with
    removed = {as_seen(policy, s.views["removed"].pixels) for s in samples if s.views}
    images = {as_seen(policy, s.prompt.pixels) for s in samples}
    assert set().union(*passes[:2]) == images | removed  # the plan needs no more
    assert set().union(*passes[2:]) == pictures


@pytest.fixture(scope="module")
def made(policy: Policy) -> list[Sample]:
    return make_samples(policy, build("cppo"))


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=1, max_size=5),
    budget=st.integers(1, 400),
)
def test_micro_batches_keep_to_their_budget_and_groups_together(
    policy: Policy, made: list[Sample], groups: list[list[int]], budget: int
) -> None:
    method = build("cppo")
    samples = [
        replace(made[number % 6], prompt=replace(made[number % 6].prompt), ids=torch.ones(1).long())
        for number in range(len(groups))
    ]
    samples = [
        replace(sample, ids=torch.ones(length, dtype=torch.long))
        for sample, lengths in zip(samples, groups, strict=True)
        for length in lengths
    ]
    cutter = updater(make_scorer(policy), method, budget)
    cut = cutter._cut(samples, method.views)
    assert sorted(id(s) for batch in cut for s in batch) == sorted(map(id, samples))
    for batch in cut:
        assert len(batch) == 1 or cutter._cost(batch, method.views) <= budget
    for prompt in {sample.prompt for sample in samples}:
        group = [sample for sample in samples if sample.prompt is prompt]
        if cutter._cost(group, method.views) <= budget:
            assert sum(any(s.prompt is prompt for s in batch) for batch in cut) == 1


def test_a_method_without_views_scores_nothing_ahead(policy: Policy) -> None:
    method = build("grpo")
    samples = make_samples(policy, method)
    with watching(policy) as passes:
        descend(policy, method, samples, "group")
    assert len(passes) == 2  # a group each


def test_a_view_without_gradient_is_scored_once_and_gets_none(policy: Policy) -> None:
    method = Blind()
    samples = make_samples(policy, method)
    scorer, calls = make_scorer(policy), []

    def note(_: Any, given: tuple[Sequence[Row]]) -> None:
        calls.append((torch.is_grad_enabled(), [row.prompt for row in given[0]]))

    blind = {id(sample.views["blind"]) for sample in samples}
    for cut, passes in (("whole", 1), ("sample", 6)):
        calls.clear()
        hook = scorer.register_forward_pre_hook(note)
        updater(scorer, method, budget(cut, samples)).step(samples)
        hook.remove()
        kinds = [
            (with_gradient, sum(id(p) in blind for p in rows)) for with_gradient, rows in calls
        ]
        assert kinds[passes:] == [(True, 0)] * passes
        assert [with_gradient for with_gradient, _ in kinds[:passes]] == [False] * passes
        assert sum(count for _, count in kinds) == 6


def updater(scorer: Scorer, method: GRPO, tokens: int, rate: float = 0.0) -> Updater:
    return Updater(
        scorer=scorer,
        optimizer=torch.optim.SGD(scorer.parameters(), lr=rate),
        method=method,
        processes=Processes(choose("cpu"), torch.float32),
        tokens_per_micro_batch=tokens,
        max_grad_norm=1e9,
        max_new_tokens=MAX_NEW_TOKENS,
    )


# --- what must not count ------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["cppo", "dr_grpo", "reference", "toy"])
@pytest.mark.parametrize("cut", ["whole", "sample"])
def test_an_idle_sample_contributes_nothing(policy: Policy, case: str, cut: str) -> None:
    method = method_of(case)
    samples = make_samples(policy, method)
    expected, metrics = descend(policy, method, samples, cut)
    # As the trainer makes one: without what the other samples bring along.
    first = samples[0]
    idle = Sample(prompt=first.prompt, ids=first.ids, advantage=2.0, views=first.views, idle=True)
    change, with_idle = descend(policy, method, [idle, *samples], cut)
    check(change, expected)
    assert with_idle == pytest.approx(metrics, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", ["cppo", "dr_grpo", "gspo", "reference"])
def test_a_batch_of_idle_samples_leaves_the_weights_alone(policy: Policy, case: str) -> None:
    method = method_of(case)
    first = make_samples(policy, method)[0]
    idle = Sample(prompt=first.prompt, ids=first.ids, advantage=0.0, idle=True)
    change, metrics = descend(policy, method, [idle, idle], "sample")
    assert not change.any()
    assert metrics == {}


def test_samples_that_bring_no_old_logprobs_have_a_ratio_of_one(policy: Policy) -> None:
    method = build("grpo")
    samples = make_samples(policy, method)
    fresh = [replace(sample, old_logprobs=None) for sample in samples]
    change, metrics = descend(policy, method, fresh, "group")
    assert metrics["clip_share"] == metrics["old_kl"] == 0.0
    tokens = zip(LENGTHS, ADVANTAGES, strict=True)
    expected = -sum(length * advantage for length, advantage in tokens) / sum(LENGTHS)
    assert metrics["loss/policy"] == pytest.approx(expected, rel=1e-6)
    current = updater(make_scorer(policy), method, 1_000_000).score_without_gradient(samples)
    known = [replace(s, old_logprobs=o) for s, o in zip(samples, current, strict=True)]
    check(descend(policy, method, known, "group")[0], change)
    # Some may bring them and some not, whoever shares a micro-batch with whom.
    mixed = [*samples[:3], *fresh[3:]]
    spelt_out = [*samples[:3], *known[3:]]
    for cut in ("whole", "sample"):
        expected_change, _ = descend(policy, method, spelt_out, cut)
        check(descend(policy, method, mixed, cut)[0], expected_change)


def test_gspo_counts_the_responses_whose_own_ratio_left_the_range(policy: Policy) -> None:
    """Tokens up by 0.5 and down by 0.5 leave a ratio of one: nothing of that response is clipped.

    A token ratio of e^0.001 is nothing to a token clip, and outside gspo's range for a response.
    """
    method = build("gspo")
    samples = make_samples(policy, method)
    current = updater(make_scorer(policy), method, 1).score_without_gradient(samples)
    swing = current[0] + torch.tensor([0.5, -0.5]).repeat(len(current[0]))[: len(current[0])]
    swing[2 * (len(swing) // 2) :] = current[0][2 * (len(swing) // 2) :]  # an even number moves
    known = [swing, current[1] - 1e-3, *current[2:]]
    stale = [replace(s, old_logprobs=old) for s, old in zip(samples, known, strict=True)]
    metrics = descend(policy, method, stale, "group")[1]
    assert ADVANTAGES[5] == 0.0  # nothing to learn from, so never scored
    assert metrics["clip_share"] == pytest.approx(LENGTHS[1] / sum(LENGTHS[:5]), rel=1e-6)


@pytest.mark.parametrize(("shift", "sign"), [(-0.5, 1.0), (0.5, -1.0)])
def test_tokens_whose_ratio_left_the_range_are_counted_and_learn_nothing(
    policy: Policy, shift: float, sign: float
) -> None:
    """A ratio of e^0.5 where the advantage is positive, of e^-0.5 where it is negative."""
    method = build("grpo")
    samples = make_samples(policy, method)
    current = updater(make_scorer(policy), method, 1).score_without_gradient(samples)
    stale = [
        replace(s, advantage=sign, old_logprobs=now + (shift if i < 2 else 0.0))
        for i, (s, now) in enumerate(zip(samples, current, strict=True))
    ]
    change, metrics = descend(policy, method, stale, "group")
    assert metrics["clip_share"] == pytest.approx(sum(LENGTHS[:2]) / sum(LENGTHS), rel=1e-6)
    drift = sum(LENGTHS[:2]) * (math.exp(-shift) - 1 + shift) / sum(LENGTHS)
    assert metrics["old_kl"] == pytest.approx(drift, rel=1e-5)
    alone = descend(policy, method, stale[2:], "group")[0]
    check(change, alone * sum(LENGTHS[2:]) / sum(LENGTHS))


def test_score_without_gradient_keeps_the_order_of_the_samples(policy: Policy) -> None:
    method = build("grpo")
    samples = make_samples(policy, method)
    scorer = make_scorer(policy)
    for cut in ("whole", "group"):
        scored = updater(scorer, method, budget(cut, samples)).score_without_gradient(samples)
        for sample, logprobs in zip(samples, scored, strict=True):
            row = Row(prompt=sample.prompt, response=sample.ids)
            torch.testing.assert_close(logprobs, scorer([row]).logprobs[0].detach())
            assert not logprobs.requires_grad


# --- the step itself ----------------------------------------------------------------------------


def test_gradients_are_clipped_to_the_given_norm_and_reported_unclipped(policy: Policy) -> None:
    method = build("cppo")
    samples = make_samples(policy, method)
    free, metrics = descend(policy, method, samples, "group")
    clipped, clipped_metrics = descend(policy, method, samples, "group", max_grad_norm=0.01)
    assert free.norm() > 0.1
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-4)
    check(clipped / clipped.norm(), free / free.norm())
    assert clipped_metrics["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-9)


@pytest.mark.parametrize("cut", ["whole", "group"])
@pytest.mark.parametrize("name", ["grpo", "cppo", "gspo"])
def test_a_step_that_is_not_finite_leaves_the_weights_and_the_optimizer_alone(
    policy: Policy, name: str, cut: str
) -> None:
    method = build(name)
    samples = make_samples(policy, method)
    scorer = make_scorer(policy)
    before = weights_of(policy)
    for broken in (math.inf, -math.inf, math.nan):
        subject = updater(scorer, method, budget(cut, samples), rate=1.0)
        bad = [replace(samples[0], advantage=broken), *samples[1:]]
        assert subject.step(bad)["skipped"] == 1.0
        assert torch.equal(weights_of(policy), before)
        for parameter in scorer.parameters():
            assert parameter.grad is None or not parameter.grad.any()


def test_a_weight_that_is_not_a_number_is_met_with_a_skipped_step(policy: Policy) -> None:
    method = build("cppo")
    samples = make_samples(policy, method)
    weight = next(policy.base.model.language_model.layers[0].parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[0] = math.nan
    try:
        change, metrics = descend(policy, method, samples, "group")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert metrics["skipped"] == 1.0
    assert change.isnan().sum() == 1  # the one that was set
    assert not change.nan_to_num().any()


# --- two processes ------------------------------------------------------------------------------

TRAINED_IN_TWO: dict[str, tuple[str, dict[str, Any], Sequence[Sequence[int]], str]] = {
    # method, options, each process's samples, how they are cut
    "unequal numbers of micro-batches": ("cppo", {"weight": 1.0}, ((0, 1, 2, 4, 5), (3,)), "group"),
    "views in one process alone": ("cppo", {"weight": 1.0}, ((0, 2, 3), (1, 4, 5)), "whole"),
    "one process idle": ("grpo", {"reference_kl": 0.5}, ((0, 1, 2, 3, 4, 5), ()), "group"),
    "a plan that gathers": ("vppo", {"scale_low": 0.2}, ((0, 1, 2, 4, 5), (3,)), "whole"),
    "a plan that gathers ahead": ("vppo", {"scale_low": 0.2}, ((0, 1, 2, 4, 5), (3,)), "group"),
    "plans on the way": ("pgpo", {}, ((0, 1, 2, 4, 5), (3,)), "group"),
    "a constant view that no plan reads": (
        "papo",
        {"weight": 1.0},
        ((0, 4), (1, 2, 3, 5)),
        "group",
    ),
    "divergences in full": (
        "cppo",
        {"weight": 1.0, "divergence": "full"},
        ((0, 2), (1, 3, 4, 5)),
        "group",
    ),
    "a constant view in part, ahead": (
        "cppo",
        {"weight": 1.0, "stop_gradient": ["preserved"]},
        ((0, 2, 3), (1, 4, 5)),
        "group",
    ),
    "a constant view in part, on the way": (
        "cppo",
        {"weight": 1.0, "stop_gradient": ["preserved"]},
        ((0, 2, 3), (1, 4, 5)),
        "whole",
    ),
    "sums over a constant": ("dr_grpo", {}, ((5, 0), (1, 2, 3, 4)), "sample"),
    "means of unequal numbers of micro-batches": (
        "cppo",
        {"weight": 1.0, "average_over": "micro-batch"},
        ((0, 1, 2, 4, 5), (3,)),
        "sample",
    ),
    "means of the micro-batches of one process": (
        "grpo",
        {"average_over": "micro-batch"},
        ((0, 1, 2, 3, 4, 5), ()),
        "group",
    ),
}
BROKEN = "one process not finite"


def samples_of(policy: Policy, name: str) -> tuple[GRPO, list[Sample], str]:
    case, options, _, cut = TRAINED_IN_TWO[name]
    method = build(case, options)
    return method, make_samples(policy, method), cut


def train_in_one_of_two(rank: int, port: int, folder: Path, out: Path) -> None:
    """Takes one step for each case in process `rank`; what came of it is saved under `out`."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in given.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    processes = Processes(choose("cpu"), torch.float32)
    assert processes.world == 2
    made: dict[str, tuple[Tensor, Mapping[str, float]]] = {}
    for name in (*TRAINED_IN_TWO, BROKEN):
        case = next(iter(TRAINED_IN_TWO)) if name == BROKEN else name
        policy = load_policy(folder)
        method, samples, cut = samples_of(policy, case)
        own = [samples[i] for i in TRAINED_IN_TWO[case][2][rank]]
        if not own:
            first = samples[0]
            own = [Sample(prompt=first.prompt, ids=first.ids, advantage=0.0, idle=True)]
        if name == BROKEN and rank == 1:
            own = [replace(sample, advantage=math.inf) for sample in own]
        plain = make_scorer(policy)
        before = weights_of(policy)
        metrics = Updater(
            scorer=processes.wrap(plain),
            optimizer=torch.optim.SGD(plain.parameters(), lr=1.0),
            method=method,
            processes=processes,
            tokens_per_micro_batch=budget(cut, samples),
            max_grad_norm=1e9,
            max_new_tokens=MAX_NEW_TOKENS,
        ).step(own)
        made[name] = (before - weights_of(policy), metrics)
    torch.save(made, out / f"{rank}.pt")
    processes.close()


def test_two_processes_take_the_step_that_one_takes(
    policy: Policy, tiny_folder: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_in_one_of_two, (port, tiny_folder, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in TRAINED_IN_TWO:
        method, samples, cut = samples_of(policy, name)
        expected, metrics = descend(policy, method, samples, cut)
        for change, watched in (first[name], second[name]):
            check(change, expected)
            assert watched == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    for change, metrics in (first[BROKEN], second[BROKEN]):
        assert not change.any()
        assert metrics["skipped"] == 1.0
