"""Laws of sampling: groups share one prefill, and what is sampled is what the policy says.

P prompts, S sequences, V vocabulary.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import skip_or_fail
from families import (
    FAMILIES,
    ITEMS,
    as_loaded,
    continued,
    counted,
    make_item,
    make_prompt,
    save_family,
    true_inputs,
    vision_tower,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cppo.data import Item
from cppo.data import load as load_data
from cppo.device import choose
from cppo.policy import Policy, Prompt, Row, Scorer, encode_item, load
from cppo.rollout import Response, Sampling, decoding, generate
from cppo.rollout import transformers as in_process
from cppo.rollout.cache import ROOM, GroupCache
from cppo.rollout.decoding import InGroups
from cppo.rollout.transformers import _draw, _nucleus


@pytest.fixture(scope="session", params=FAMILIES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_family(request.param, tmp_path_factory.mktemp(request.param), tokenizer)


@pytest.fixture
def policy(folder: Path) -> Policy:
    return load(str(folder), dtype=torch.float32, attention="sdpa")


def sample(
    policy: Policy, prompts: Sequence[Prompt], seed: int = 0, **settings: Any
) -> list[list[Response]]:
    settings = {"responses": 3, "max_new_tokens": 12} | settings
    generator = torch.Generator().manual_seed(seed)
    return list(generate(policy, prompts, Sampling(**settings), generator))


def make_prompts(policy: Policy) -> list[Prompt]:
    prompts = [make_prompt(policy, item) for item in ITEMS]
    assert len({len(prompt.ids) for prompt in prompts}) == len(prompts)  # the batch is padded
    return prompts


def end_often(policy: Policy) -> None:
    """About one token in eight ends a response, so that rows of a batch stop at different steps."""
    policy.eos = tuple(range(20, len(policy.tokenizer), 8))


def written(groups: Sequence[Sequence[Response]]) -> list[list[int]]:
    return [response.ids.tolist() for group in groups for response in group]


def true_logits(policy: Policy, prompt: Prompt, response: Tensor) -> Tensor:
    """Logits that predict each response token and the one after it: one row, no cache, no padding,
    through the model's own forward."""
    shown = continued(true_inputs(Path(policy.source), prompt.item), response)
    with policy.evaluating(), as_loaded(policy):
        logits: Tensor = policy.base(**shown, use_cache=False).logits
    return logits[0, len(prompt.ids) - 1 :]


def rescored(
    policy: Policy, prompts: Sequence[Prompt], groups: Sequence[Sequence[Response]], heat: float
) -> list[Tensor]:
    rows = [
        Row(prompt=prompt, response=response.ids)
        for prompt, group in zip(prompts, groups, strict=True)
        for response in group
    ]
    with policy.evaluating():
        scores = Scorer(policy, choose("cpu"), temperature=heat)(rows)
    return [scores.logprobs[index, : len(row.response)] for index, row in enumerate(rows)]


@contextmanager
def passing(policy: Policy) -> Iterator[tuple[list[int], list[int]]]:
    """Under `with`: patches or tiles seen by each call of the vision tower, and positions (padding
    and all) computed by each call of the language model."""
    positions: list[int] = []
    hook = policy.language.register_forward_pre_hook(
        lambda _, given, named: positions.append(named["inputs_embeds"][..., 0].numel()),
        with_kwargs=True,
    )
    try:
        with counted(vision_tower(policy)) as patches:
            yield patches, positions
    finally:
        hook.remove()


# --- what is shared ----------------------------------------------------------------------------


def test_a_group_shares_one_image_encoding_and_one_prefill(policy: Policy) -> None:
    """After the prompt, each sampled token but the last of its response is run once."""
    end_often(policy)
    for item in ITEMS:
        prompt = make_prompt(policy, item)
        with passing(policy) as (patches, positions):
            (group,) = sample(policy, [prompt], responses=5)
        assert patches == [len(prompt.pixels)]
        assert positions[0] == len(prompt.ids)
        assert sum(positions[1:]) == sum(len(response.ids) - 1 for response in group)


