"""Laws of collecting: which prompts a process takes, what its responses earn, what is sampled anew.

Everything is real: a small policy samples, worker processes grade.
"""

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from threads import FakeGather, side_by_side

from cppo.builtin import ShapesTask
from cppo.collect import Collector, Encoder, Group
from cppo.config import RolloutConfig
from cppo.data import BadRow, Feed, Item, SkipLedger
from cppo.device import choose
from cppo.evaluation.run import Questions, evaluate
from cppo.methods import GRPO, build
from cppo.objective import group_advantages
from cppo.policy import Policy, Row, Scorer, encode_item, encode_view, load
from cppo.policy.loading import INSTRUCTION
from cppo.reward import SECOND_LOOKS, Grader, Reward, default_reward
from cppo.rollout import Sampling

PROMPTS, RESPONSES = 4, 4
REWARDS = """
def by_length(response, answer, question):
    return 0.5 if "FLAT" in question else len(response) / 1000
"""


class Puzzles(ShapesTask):
    """The task's puzzles; at the places of the feed's order that are given, `by_length` gives all
    responses the same."""

    def __init__(self, flat: Sequence[int] = ()) -> None:
        super().__init__(split="train", size=1000, seed=3)
        self._flat = {feed_rows(max(flat) + 1)[place] for place in flat} if flat else set()

    def read(self, index: int) -> Item:
        item = super().read(index)
        mark = " FLAT" if item.row in self._flat else ""
        return replace(item, question=item.question + mark)


class OnePuzzle(ShapesTask):
    """The same puzzle in many rows; its answer is short, to be learned soon."""

    def read(self, index: int) -> Item:
        return replace(super().read(0), row=str(index), answer="red circle")