def test_groups_sampled_side_by_side_are_prefilled_once_each(policy: Policy) -> None:
    prompts, policy.eos = make_prompts(policy), (-1,)  # nothing ends a response
    with passing(policy) as (patches, positions):
        sample(policy, prompts, responses=4, max_new_tokens=3)
    assert patches == [sum(len(prompt.pixels) for prompt in prompts)]
    lengths = [len(prompt.ids) for prompt in prompts]
    together = sum(lengths) if policy.packs else len(lengths) * max(lengths)
    assert positions == [together, 4 * len(prompts), 4 * len(prompts)]


def test_a_prompt_that_follows_itself_is_run_once(policy: Policy) -> None:
    first, second, third = make_prompts(policy)
    policy.eos = (-1,)
    prompts = [first, first, second, third, third, third, first]
    greedy = {"responses": 1, "temperature": 0.0, "max_new_tokens": 4}
    with passing(policy) as (patches, positions):
        groups = sample(policy, prompts, **greedy)
    apart = [sample(policy, [prompt], **greedy)[0] for prompt in prompts]
    assert written(groups) == written(apart)
    assert len({tuple(ids) for ids in written(apart)}) > 1
    runs = [first, second, third, first]
    assert patches == [sum(len(prompt.pixels) for prompt in (first, second, third))]
    lengths = [len(prompt.ids) for prompt in runs]
    together = sum(lengths) if policy.packs else len(lengths) * max(lengths)
    assert positions == [together, *[len(prompts)] * 3]
    drawn = written(sample(policy, [first] * 8, responses=1))
    assert len({tuple(ids) for ids in drawn}) > 1  # each time by itself


def test_a_prompts_keys_are_held_once_for_its_group_and_go_with_its_last_response() -> None:
    cache = GroupCache([3, 7], responses=[4, 4])
    ask(cache, 10)
    (held,) = cache._layers.values()
    assert held.prompt_keys.shape == (2, 2, 7, 8)
    assert held.keys.shape == (8, 2, ROOM, 8)
    cache.keep(torch.tensor([0, 2, 5]))
    assert (len(held.prompt_keys), len(held.keys)) == (2, 3)
    second = held.prompt_keys[1].clone()
    cache.keep(torch.tensor([2]))
    assert torch.equal(held.prompt_keys[0], second)
    assert len(held.prompt_keys) == len(held.keys) == 1


@pytest.mark.parametrize("lengths", [[3, 7], [5, 5], [5]])
@pytest.mark.parametrize("heads", [1, 2])
def test_no_views_are_held_of_prompts(lengths: list[int], heads: int) -> None:
    cache = GroupCache(lengths, responses=[2] * len(lengths))
    ask(cache, sum(lengths), heads=heads)
    (held,) = cache._layers.values()
    assert not held.prompt_keys._is_view()
    assert not held.prompt_values._is_view()


def test_attention_goes_on_when_the_room_for_responses_is_used_up() -> None:
    """More tokens than a layer begins with room for, against attention over all of them at once;
    one prompt is padded, and rows end meanwhile."""
    generator = torch.Generator().manual_seed(0)
    lengths, responses, tokens = [3, 7], [4, 2], 2 * ROOM + 9
    cache, alive = GroupCache(lengths, responses=responses), list(range(6))
    prompt_keys, prompt_values = ask(cache, sum(lengths), generator)
    keys, values = (torch.randn(6, 2, tokens, 8, generator=generator) for _ in range(2))
    for token in range(tokens):
        cache.advance()
        query = torch.randn(6, 4, 1, 8, generator=generator)
        found = cache.attend(
            query[alive],
            *(tensor[alive, :, token : token + 1] for tensor in (keys, values)),
            layer=0,
            scale=0.3,
            kernel=scaled_dot_product_attention,
        )
        for attended, row in zip(found, alive, strict=True):
            mine = slice(0, 3) if row < responses[0] else slice(3, 10)
            true = scaled_dot_product_attention(
                query[row],
                torch.cat([prompt_keys[0][:, mine], keys[row, :, : token + 1]], dim=1),
                torch.cat([prompt_values[0][:, mine], values[row, :, : token + 1]], dim=1),
                scale=0.3,
                enable_gqa=True,
            )
            torch.testing.assert_close(attended, true.transpose(0, 1), atol=1e-5, rtol=1e-5)
        for end, row in ((20, 4), (ROOM + 3, 0), (ROOM + 4, 2), (ROOM + 5, 1)):
            if token == end:
                cache.keep(torch.tensor([n for n, other in enumerate(alive) if other != row]))
                alive.remove(row)


def ask(
    cache: GroupCache, length: int, generator: torch.Generator | None = None, *, heads: int = 2
) -> tuple[Tensor, Tensor]:
    """The first pass: 4 query heads, so many of keys and values, 8 wide."""
    query, key, value = (
        torch.randn(1, count, length, 8, generator=generator) for count in (4, heads, heads)
    )
    cache.attend(query, key, value, layer=0, scale=0.3, kernel=scaled_dot_product_attention)
    return key, value


def test_wide_weights_in_narrow_precision_hold_narrow_keys(folder: Path) -> None:
    """As training has them: float32 weights, computing in bfloat16."""
    policy = load(str(folder), dtype=torch.float32, precision=torch.bfloat16, attention="sdpa")
    if not policy.packs:
        pytest.skip("transformers' own cache holds the keys of models that cannot attend in groups")
    responses = InGroups(policy, make_prompts(policy), [2, 2, 2])
    with policy.evaluating():
        states = responses.begin()
        responses.advance(torch.ones(len(states), dtype=torch.long))
    for held in responses._cache._layers.values():
        for tensor in (held.prompt_keys, held.prompt_values, held.keys, held.values):
            assert tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_autocast_casts_each_weight_once_for_all_tokens(
    folder: Path, precision: torch.dtype
) -> None:
    """Inference mode makes tokens cheaper, but autocast keeps nothing there."""
    policy = load(str(folder), dtype=torch.float32, precision=precision, attention="sdpa")
    modes = []

    def note(*given: Any) -> None:
        modes.append(torch.is_inference_mode_enabled())
        assert not torch.is_grad_enabled()

    policy.family.language_model(policy.model).register_forward_pre_hook(note)
    sample(policy, make_prompts(policy)[:1], max_new_tokens=3)
    assert modes == [False] + 2 * [precision == torch.float32]


# --- what is sampled ---------------------------------------------------------------------------


@pytest.mark.parametrize("heat", [1.0, 0.6])
def test_sampled_logprobs_are_those_the_scorer_gives(policy: Policy, heat: float) -> None:
    end_often(policy)
    prompts = make_prompts(policy)
    groups = sample(policy, prompts, responses=4, temperature=heat, top_p=0.9)
    responses = [response for group in groups for response in group]
    assert len({len(response.ids) for response in responses}) > 3
    for response, logprobs in zip(responses, rescored(policy, prompts, groups, heat), strict=True):
        torch.testing.assert_close(response.logprobs, logprobs, atol=1e-4, rtol=0)