@pytest.fixture(scope="module")
def policy(tiny_folder: Path) -> Policy:
    return load(str(tiny_folder), dtype=torch.float32, attention="sdpa")


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grader]:
    """Grades with `by_length`."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "rewards_of_test_collect.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        grader = Grader("rewards_of_test_collect:by_length", workers=1)
    with grader:
        yield grader


def make_collector(
    policy: Policy,
    method: GRPO,
    grader: Grader,
    *,
    source: ShapesTask | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[list[Any]], list[Any]] = lambda values: values,
    max_resamples: int = 3,
    seed: int = 0,
    max_new_tokens: int = 6,
) -> tuple[Collector, Feed]:
    encoder = Encoder(policy, instruction="", max_tokens=999)
    feed = Feed(
        source or Puzzles(),
        SkipLedger(None, max_share=0.1),
        seed=5,
        check=encoder.check,
        rank=rank,
        world=world,
        gather=gather,
    )
    collector = Collector(
        policy=policy,
        method=method,
        feed=feed,
        encoder=encoder,
        grader=grader,
        settings=RolloutConfig(
            prompts=PROMPTS,
            responses=RESPONSES,
            max_new_tokens=max_new_tokens,
            max_resamples=max_resamples,
        ),
        steps=10,
        seed=seed,
        rank=rank,
        world=world,
        gather=gather,
    )
    return collector, feed


def rows_of(groups: list[Group]) -> list[str]:
    return [group.prompt.item.row for group in groups]


def ids_of(groups: list[Group]) -> list[list[int]]:
    return [response.ids.tolist() for group in groups for response in group.responses]


def feed_rows(count: int) -> list[str]:
    """The first rows that the feed above gives."""
    feed = Feed(Puzzles(), SkipLedger(None, max_share=0.1), seed=5)
    return [item.row for item in feed.take(count)]


def collect_in_two(
    policies: tuple[Policy, Policy], method: GRPO, grader: Grader, source: ShapesTask | None = None
) -> tuple[list[list[Group]], list[Feed]]:
    """One step of two processes."""
    gather = FakeGather(2)
    made = [
        make_collector(
            policies[rank],
            method,
            grader,
            source=source,
            rank=rank,
            world=2,
            gather=gather.of(rank),
        )
        for rank in (0, 1)
    ]
    groups = side_by_side(2, lambda rank: made[rank][0].collect(1))
    return groups, [feed for _, feed in made]


# --- rewards and advantages ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def guessing_policy(tiny_folder: Path) -> Policy:
    """Answers the first puzzle rightly and wrongly, about as often, and writes a thought or not."""
    policy = load(str(tiny_folder), dtype=torch.float32, attention="sdpa")
    item = OnePuzzle(split="train", size=1000, seed=3).read(0)
    thoughts, answers = ("", "<think>1</think>"), (item.answer, "7")
    texts = [f"{thought}\\boxed{{{answer}}}" for thought in thoughts for answer in answers]
    return taught(policy, [(item, text) for text in texts])


def taught(policy: Policy, pairs: Sequence[tuple[Item, str]]) -> Policy:
    """The policy, once it has learned to answer these items with any of their texts."""
    prompts = {
        item.question: encode_item(policy, item, instruction="", max_tokens=999)
        for item, _ in pairs
    }
    rows = [
        Row(
            prompt=prompts[item.question],
            response=torch.tensor(
                policy.tokenizer(f"{text}<|im_end|>", add_special_tokens=False).input_ids
            ),
        )
        for item, text in pairs
    ]
    scorer = Scorer(policy, choose("cpu"), temperature=1.0)
    optimizer = torch.optim.Adam(scorer.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        (-scorer(rows).logprobs.sum() / len(rows)).backward()
        optimizer.step()
    return policy


def test_default_rewards_become_the_advantages_of_their_groups(guessing_policy: Policy) -> None:
    task = OnePuzzle(split="train", size=1000, seed=3)
    with Grader("default", workers=1) as grader:
        collector, _ = make_collector(
            guessing_policy, build("grpo"), grader, source=task, max_new_tokens=24
        )
        groups = collector.collect(1)
    answer = task.read(0).answer
    rewards = [reward for group in groups for reward in group.rewards]
    assert rewards == [
        default_reward(response.text, answer, "")
        for group in groups
        for response in group.responses
    ]
    totals = [reward.total for reward in rewards]
    assert len(set(totals)) > 2  # right or wrong, with a thought or without
    expected = group_advantages(torch.tensor(totals, dtype=torch.float64), RESPONSES)
    assert [a for g in groups for a in g.advantages] == pytest.approx(expected.tolist(), abs=1e-12)
    assert any(group.teaches(build("grpo")) for group in groups)


def test_groups_without_spread_have_no_advantage_and_do_not_teach(
    policy: Policy, reward: Grader
) -> None:
    source = Puzzles(range(PROMPTS))
    collector, feed = make_collector(policy, build("grpo"), reward, source=source)
    groups = collector.collect(1)
    assert [group.advantages for group in groups] == [[0.0] * RESPONSES] * PROMPTS
    assert not any(group.teaches(build("grpo")) for group in groups)
    assert rows_of(groups) == feed_rows(PROMPTS)  # GRPO takes no others in their place
    assert feed.state()["position"] == PROMPTS


def test_a_group_teaches_by_its_rewards_and_under_dapo_by_its_accuracies(
    policy: Policy, puzzles: ShapesTask
) -> None:
    prompt = encode_item(policy, puzzles.read(0), instruction="", max_tokens=999)

    def group(*rewards: tuple[float, float]) -> Group:
        made = [Reward(total=t, accuracy=a, format=0.0) for t, a in rewards]
        return Group(prompt=prompt, responses=[], rewards=made)

    by_format, by_accuracy = group((0.9, 1.0), (1.0, 1.0)), group((0.9, 1.0), (0.0, 0.0))
    equal = group((0.3, 0.0), (0.1 + 0.2, 0.0))  # but for rounding
    grpo, dapo = build("grpo"), build("dapo")
    assert [g.teaches(grpo) for g in (by_format, by_accuracy, equal)] == [True, True, False]
    assert [g.teaches(dapo) for g in (by_format, by_accuracy, equal)] == [False, True, False]


# --- processes ----------------------------------------------------------------------------------


def test_ranks_partition_the_prompts_and_share_what_advantages_rest_on(
    policy: Policy, tiny_folder: Path, reward: Grader
) -> None:
    other = load(str(tiny_folder), dtype=torch.float32, attention="sdpa")
    method = build("grpo", {"batch_normalize": True, "normalize": False})
    (first, second), feeds = collect_in_two((policy, other), method, reward)
    rows = feed_rows(PROMPTS)
    assert rows_of(first) == rows[0::2]
    assert rows_of(second) == rows[1::2]
    assert feeds[0].state() == feeds[1].state()
    totals = [r.total for g in (*first, *second) for r in g.rewards]
    expected = method.score_groups(torch.tensor(totals, dtype=torch.float64), RESPONSES)
    assert [a for g in (*first, *second) for a in g.advantages] == pytest.approx(expected.tolist())
    alone = method.score_groups(torch.tensor(totals[: len(totals) // 2]), RESPONSES)
    assert [a for g in first for a in g.advantages] != pytest.approx(alone.tolist(), rel=1e-3)
    assert ids_of(first) != ids_of(second)


def test_a_rank_resamples_as_long_as_any_other_needs_to(
    policy: Policy, tiny_folder: Path, reward: Grader
) -> None:
    """Else the feeds part ways, and one process waits for another in vain."""
    other = load(str(tiny_folder), dtype=torch.float32, attention="sdpa")
    (first, second), feeds = collect_in_two((policy, other), build("dapo"), reward, Puzzles([0]))
    assert feeds[0].state() == feeds[1].state()
    rows = feed_rows(2 * PROMPTS)
    assert feeds[0].state()["position"] == len(rows)
    assert rows_of(first) == [rows[2], rows[4]]  # the place of the first is taken by its next
    assert rows_of(second) == [rows[1], rows[3]]  # which had no need of others


# --- resampling ---------------------------------------------------------------------------------


def test_dapo_puts_new_prompts_in_the_place_of_groups_without_spread(
    policy: Policy, reward: Grader
) -> None:
    source, rows = Puzzles([1, 2, 5]), feed_rows(8)
    grpo, _ = make_collector(policy, build("grpo"), reward, source=source)
    first = grpo.collect(1)
    assert rows_of(first) == rows[:4]
    assert [group.teaches(build("grpo")) for group in first] == [True, False, False, True]

    dapo, feed = make_collector(policy, build("dapo"), reward, source=source)
    groups = dapo.collect(1)
    assert rows_of(groups) == [rows[0], rows[3], rows[4], rows[6]]
    assert feed.state()["position"] == len(rows)
    assert ids_of(groups[:2]) == ids_of([first[0], first[3]])  # none is rolled out twice
    for group in groups:
        totals = torch.tensor([r.total for r in group.rewards], dtype=torch.float64)
        assert group.teaches(build("dapo"))
        assert group.advantages == pytest.approx(group_advantages(totals, RESPONSES).tolist())


@pytest.mark.parametrize(
    ("max_resamples", "kept"), [(0, [0, 1, 2, 3]), (1, [1, 4, 0, 2]), (2, [1, 4, 8, 9])]
)
def test_resampling_ends_after_its_rounds_and_fills_up_with_what_it_has(
    policy: Policy, reward: Grader, max_resamples: int, kept: list[int]
) -> None:
    rows, source = feed_rows(12), Puzzles([0, 2, 3, 5, 6, 7])
    collector, feed = make_collector(
        policy, build("dapo"), reward, source=source, max_resamples=max_resamples
    )
    groups = collector.collect(1)
    assert rows_of(groups) == [rows[place] for place in kept]
    assert feed.state()["position"] == PROMPTS * (1 + max_resamples)


def test_dapo_stops_at_once_where_every_group_has_spread(policy: Policy, reward: Grader) -> None:
    collector, feed = make_collector(policy, build("dapo"), reward)
    assert all(group.teaches(build("dapo")) for group in collector.collect(1))
    assert feed.state()["position"] == PROMPTS


# --- what is random -----------------------------------------------------------------------------


def test_rollouts_depend_on_seed_and_step_and_on_nothing_else(
    policy: Policy, reward: Grader
) -> None:
    def collect(step: int, seed: int) -> list[list[int]]:
        torch.manual_seed(step)  # the global state is not what counts
        collector, _ = make_collector(policy, build("grpo"), reward, seed=seed)
        return ids_of(collector.collect(step))

    first = collect(step=1, seed=0)
    assert collect(step=1, seed=0) == first
    assert collect(step=2, seed=0) != first
    assert collect(step=1, seed=1) != first
    assert len({tuple(ids) for ids in first[:RESPONSES]}) > 1  # nor are they copies


def test_steps_go_on_with_the_prompts_that_follow(policy: Policy, reward: Grader) -> None:
    collector, _ = make_collector(policy, build("grpo"), reward)
    rows = [row for step in (1, 2) for row in rows_of(collector.collect(step))]
    assert rows == feed_rows(2 * PROMPTS)


# --- asking again -------------------------------------------------------------------------------

# A description and an answer, and an answer without the image, as the methods ask for them.
FORMS = {
    "vision_sr1": (
        "<description>a {}</description><think>1</think>\\boxed{{{}}}",
        "\\boxed{{{}}}",
    ),
    "visionary_r1": ("<info>a {}</info><think>1</think><answer>{}</answer>", "{}"),
}


@pytest.fixture(scope="module", params=FORMS)
def method_and_policy(request: pytest.FixtureRequest, tiny_folder: Path) -> tuple[str, Policy]:
    """A method, and a policy that describes the first puzzle as it asks, and answers it rightly and
    wrongly, about as often, with the image and from its description."""
    name: str = request.param
    policy = load(str(tiny_folder), dtype=torch.float32, attention="sdpa")
    item = OnePuzzle(split="train", size=1000, seed=3).read(0)
    form, reply = FORMS[name]
    said = [form.format(item.answer, answer) for answer in (item.answer, "7")]
    question = item.question.replace("<image>", "").strip()
    (asked,) = {SECOND_LOOKS[name].ask(text, question) for text in said}
    assert asked is not None
    bare = replace(item, images=(), question=asked)
    replies = [(bare, reply.format(answer)) for answer in (item.answer, "7")]
    return name, taught(policy, [(item, text) for text in said] + replies)


def test_a_description_earns_what_the_policy_answers_from_it(
    method_and_policy: tuple[str, Policy],
) -> None:
    name, policy = method_and_policy
    method, look, task = build(name), SECOND_LOOKS[name], OnePuzzle(split="train", size=99, seed=3)
    answer = task.read(0).answer
    with Grader(look.spec, workers=1) as grader:
        collector, _ = make_collector(policy, method, grader, source=task, max_new_tokens=48)
        groups = collector.collect(1)
        alone, _ = make_collector(policy, build("grpo"), grader, source=task, max_new_tokens=48)
        assert ids_of(alone.collect(1)) == ids_of(groups)  # what is asked after them changes none
        encoder = Encoder(policy, instruction="", max_tokens=999)
        outcome = evaluate(
            policy,
            Questions(task, encoder, SkipLedger(None, max_share=0.1), count=2),
            grader,
            Sampling(responses=8, max_new_tokens=48),
            seed=0,
            final=look.final,
        )
    rewards = [reward for group in groups for reward in group.rewards]
    replies = [reply for group in groups for reply in group.replies]
    said = [response.text for group in groups for response in group.responses]
    assert rewards == [
        look.grade(text, answer, "", *([] if reply is None else [reply]))
        for text, reply in zip(said, replies, strict=True)
    ]
    formed = [reward for reward in rewards if reward.format]
    assert {reward.accuracy for reward in formed} == {0.0, 1.0}
    assert {reward.second_look for reward in formed} == {0.0, 1.0}
    totals = torch.tensor([reward.total for reward in rewards], dtype=torch.float64)
    expected = method.score_groups(totals, RESPONSES).tolist()
    assert [a for g in groups for a in g.advantages] == pytest.approx(expected, abs=1e-12)

    votes = {
        (accuracy, vote)
        for accuracies, answers in zip(outcome.accuracies, outcome.answers, strict=True)
        for accuracy, vote in zip(accuracies, answers, strict=True)
    }
    assert {(1.0, answer), (0.0, "7")} <= votes
    assert all((accuracy == 1.0) == (vote == answer) for accuracy, vote in votes)


# --- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cppo", "cppo_areal"])
def test_views_are_encoded_once_a_prompt_and_for_positive_responses_only(
    policy: Policy, reward: Grader, name: str
) -> None:
    fixed = {"preserving": {"colour_jitter": {}}, "removing": {"occlusion": {}}}
    collector, _ = make_collector(policy, build(name, fixed), reward)
    group = collector.collect(1)[0]
    samples = collector.samples(group, 1)
    positive = [advantage > 0 for advantage in group.advantages]
    assert any(positive)
    assert not all(positive)
    assert [set(sample.views) for sample in samples] == [
        {"preserved", "removed"} if good else set() for good in positive
    ]
    for view in ("preserved", "removed"):
        tensors = {id(sample.views[view]) for sample in samples if sample.views}
        assert len(tensors) == 1
    one = samples[positive.index(True)].views
    assert one["preserved"].pixels.shape == group.prompt.pixels.shape
    assert not torch.equal(one["preserved"].pixels, one["removed"].pixels)
    assert not torch.equal(one["preserved"].pixels, group.prompt.pixels)
    for sample, response, advantage in zip(samples, group.responses, group.advantages, strict=True):
        assert torch.equal(sample.ids, response.ids)
        assert (sample.advantage, sample.prompt) == (advantage, group.prompt)

    again = collector.samples(group, 1)[positive.index(True)].views
    later = collector.samples(group, 2)[positive.index(True)].views
    for view in ("preserved", "removed"):
        assert torch.equal(again[view].pixels, one[view].pixels)
        drawn_for_good = name == "cppo_areal"
        assert torch.equal(later[view].pixels, one[view].pixels) == drawn_for_good


def test_half_of_a_noisy_group_is_sampled_on_noised_images_until_the_noise_is_gone(
    policy: Policy, reward: Grader
) -> None:
    method = build("noisy_rollout")
    collector, _ = make_collector(policy, method, reward)
    noise = method.rollout_view(0.0)
    assert noise is not None
    assert method.rollout_view(0.9) is None
    scorer = Scorer(policy, choose("cpu"), temperature=1.0)
    for step, noised in ((1, RESPONSES // 2), (10, 0)):
        for group in collector.collect(step):
            assert len(group.responses) == RESPONSES
            unclear = encode_view(policy, group.prompt, noise, seed=0, step=step)
            for number, response in enumerate(group.responses):
                rows = [Row(prompt=p, response=response.ids) for p in (group.prompt, unclear)]
                with policy.evaluating():
                    off = (scorer(rows).logprobs - response.logprobs).abs().amax(1).tolist()
                assert (off[0] < 1e-4) is (number < RESPONSES - noised)
                assert (off[1] < 1e-4) is (number >= RESPONSES - noised)
            assert all(s.prompt is group.prompt for s in collector.samples(group, step))


def test_a_group_without_positive_responses_gets_no_views(policy: Policy, reward: Grader) -> None:
    collector, _ = make_collector(policy, build("cppo"), reward, source=Puzzles([0]))
    group = collector.collect(1)[0]
    assert [sample.views for sample in collector.samples(group, 1)] == [{}] * RESPONSES


def test_the_encoder_lets_go_of_prompts_once_they_are_taken(
    policy: Policy, puzzles: ShapesTask
) -> None:
    encoder = Encoder(policy, instruction=" Think.", max_tokens=999)
    items = [puzzles.read(0), puzzles.read(1)]
    for item in items:
        encoder.check(item)
    prompts = encoder.take(items[::-1])
    assert [prompt.item.row for prompt in prompts] == [item.row for item in items[::-1]]
    assert " Think." in policy.tokenizer.decode(prompts[0].ids)
    with pytest.raises(KeyError):
        encoder.take(items)


def test_equal_images_of_prompts_taken_together_are_processed_and_seen_once(
    policy: Policy, puzzles: ShapesTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    processed, seen = [], []
    process, encode = policy.family.pixels, policy.family.encode

    def counted(images: Sequence[Any]) -> Any:
        processed.append(len(images))
        return process(images)

    def encoded(model: Any, pixels: Any, grids: Any) -> Any:
        seen.append(len(grids))
        return encode(model, pixels, grids)

    monkeypatch.setattr(policy.family, "pixels", counted)
    monkeypatch.setattr(policy.family, "encode", encoded)
    one, other = puzzles.read(0), puzzles.read(1)
    again = replace(one, row="again", question=other.question, images=(one.images[0].copy(),))
    wide, tall = (
        replace(one, row=str(size), images=(Image.new("RGB", size, "red"),))
        for size in ((56, 84), (84, 56))  # the same bytes
    )
    encoder = Encoder(policy, instruction="", max_tokens=999)

    def take(*items: Item) -> list[Any]:
        for item in items:
            encoder.check(item)
        return encoder.take(items)

    prompts = take(one, other, again, wide, tall)
    assert processed == [1, 1, 1, 1]
    assert prompts[2].pixels is prompts[0].pixels
    assert len({id(prompt.pixels) for prompt in prompts}) == 4
    assert prompts[3].grids.tolist() != prompts[4].grids.tolist()
    alone = take(again)[0]
    assert torch.equal(alone.pixels, prompts[0].pixels)
    assert alone.pixels is not prompts[0].pixels

    rows = [Row(prompt=prompt, response=torch.tensor([5, 6, 7])) for prompt in prompts]
    scores = Scorer(policy, choose("cpu"), temperature=1.0)(rows)
    assert seen == [4]
    row = Row(prompt=alone, response=rows[2].response)
    true = Scorer(policy, choose("cpu"), temperature=1.0)([row])
    torch.testing.assert_close(scores.logprobs[2], true.logprobs[0], atol=1e-5, rtol=0)


def test_a_prompt_that_is_too_long_leaves_nothing_of_its_picture_behind(
    policy: Policy, puzzles: ShapesTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    process = policy.family.pixels

    def watched(images: Sequence[Any]) -> Any:
        pixels, grids = process(images)
        made.append(weakref.ref(pixels))
        return pixels, grids

    monkeypatch.setattr(policy.family, "pixels", watched)
    encoder = Encoder(policy, instruction="", max_tokens=5)
    for item in (puzzles.read(0), puzzles.read(1)):
        with pytest.raises(BadRow, match="prompt too long"):
            encoder.check(item)
    gc.collect()
    assert [found() for found in made] == [None, None]


def test_without_an_instruction_of_ones_own_the_models_is_taken(
    tiny_folder: Path, tmp_path: Path, puzzles: ShapesTask
) -> None:
    pretrained = shutil.copytree(tiny_folder, tmp_path / "pretrained")
    settings = json.loads((pretrained / "tokenizer_config.json").read_text())
    assert settings.pop("instruction") == ""  # the built-in policy's, saved with it
    (pretrained / "tokenizer_config.json").write_text(json.dumps(settings))
    item = puzzles.read(0)

    def asked(folder: Path, instruction: str | None) -> list[int]:
        policy = load(str(folder), dtype=torch.float32, attention="sdpa")
        encoder = Encoder(policy, instruction=instruction, max_tokens=999)
        encoder.check(item)
        [prompt] = encoder.take([item])
        ids: list[int] = prompt.ids.tolist()
        return ids

    assert INSTRUCTION
    assert asked(tiny_folder, None) == asked(tiny_folder, "") == asked(pretrained, "")
    assert asked(pretrained, None) == asked(pretrained, INSTRUCTION) != asked(pretrained, "")
    assert asked(tiny_folder, " Think.") == asked(pretrained, " Think.")