def test_in_half_precision_logits_are_added_up_in_float32_as_scores_are(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    draw = in_process._draw

    def watch(logits: Tensor, *given: Any) -> Any:
        drawn.append(logits)
        return draw(logits, *given)

    monkeypatch.setattr(in_process, "_draw", watch)
    monkeypatch.setattr(policy, "precision", torch.bfloat16)
    sample(policy, make_prompts(policy), responses=2)
    for logits in drawn:
        assert logits.dtype == torch.float32
        assert (logits != logits.bfloat16()).float().mean() > 0.9


def test_temperature_zero_takes_the_likeliest_token(policy: Policy) -> None:
    """Compared with the plain model's whole forward, one row at a time."""
    prompts = make_prompts(policy)
    groups = sample(policy, prompts, responses=2, temperature=0.0)
    for prompt, group in zip(prompts, groups, strict=True):
        assert torch.equal(group[0].ids, group[1].ids)
        logits = true_logits(policy, prompt, group[0].ids)[:-1]
        logprobs = logits.log_softmax(-1).gather(-1, group[0].ids[:, None])[:, 0]
        torch.testing.assert_close(group[0].logprobs, logprobs, atol=1e-4, rtol=0)
        logits[:, list(policy.family.forbidden)] = -torch.inf
        assert torch.equal(group[0].ids, logits.argmax(-1))


@pytest.mark.parametrize("beside", [[], ITEMS[:1]], ids=["alone", "beside-one-with-an-image"])
def test_prompts_without_images_are_read_as_the_plain_model_reads_them(
    policy: Policy, beside: Sequence[Item]
) -> None:
    bare = [make_item(1, [], words="Why"), make_item(2, [], words="How many are there, in all")]
    prompts = [make_prompt(policy, item) for item in (bare[0], *beside, bare[1])]
    with passing(policy) as (patches, _):
        groups = sample(policy, prompts, responses=2)
        scored = rescored(policy, prompts, groups, heat=1.0)
    assert patches == [len(prompts[1].pixels)] * len(beside)  # what was seen serves the scores
    for number in (0, -1):
        prompt, group = prompts[number], groups[number]
        truth = true_inputs(Path(policy.source), prompt.item)
        assert torch.equal(prompt.ids, truth["input_ids"][0])
        assert not prompt.image_mask.any()
        for response, score in zip(group, scored[2 * number :][:2], strict=True):
            logits = true_logits(policy, prompt, response.ids)[:-1]
            logprobs = logits.log_softmax(-1).gather(-1, response.ids[:, None])[:, 0]
            torch.testing.assert_close(response.logprobs, logprobs, atol=1e-4, rtol=0)
            torch.testing.assert_close(score, logprobs, atol=1e-4, rtol=0)


def test_first_tokens_follow_the_policys_distribution(policy: Policy) -> None:
    """Pearson's chi-squared of 4,000 draws, against a bound that chance passes once in 10^6."""
    prompt, draws, heat = make_prompt(policy, ITEMS[0]), 4000, 0.5
    (group,) = sample(
        policy, [prompt], responses=draws, max_new_tokens=1, temperature=heat, batch_responses=draws
    )
    logits = true_logits(policy, prompt, prompt.ids[:0])[0] / heat
    logits[list(policy.family.forbidden)] = -torch.inf
    expected = draws * logits.softmax(-1)
    found = torch.bincount(torch.cat([r.ids for r in group]), minlength=len(expected)).float()
    often = expected >= 10
    cells = [(found[often], expected[often]), (found[~often].sum(), expected[~often].sum())]
    statistic = sum(float(((f - e) ** 2 / e).sum()) for f, e in cells)
    freedom = int(often.sum())
    assert freedom > 20
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 10


def test_visual_placeholders_are_never_drawn_however_likely(policy: Policy) -> None:
    """Their output rows are long: v, -v, w and -w; in any state one has most of the mass."""
    head = torch.nn.Parameter(policy.head.detach().clone())  # apart from the embeddings
    generator = torch.Generator().manual_seed(1)
    forbidden = list(policy.family.forbidden)
    ends = 20 * torch.randn(2, head.shape[1], generator=generator)
    with torch.no_grad():
        both = torch.stack([ends, -ends], dim=1).flatten(0, 1)
        head[forbidden] = both.repeat(len(forbidden), 1)[: len(forbidden)]
    policy.base.lm_head.weight = head
    prompts = make_prompts(policy)
    assert policy.family.image_token in policy.family.forbidden
    for settings in ({}, {"temperature": 0.0}, {"top_p": 0.5}):
        groups = sample(policy, prompts, **settings)
        sampled = torch.cat([response.ids for group in groups for response in group])
        assert not torch.isin(sampled, torch.tensor(policy.family.forbidden)).any()
        responses = [response for group in groups for response in group]
        assert torch.cat([response.logprobs for response in responses]).median() < -20
        for response, logprobs in zip(
            responses, rescored(policy, prompts, groups, 1.0), strict=True
        ):
            torch.testing.assert_close(response.logprobs, logprobs, atol=1e-3, rtol=0)


def test_probabilities_that_are_not_finite_are_named() -> None:
    broken = torch.full((2, 5), float("nan"))
    sampling = Sampling(responses=1, max_new_tokens=1)
    with pytest.raises(RuntimeError, match="not finite"):
        _draw(broken, torch.tensor([0]), sampling, torch.Generator())


def test_the_nucleus_is_the_fewest_likeliest_tokens_that_reach_top_p() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]])
    for top_p, kept in (
        (0.01, [[0, 0.5, 0, 0], None]),
        (0.49, [[0, 0.5, 0, 0], None]),
        (0.51, [[0, 0.5, 0, 0.25], None]),
        (0.8, [[0, 0.5, 0.15, 0.25], None]),
        (0.95, [[0.1, 0.5, 0.15, 0.25], [0.25] * 4]),
    ):
        found = _nucleus(probabilities, top_p)
        for row, expected in zip(found, kept, strict=True):
            if expected is not None:
                assert torch.equal(row, torch.tensor(expected))
    assert _nucleus(probabilities, 0.4)[1].count_nonzero() == 2  # of equals, just enough


@pytest.mark.parametrize("top_p", [1.0, 0.3])
def test_tokens_outside_the_nucleus_are_never_drawn(policy: Policy, top_p: float) -> None:
    prompts, heat = make_prompts(policy), 0.8
    groups = sample(policy, prompts, responses=6, temperature=heat, top_p=top_p)
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for response in group:
            logits = true_logits(policy, prompt, response.ids)[:-1] / heat
            logits[:, list(policy.family.forbidden)] = -torch.inf
            probabilities = logits.softmax(-1)
            drawn = probabilities.gather(-1, response.ids[:, None])
            likelier = (probabilities * (probabilities > drawn)).sum(-1)
            worst = max(worst, likelier.max().item())
    assert (worst < 0.3 + 1e-4) is (top_p == 0.3)


def test_a_tiny_nucleus_is_greedy(policy: Policy) -> None:
    prompts = make_prompts(policy)
    greedy = sample(policy, prompts, temperature=0.0)
    assert written(sample(policy, prompts, top_p=1e-6)) == written(greedy)


def test_the_generators_seed_alone_decides(policy: Policy) -> None:
    prompts = make_prompts(policy)
    torch.manual_seed(1)
    one = written(sample(policy, prompts, seed=5))
    torch.manual_seed(2)
    assert written(sample(policy, prompts, seed=5)) == one
    assert written(sample(policy, prompts, seed=6)) != one
    assert len({tuple(ids) for ids in one}) == len(one)  # responses of a group differ


# --- where responses end -----------------------------------------------------------------------


def test_responses_end_at_the_first_end_token_or_are_cut_off(policy: Policy) -> None:
    end_often(policy)
    groups = sample(policy, make_prompts(policy), responses=8, max_new_tokens=6)
    responses = [response for group in groups for response in group]
    assert len({response.finished for response in responses}) == 2
    for response in responses:
        ends = torch.isin(response.ids, torch.tensor(policy.eos))
        assert not ends[:-1].any()
        assert bool(ends[-1]) is response.finished
        assert len(response.logprobs) == len(response.ids)
        assert response.finished or len(response.ids) == 6


def test_the_text_leaves_out_the_end_token(policy: Policy) -> None:
    end = policy.tokenizer.eos_token_id
    with torch.no_grad():
        policy.base.lm_head.weight.zero_()  # any token is as likely as another
    groups = sample(policy, make_prompts(policy), responses=40, max_new_tokens=30)
    finished = [response for group in groups for response in group if response.finished]
    assert finished
    for response in finished:
        assert response.ids[-1] == end
        added = policy.tokenizer.added_tokens_decoder
        words = [t for t in response.ids[:-1].tolist() if not (t in added and added[t].special)]
        assert response.text == policy.tokenizer.decode(words)


def test_rows_that_end_early_and_padding_do_not_move_the_others(policy: Policy) -> None:
    prompts, policy.eos = make_prompts(policy), (-1,)
    endless = written(sample(policy, prompts, responses=1, temperature=0.0))

    def lengths(end: int) -> set[int]:
        return {[*ids, end].index(end) for ids in endless}

    # The token whose use as the end stops rows at the most different steps.
    policy.eos = (max({token for ids in endless for token in ids}, key=lambda t: len(lengths(t))),)
    assert len(lengths(*policy.eos)) > 1
    together = sample(policy, prompts, responses=2, temperature=0.0)
    for prompt, group, ids in zip(prompts, together, endless, strict=True):
        end = [*ids, *policy.eos].index(*policy.eos)
        (alone,) = sample(policy, [prompt], responses=1, temperature=0.0)
        for response in group:
            assert response.ids.tolist() == ids[: end + 1] == alone[0].ids.tolist()
            assert response.finished is alone[0].finished is (end < len(ids))
            torch.testing.assert_close(response.logprobs, alone[0].logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_responses", [1, 4, 5, 256])
def test_cutting_a_rollout_into_batches_keeps_its_groups(
    policy: Policy, batch_responses: int
) -> None:
    prompts = make_prompts(policy)
    prompts += [make_prompt(policy, make_item(9, [(90, 90)])), prompts[0]]
    whole = sample(policy, prompts, responses=2, temperature=0.0, max_new_tokens=5)
    cut = sample(
        *(policy, prompts),
        responses=2,
        temperature=0.0,
        max_new_tokens=5,
        batch_responses=batch_responses,
    )
    assert [len(group) for group in cut] == [2] * 5
    assert written(cut) == written(whole)
    assert len({tuple(ids) for ids in written(whole)}) > 1


def test_a_rollout_leaves_the_policys_mode_alone_even_between_its_groups(policy: Policy) -> None:
    policy.model.train()
    sampling = Sampling(responses=1, max_new_tokens=2, batch_responses=1)
    for _ in generate(policy, make_prompts(policy), sampling, torch.Generator()):
        assert torch.is_grad_enabled()
        assert policy.model.training


def test_a_checkpointing_adapted_policy_samples_what_it_scores(folder: Path) -> None:
    """Gradient checkpointing drops caches in training mode; adapters are part of the policy."""
    policy = load(
        str(folder),
        dtype=torch.float32,
        attention="sdpa",
        gradient_checkpointing=True,
        lora={"r": 4, "target_modules": "all-linear", "init_lora_weights": False},
    )
    prompts = make_prompts(policy)
    groups = sample(policy, prompts, responses=2)
    found = [response.logprobs for group in groups for response in group]
    for logprobs, truth in zip(found, rescored(policy, prompts, groups, 1.0), strict=True):
        torch.testing.assert_close(logprobs, truth, atol=1e-4, rtol=0)


# --- compiled ----------------------------------------------------------------------------------


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Has sampling compiled by a backend of PyTorch's compiler, from nothing."""
    plain = torch.compile

    def by(backend: Any) -> None:
        torch._dynamo.reset()
        compile = functools.partial(plain, backend=backend)
        monkeypatch.setattr(torch, "compile", compile)

    decoding._compiled.cache_clear()
    yield by
    decoding._compiled.cache_clear()
    torch._dynamo.reset()


def side_by_side(
    policy: Policy, prompts: Sequence[Prompt], tokens: int, going_on: dict[int, list[int]]
) -> None:
    """Compiled and plain give the same states, two responses to each prompt.

    `going_on` says which of the responses do so after how many tokens.
    """
    left = 2 * len(prompts)
    counts = [2] * len(prompts)
    ways = [InGroups(policy, prompts, counts, compile=c) for c in (False, True)]
    generator = torch.Generator().manual_seed(0)
    with policy.evaluating():
        for way in ways:
            way.begin()
        for token in range(1, tokens + 1):
            ids = torch.randint(50, (left, 1), generator=generator)[:, 0]
            if left < 2 * len(prompts):
                ids = ids.clone()  # a view until then, as samplers have it
            plain, compiled = (way.advance(ids) for way in ways)
            torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
            if token in going_on:
                left = len(going_on[token])
                for way in ways:
                    way.keep(torch.tensor(going_on[token]))


@pytest.mark.parametrize("folder", ["qwen3_vl", "internvl"], indirect=True)
def test_few_graphs_serve_all_tokens(policy: Policy, compiling: Callable[[Any], None]) -> None:
    """One, though responses end; others for several prompts with one each, and for one prompt."""
    graphs = []

    def run_as_it_is(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiling(run_as_it_is)
    first, second, third = make_prompts(policy)
    for _ in range(2):
        side_by_side(policy, [first, second, third], 20, {10: [0, 1, 2, 4, 5], 15: [0, 1, 2]})
        side_by_side(policy, [first, second, first], 20, {10: [0, 1, 4, 5]})  # no more padded
        assert len(graphs) == 1
    for _ in range(2):
        side_by_side(policy, [first, second, third], 30, {10: [1, 2, 4], 15: [0, 2], 25: [1]})
        assert len(graphs) == 2
    for _ in range(2):
        side_by_side(policy, [first], 12, {10: [1]})
        side_by_side(policy, [second], 20, {})
        assert len(graphs) == 3


def test_compiled_code_gives_the_states_that_the_model_gives(
    tmp_path: Path, tokenizer: Any, compiling: Callable[[Any], None]
) -> None:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        skip_or_fail("there is no C++ compiler, which torch.compile needs on a CPU")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        skip_or_fail("Python's headers are not installed, which torch.compile needs on a CPU")
    folder = save_family("qwen2_5_vl", tmp_path, tokenizer)
    policy = load(str(folder), dtype=torch.float32, attention="sdpa")
    graphs = []

    def by_inductor(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return compile_fx(graph, inputs)

    compiling(by_inductor)
    # More than there is room for in the beginning; it guards more than the graph alone does.
    side_by_side(policy, make_prompts(policy)[:2], ROOM + 6, {ROOM + 3: [0, 2, 3]})
    assert len(graphs) == 1
    assert not decoding._compiled().failed


@pytest.mark.parametrize("folder", ["qwen3_vl", "gemma3"], indirect=True)
def test_sampling_goes_on_where_compiling_fails(
    policy: Policy, compiling: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no working compiler")

    compiling(broken)
    prompts = make_prompts(policy)
    decoding._say_once.cache_clear()
    with caplog.at_level("WARNING", logger="cppo.rollout.decoding"):
        found = written(sample(policy, prompts, compile=True))
        again = written(sample(policy, prompts, compile=True))
    assert found == again == written(sample(policy, prompts))
    (told,) = (record.message for record in caplog.records if "not compiled" in record.message)
    assert ("no working compiler" if policy.packs else "does not attend in groups") in told


def test_weights_that_each_token_would_make_narrow_are_not_compiled(folder: Path) -> None:
    policy = load(str(folder), dtype=torch.float32, precision=torch.bfloat16, attention="sdpa")
    given = make_prompts(policy)[:1]
    assert not decoding.decoder(policy, given, 2, compile=True).compiled
    narrow = load(str(folder), dtype=torch.bfloat16, precision=torch.bfloat16, attention="sdpa")
    assert decoding.decoder(narrow, given, 2, compile=True).compiled == narrow.packs


# --- real data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["geometry3k-mini", "puzzlevqa-mini", "dynamath-mini"])
def test_real_items_generate_and_score(
    tiny_policy: Policy, shared_data: Callable[[str], Path], name: str
) -> None:
    data = load_data(str(shared_data(name)), split="train")
    prompts = [
        encode_item(tiny_policy, data.read(index), instruction=" Think.", max_tokens=2048)
        for index in (0, 1)
    ]
    groups = sample(tiny_policy, prompts, responses=2, max_new_tokens=8)
    for response, logprobs in zip(
        (response for group in groups for response in group),
        rescored(tiny_policy, prompts, groups, 1.0),
        strict=True,
    ):
        assert len(response.ids) == 8 or response.finished
        torch.testing.assert_close(response.logprobs, logprobs, atol=1e-4, rtol=0)


def test_the_nucleus_is_the_same_where_algorithms_must_be_deterministic() -> None:
    probabilities = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    free = _nucleus(probabilities, 0.7)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(_nucleus(probabilities, 0.7), free)
    finally:
        torch.use_deterministic_algorithms(False)
