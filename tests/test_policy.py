"""Laws of the policy: what it computes is what the unmodified transformers model computes.

R rows, T response tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cppo_cpu
import pytest
import torch
from families import (
    FAMILIES,
    ITEMS,
    QWEN,
    continued,
    counted,
    make_item,
    make_prompt,
    picture,
    random_response,
    randomise,
    save_family,
    true_inputs,
    vision_tower,
)
from torch import Tensor, nn

from cppo.data import BadRow, Item
from cppo.data import load as load_data
from cppo.device import Backend, choose
from cppo.methods import Scores, View
from cppo.policy import Policy, Row, Scorer, encode_view, load, save
from cppo.policy.loading import frozen_copy
from cppo.rollout import Sampling, generate

TEMPERATURE = 0.7
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


@pytest.fixture(scope="session")
def backend() -> Backend:
    return choose("cpu")


@pytest.fixture(scope="session", params=FAMILIES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_family(request.param, tmp_path_factory.mktemp(request.param), tokenizer)


@pytest.fixture
def policy(folder: Path) -> Policy:
    return load_float32(folder)


def load_float32(folder: Path, **options: Any) -> Policy:
    return load(str(folder), dtype=torch.float32, attention="sdpa", **options)


def make_rows(policy: Policy) -> list[Row]:
    """Groups of 1, 4 and 2 responses; one response of the second group sees other pixels."""
    rows = []
    for item, lengths in zip(ITEMS, ([5], [3, 9, 1, 6], [7, 2]), strict=True):
        prompt = make_prompt(policy, item)
        for length in lengths:
            response = random_response(policy, length, seed=len(rows))
            rows.append(Row(prompt=prompt, response=response))
    view = View(name="dark", perturbations={"rotation": {}, "gaussian_noise": {}})
    other = encode_view(policy, rows[3].prompt, view, seed=1, step=0)
    rows[3] = Row(prompt=other, response=rows[3].response)
    rows[2], rows[6] = rows[6], rows[2]  # groups need not be contiguous
    return rows


# --- the truth: unmodified transformers, one row at a time -------------------------------------


def load_truth(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def true_logits(model: Any, inputs: dict[str, Tensor], response: Tensor) -> Tensor:
    """Float logits that predict the response's tokens, (T, V)."""
    prompt_length = inputs["input_ids"].shape[1]
    return (
        model(**continued(inputs, response), use_cache=False)
        .logits[0, prompt_length - 1 : -1]
        .float()
    )


def true_statistics(logits: Tensor, response: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = (logits / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, response[:, None])[:, 0], entropy


def true_scores(
    model: Any, folder: Path, rows: Sequence[Row], temperature: float = TEMPERATURE
) -> list[tuple[Tensor, Tensor]]:
    scores = []
    for row in rows:
        inputs = true_inputs(folder, row.prompt.item)
        inputs["pixel_values"] = row.prompt.pixels.view_as(inputs["pixel_values"])
        logits = true_logits(model, inputs, row.response)
        scores.append(true_statistics(logits, row.response, temperature))
    return scores


def unpadded(scores: Scores, rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
    return [
        (scores.logprobs[index, : len(row.response)], scores.entropy[index, : len(row.response)])
        for index, row in enumerate(rows)
    ]


def functional(scores: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """A random linear functional of all log-probabilities and entropies."""
    generator = torch.Generator().manual_seed(11)
    return sum(
        (torch.randn(values.shape, generator=generator) * values).sum()
        for pair in scores
        for values in pair
    )  # type: ignore[return-value]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_same_gradients(
    found: dict[str, Tensor | None], truth: dict[str, Tensor | None], relative: float = 1e-5
) -> None:
    assert found.keys() == truth.keys()
    # A gradient that is zero by symmetry (of key biases) is rounding noise: measured by the whole.
    whole = torch.stack([g.norm() for g in truth.values() if g is not None]).norm()
    for name, gradient in truth.items():
        value = found[name]
        if gradient is None:
            assert value is None, name
            assert "post_layernorm" in name, name  # the one part that features do not pass
            continue
        assert value is not None, name
        assert (value - gradient).norm() <= relative * gradient.norm() + 1e-6 * whole, name


def assert_same_scores(
    found: Sequence[tuple[Tensor, Tensor]],
    truth: Sequence[tuple[Tensor, Tensor]],
    tolerance: float = 1e-5,
) -> None:
    for row, truth_row in zip(found, truth, strict=True):
        for values, truth_values in zip(row, truth_row, strict=True):
            torch.testing.assert_close(values, truth_values, atol=tolerance, rtol=0)


def score(policy: Policy, backend: Backend, rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
    return unpadded(Scorer(policy, backend, temperature=TEMPERATURE)(rows), rows)


def largest_difference(
    one: Sequence[tuple[Tensor, Tensor]], other: Sequence[tuple[Tensor, Tensor]]
) -> float:
    return max((a[0] - b[0]).abs().max().item() for a, b in zip(one, other, strict=True))


# --- scoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [*FAMILIES, "smolvlm"], indirect=True)
def test_scores_and_gradients_are_those_of_the_plain_model_row_by_row(
    folder: Path, policy: Policy, backend: Backend
) -> None:
    """Whether attention is in parts or under a mask."""
    rows, model = make_rows(policy), load_truth(folder).train()
    truth = true_scores(model, folder, rows)
    functional(truth).backward()
    for part in (cppo_cpu.PARTIAL_ATTENTION, None):
        policy.model.zero_grad()
        scorer = Scorer(policy, replace(backend, partial_attention=part), temperature=TEMPERATURE)
        found = scorer(rows)
        functional(unpadded(found, rows)).backward()

        assert_same_scores(unpadded(found, rows), truth)
        assert_same_gradients(gradients(policy.model), gradients(model))
        for index, row in enumerate(rows):
            assert not found.logprobs[index, len(row.response) :].any()
            assert not found.entropy[index, len(row.response) :].any()


@pytest.mark.parametrize("folder", [*FAMILIES, "smolvlm"], indirect=True)
def test_prompts_hold_the_ids_and_pixels_that_transformers_own_processor_makes(
    folder: Path, policy: Policy
) -> None:
    for item in ITEMS:
        prompt, truth = make_prompt(policy, item), true_inputs(folder, item)
        assert torch.equal(prompt.ids, truth["input_ids"][0])
        assert torch.equal(prompt.image_mask, prompt.ids == policy.base.config.image_token_id)
        assert torch.equal(prompt.pixels.view_as(truth["pixel_values"]), truth["pixel_values"])


@pytest.mark.parametrize("folder", QWEN, indirect=True)
def test_one_dimensional_positions_would_be_noticed(
    folder: Path, policy: Policy, backend: Backend
) -> None:
    row, model = make_rows(policy)[0], load_truth(folder)
    with torch.no_grad():
        inputs = true_inputs(folder, row.prompt.item)
        length = inputs["input_ids"].shape[1] + len(row.response)
        inputs["position_ids"] = torch.arange(length).expand(3, 1, length)
        flat = true_statistics(true_logits(model, inputs, row.response), row.response, TEMPERATURE)
        assert largest_difference(score(policy, backend, [row]), [flat]) > 0.01


def test_blind_rows_are_scored_as_if_image_tokens_were_masked(
    folder: Path, policy: Policy, backend: Backend
) -> None:
    """The published definition: attention to image tokens masked, positions unchanged; here beside
    rows that see, in unmodified transformers one row at a time."""
    rows = make_rows(policy)
    blind = [Row(prompt=replace(rows[0].prompt, blind=True), response=rows[0].response)]
    shared = replace(rows[1].prompt, blind=True)
    blind += [Row(prompt=shared, response=rows[n].response) for n in (1, 4)]
    with counted(vision_tower(policy)) as patches:
        found = score(policy, backend, [*blind, *rows])
    assert patches == [sum({id(r.prompt): len(r.prompt.pixels) for r in rows}.values())]
    model, truth = load_truth(folder), []
    for row in blind:
        inputs = true_inputs(folder, row.prompt.item)
        inputs["attention_mask"] = (~row.prompt.image_mask[None]).long()
        inputs["position_ids"] = ordinary_positions(model, inputs, row)
        logits = true_logits(model, inputs, row.response)
        truth.append(true_statistics(logits, row.response, TEMPERATURE))
    assert_same_scores(found, [*truth, *true_scores(model, folder, rows)])
    seeing = score(policy, backend, [Row(prompt=rows[0].prompt, response=rows[0].response)])
    assert largest_difference(seeing, truth[:1]) > 0.01


def ordinary_positions(model: Any, inputs: dict[str, Tensor], row: Row) -> Tensor:
    """Of a prompt and its response, as the model has them where nothing is masked."""
    whole = continued(inputs, row.response)
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(whole["input_ids"].shape[1])[None]
    kinds, grids = whole["mm_token_type_ids"], whole["image_grid_thw"]
    positions: Tensor = model.model.get_rope_index(whole["input_ids"], kinds, image_grid_thw=grids)[
        0
    ]
    return positions


def test_divergence_between_views_is_that_of_their_whole_distributions(
    folder: Path, policy: Policy, backend: Backend
) -> None:
    rows = make_rows(policy)[:2]
    view = View(name="other", perturbations={"blackout": {}})
    prompt = encode_view(policy, rows[0].prompt, view, seed=1, step=0)
    other = Row(prompt=prompt, response=rows[0].response, against=rows[0])
    scores = Scorer(policy, backend, temperature=TEMPERATURE)([*rows, other])
    assert scores.divergence is not None
    assert not scores.divergence[:2].any()
    model = load_truth(folder)
    logprobs = []
    for row in (rows[0], other):
        inputs = true_inputs(folder, row.prompt.item)
        inputs["pixel_values"] = row.prompt.pixels.view_as(inputs["pixel_values"])
        logits = true_logits(model, inputs, row.response).double() / TEMPERATURE
        logprobs.append(logits.log_softmax(-1))
    truth = (logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum(-1)
    assert truth.max() > 1e-3
    length = len(other.response)
    torch.testing.assert_close(scores.divergence[2, :length].double(), truth, atol=1e-5, rtol=1e-4)
    assert not scores.divergence[2, length:].any()


def test_a_vision_tower_that_is_not_trained_sees_each_picture_once_while_it_is_held(
    folder: Path, backend: Backend
) -> None:
    frozen = load(str(folder), dtype=torch.float32, attention="sdpa", freeze_vision=True)
    trained = load(str(folder), dtype=torch.float32, attention="sdpa")
    rows = make_rows(frozen)
    once = sum({id(row.prompt.pixels): len(row.prompt.pixels) for row in rows}.values())
    sampling = Sampling(responses=1, max_new_tokens=2)
    for policy, passes in ((frozen, [once]), (trained, [once, once, None])):
        with counted(vision_tower(policy)) as patches:
            first = score(policy, backend, rows)
            second = score(policy, backend, rows)
            list(generate(policy, [rows[0].prompt], sampling, torch.Generator()))
        assert patches == [len(rows[0].prompt.pixels) if p is None else p for p in passes]
        assert largest_difference(first, second) == 0
    assert len(frozen.features) == len({id(row.prompt.pixels) for row in rows})
    del rows
    assert not len(frozen.features)  # and no longer than that


def test_a_tower_that_learns_looks_again_once_it_has_changed(
    folder: Path, backend: Backend
) -> None:
    policy = load_float32(folder)
    rows = make_rows(policy)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=False)
    pictures = sum({id(row.prompt.pixels): len(row.prompt.pixels) for row in rows}.values())
    with counted(vision_tower(policy)) as patches:
        with torch.no_grad():
            before = score(policy, backend, rows)
            again = score(policy, backend, rows)
        assert patches == [pictures]
        assert largest_difference(before, again) == 0
        learnt = score(policy, backend, rows)
        assert patches == [pictures] * 2
        sum(logprobs.sum() for logprobs, _ in learnt).backward()
        optimizer.step()
        with torch.no_grad():
            after = score(policy, backend, rows)
        assert patches == [pictures] * 3
    policy.features.clear()
    assert largest_difference(after, score(policy, backend, rows)) < 1e-5
    assert largest_difference(after, before) > 1e-3


def test_adapters_in_the_tower_are_left_out_where_they_are_to_be(
    folder: Path, backend: Backend
) -> None:
    adapted = load_float32(folder, lora=LORA | {"init_lora_weights": False})
    plain, rows = load_float32(folder), make_rows(adapted)
    pictures = sum({id(row.prompt.pixels): len(row.prompt.pixels) for row in rows}.values())
    with torch.no_grad(), counted(vision_tower(adapted)) as patches:
        first = score(adapted, backend, rows)
        with adapted.without_adapters():
            bare = score(adapted, backend, rows)
        assert largest_difference(score(adapted, backend, rows), first) == 0
        assert patches == [pictures] * 2
        assert largest_difference(bare, score(plain, backend, rows)) < 1e-5
    assert largest_difference(bare, first) > 1e-3


def test_a_frozen_tower_under_checkpointed_adapters_can_be_gone_back_through_twice(
    folder: Path, backend: Backend
) -> None:
    policy = load(
        str(folder),
        dtype=torch.float32,
        attention="sdpa",
        freeze_vision=True,
        gradient_checkpointing=True,
        lora=LORA,
    )
    rows, scorer = make_rows(policy), Scorer(policy, backend, temperature=1.0)
    for _ in range(2):
        scorer(rows).logprobs.sum().backward()
    assert policy.features
    held = [features for kept in policy.features.values() for features in kept.values()]
    assert not any(features.requires_grad for features in held)
    gradients = [p.grad for p in policy.model.parameters() if p.requires_grad]
    assert any(gradient is not None and gradient.any() for gradient in gradients)


def test_pixels_move_the_scores(policy: Policy, backend: Backend) -> None:
    row = make_rows(policy)[0]
    unseen = replace(row.prompt, pixels=torch.zeros_like(row.prompt.pixels))
    blank = Row(prompt=unseen, response=row.response)
    with policy.evaluating():
        seeing, blind = score(policy, backend, [row]), score(policy, backend, [blank])
    assert largest_difference(seeing, blind) > 0.01


def test_each_distinct_picture_passes_the_vision_tower_once_a_call(
    policy: Policy, backend: Backend
) -> None:
    rows = make_rows(policy)
    distinct = {id(row.prompt.pixels): len(row.prompt.pixels) for row in rows}
    assert len(distinct) == 4 < len(rows)
    with counted(vision_tower(policy)) as patches:
        score(policy, backend, rows)
    assert patches == [sum(distinct.values())]


def test_sampled_placeholders_are_scored_as_text(
    folder: Path, policy: Policy, backend: Backend
) -> None:
    """A token with the placeholder's weights and another id stands in for it in the truth."""
    prompt, image, twin = make_prompt(policy, ITEMS[1]), policy.family.image_token, 300
    model = load_truth(folder)
    with torch.no_grad():
        for made in (policy.base, model):
            for weight in (made.get_input_embeddings().weight, made.lm_head.weight):
                weight[twin] = weight[image]
        response = random_response(policy, 6, seed=5)
        sampled, plain = response.clone(), response.clone()
        sampled[[0, 2, 3]], plain[[0, 2, 3]] = image, twin
        rows = [Row(prompt=prompt, response=r) for r in (sampled, plain)]
        found = score(policy, backend, rows)
        truth = true_scores(model, folder, rows[1:])
    assert_same_scores(found, [*truth, *truth])


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "lora"])
@pytest.mark.parametrize("freeze_vision", [False, True], ids=["all", "frozen-tower"])
def test_gradient_checkpointing_recomputes_but_moves_nothing(
    folder: Path, backend: Backend, lora: Any, freeze_vision: bool
) -> None:
    made = []
    for checkpointing in (False, True):
        policy = load_float32(
            folder, lora=lora, freeze_vision=freeze_vision, gradient_checkpointing=checkpointing
        )
        disturb_adapters(policy)
        rows = make_rows(policy)
        with counted(policy.language.layers[1].input_layernorm) as calls:
            scores = score(policy, backend, rows)
            functional(scores).backward()
        assert len(calls) == 1 + checkpointing
        made.append((scores, trained(policy)))
    assert_same_scores(made[1][0], made[0][0], tolerance=1e-6)
    assert_same_gradients(made[1][1], made[0][1])


def trained(policy: Policy) -> dict[str, Tensor | None]:
    """Gradients of what is to be trained; asserts that nothing else has one."""
    wanted = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    found = gradients(policy.model)
    assert {name for name, gradient in found.items() if gradient is not None} == wanted
    return {name: found[name] for name in wanted}


def is_vision(policy: Policy, parameter: str) -> bool:
    return any(f".{part}." in f"{parameter}." for part in policy.family.vision)


def disturb_adapters(policy: Policy) -> None:
    """Adapters start as an identity, from peft's own draws; this makes them count and alike."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(policy.model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.07 * torch.randn(parameter.shape, generator=generator))


def test_fresh_adapters_change_nothing_and_only_they_are_trained(
    folder: Path, policy: Policy, backend: Backend
) -> None:
    adapted, rows = load_float32(folder, lora=LORA), make_rows(policy)
    scores = score(adapted, backend, rows)
    assert_same_scores(scores, score(policy, backend, rows))
    functional(scores).backward()
    assert all("lora_" in name for name in trained(adapted))
    assert any(is_vision(adapted, name) for name in trained(adapted))


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "lora"])
def test_a_frozen_vision_tower_has_neither_gradients_nor_adapters(
    folder: Path, policy: Policy, backend: Backend, lora: Any
) -> None:
    frozen, rows = load_float32(folder, freeze_vision=True, lora=lora), make_rows(policy)
    scores = score(frozen, backend, rows)
    assert_same_scores(scores, score(policy, backend, rows))
    functional(scores).backward()
    in_tower = [name for name, _ in frozen.model.named_parameters() if is_vision(frozen, name)]
    assert in_tower
    assert not any("lora" in name for name in in_tower)
    assert not any(is_vision(frozen, name) for name in trained(frozen))
    assert any(".layers." in name for name in trained(frozen))


@pytest.mark.parametrize("in_parts", [True, False])
def test_autocast_scores_are_float32_and_near_the_exact_ones(
    policy: Policy, backend: Backend, in_parts: bool
) -> None:
    part = cppo_cpu.PARTIAL_ATTENTION if in_parts else None
    rows, backend = make_rows(policy), replace(backend, partial_attention=part)
    exact = score(policy, backend, rows)
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(policy, backend, rows)
    functional(scores).backward()
    assert all(values.dtype == torch.float32 for pair in scores for values in pair)
    found = trained(policy)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    assert 1e-5 < largest_difference(scores, exact) < 0.3
    error = torch.cat([a[0] - b[0] for a, b in zip(scores, exact, strict=True)])
    assert error.abs().mean() < 0.05


@pytest.mark.parametrize("folder", [*FAMILIES, "smolvlm"], indirect=True)
@pytest.mark.parametrize("name", ["geometry3k-mini", "dynamath-mini"])
def test_real_items_have_the_ids_pixels_and_scores_of_plain_transformers(
    folder: Path, policy: Policy, backend: Backend, shared_data: Any, name: str
) -> None:
    data = load_data(str(shared_data(name)), split="train")
    rows = []
    for index in (0, 1, 5):
        prompt = make_prompt(policy, data.read(index), max_tokens=2000)
        truth = true_inputs(folder, prompt.item)
        assert torch.equal(prompt.ids, truth["input_ids"][0])
        assert torch.equal(prompt.pixels.view_as(truth["pixel_values"]), truth["pixel_values"])
        response = random_response(policy, 5, seed=index)
        rows.append(Row(prompt=prompt, response=response))
    with policy.evaluating():
        found = score(policy, backend, rows)
        assert_same_scores(found, true_scores(load_truth(folder), folder, rows))


# --- the policy that is measured against -------------------------------------------------------


def test_a_frozen_copy_stays_when_the_policy_moves(policy: Policy, backend: Backend) -> None:
    rows, wanted = make_rows(policy), [p.requires_grad for p in policy.model.parameters()]
    with torch.no_grad():
        before = score(policy, backend, rows)
        reference = frozen_copy(policy)
        randomise(policy.model)
        assert_same_scores(score(reference, backend, rows), before, tolerance=0)
        assert largest_difference(score(policy, backend, rows), before) > 0.1
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert [p.requires_grad for p in policy.model.parameters()] == wanted
    assert any(wanted)


def test_without_adapters_the_starting_policy_answers(
    folder: Path, policy: Policy, backend: Backend
) -> None:
    adapted, rows = load_float32(folder, lora=LORA), make_rows(policy)
    disturb_adapters(adapted)
    with torch.no_grad():
        moved = score(adapted, backend, rows)
        with adapted.without_adapters():
            start = score(adapted, backend, rows)
        assert_same_scores(start, score(policy, backend, rows))
        assert largest_difference(moved, start) > 0.01
        assert_same_scores(score(adapted, backend, rows), moved, tolerance=0)


def test_evaluating_gives_back_the_mode_it_found(policy: Policy) -> None:
    for mode in (True, False):
        policy.model.train(mode)
        with policy.evaluating():
            assert not policy.model.training
            assert not torch.is_grad_enabled()
        assert policy.model.training is mode
        assert torch.is_grad_enabled()


# --- saving and loading ------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "lora"])
def test_plain_transformers_reads_a_saved_policy_and_computes_the_same(
    folder: Path, backend: Backend, tmp_path: Path, lora: Any
) -> None:
    from safetensors import safe_open

    policy = load_float32(folder, lora=lora)
    if lora is None:
        randomise(policy.model)  # what is saved is not what was loaded
    disturb_adapters(policy)
    rows = make_rows(policy)
    with torch.no_grad():
        scores = score(policy, backend, rows)
        save(policy, tmp_path)
        truth = true_scores(load_truth(tmp_path), tmp_path, rows)
        assert_same_scores(scores, truth)
        assert_same_scores(score(policy, backend, rows), scores, tolerance=0)
        assert largest_difference(scores, true_scores(load_truth(folder), folder, rows)) > 0.01
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as saved,
        safe_open(folder / "model.safetensors", "pt") as original,
    ):
        assert set(saved.keys()) == set(original.keys())
    assert not list(tmp_path.glob("adapter*"))


@pytest.mark.parametrize("folder", QWEN, indirect=True)
def test_pixel_limits_hold_for_prompts_and_are_saved(folder: Path, tmp_path: Path) -> None:
    from transformers import Qwen2VLImageProcessorPil

    limits = {"min_pixels": 64 * 64, "max_pixels": 96 * 96}
    policy = load_float32(folder, pixel_limits=limits)
    patch = policy.base.config.vision_config.patch_size
    save(policy, tmp_path)
    saved = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    for image in (picture(1, 300, 200), picture(2, 20, 20)):
        item = Item(row="", images=(image,), question="<image>?", answer="1")
        grid = make_prompt(policy, item).grids
        assert 64**2 <= int(grid.prod()) * patch**2 <= 96**2
        assert torch.equal(saved([image], return_tensors="pt")["image_grid_thw"], grid)


@pytest.mark.parametrize(
    ("folder", "limit", "tiles"),
    [
        ("internvl", 3 * 32 * 32, [3, 1]),  # 2 x 1 tiles and a thumbnail; one that is square
        ("internvl", 5, [1, 1]),
        ("idefics3", 2 * 64 * 64, [3, 5]),  # of at most 64 x 64: 1 x 2 and the whole; 2 x 2
        ("idefics3", 5, [1, 1]),
    ],
    indirect=["folder"],
)
def test_pixel_limits_are_kept_to_in_tiles(
    folder: Path, tmp_path: Path, limit: int, tiles: list[int]
) -> None:
    policy = load_float32(folder, pixel_limits={"max_pixels": limit})
    save(policy, tmp_path)
    items = [make_item(1, [(200, 90)]), make_item(2, [(300, 301)])]
    for made in (policy, load_float32(tmp_path)):
        assert [len(make_prompt(made, item).pixels) for item in items] == tiles


@pytest.mark.parametrize(
    ("folder", "limit"),
    [
        ("internvl", "min_pixels"),
        ("idefics3", "min_pixels"),
        ("llava_onevision", "max_pixels"),
        ("gemma3", "max_pixels"),
    ],
    indirect=["folder"],
)
def test_pixel_limits_that_cannot_be_kept_are_refused(folder: Path, limit: str) -> None:
    with pytest.raises(ValueError, match=rf"policy\.{limit} has no meaning .* leave it null"):
        load_float32(folder, pixel_limits={limit: 10_000})


@pytest.mark.parametrize("folder", ["llava_onevision"], indirect=True)
def test_the_chat_template_is_the_processors_where_it_has_one(folder: Path, tmp_path: Path) -> None:
    """As saved years ago: the tokenizer's own template then knows nothing of images."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0].content }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    old, new = (make_prompt(load_float32(f), ITEMS[1]) for f in (tmp_path, folder))
    assert torch.equal(old.ids, new.ids)


def test_torchvision_is_not_needed(policy: Policy) -> None:
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed here, so its absence cannot be tried")
    assert len(make_prompt(policy, ITEMS[0]).pixels) > 0


def test_responses_end_where_the_model_or_its_tokenizer_says(
    folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    policy = load_float32(folder)
    assert policy.eos == (tokenizer.eos_token_id,)
    policy.model.generation_config.eos_token_id = [90, tokenizer.eos_token_id, 17]
    save(policy, tmp_path)
    assert load_float32(tmp_path).eos == tuple(sorted({17, 90, tokenizer.eos_token_id}))


def test_a_missing_folder_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent' is no folder: give one .*save_pretrained"):
        load_float32(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no config.json: give a folder .*save_pretrained"):
        load_float32(tmp_path)
    with pytest.raises(ValueError, match=r"'absent/model' cannot be loaded: "):  # on the Hub
        load_float32(Path("absent/model"))


@pytest.mark.parametrize("model_type", ["qwen2", "clip"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=rf"'{model_type}' are not supported; known: qwen2_vl, "):
        load_float32(tmp_path)


@pytest.mark.parametrize("folder", ["gemma3"], indirect=True)
def test_a_head_that_does_more_than_multiply_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = 30.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="caps its logits"):
        load_float32(tmp_path)


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_float32(tmp_path)


def test_a_folder_with_a_weight_missing_or_cut_short_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights, file = load_file(folder / "model.safetensors"), tmp_path / "model.safetensors"
    lost = sorted(weights)[-1]
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of its weights"):
        load_float32(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_float32(tmp_path)


@pytest.mark.parametrize(
    ("folder", "target"),
    [*((name, "lm_head") for name in FAMILIES), *((name, "proj") for name in QWEN)],
    indirect=["folder"],
)
def test_adapters_that_nothing_would_read_are_refused(folder: Path, target: str) -> None:
    with pytest.raises(ValueError, match=rf"LoRA cannot adapt .*{target}, whose weight"):
        load_float32(folder, lora={"r": 2, "target_modules": [target, "q_proj"]})


def test_adapters_of_modules_that_are_not_there_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"policy.lora_targets is 'nosuch': "):
        load_float32(folder, lora={"r": 2, "target_modules": "nosuch"})


# --- prompts and views -------------------------------------------------------------------------

NOISE = {"gaussian_noise": {}, "colour_jitter": {}, "occlusion": {}}


def test_a_view_keeps_the_grid_and_depends_on_its_seed_alone(policy: Policy) -> None:
    prompt = make_prompt(policy, ITEMS[1])
    view = View(name="any", perturbations=NOISE)
    renamed = View(name="other", perturbations=NOISE)
    shown = encode_view(policy, prompt, view, seed=3, step=5)
    assert shown.ids is prompt.ids
    assert shown.positions is prompt.positions
    pixels = shown.pixels
    assert pixels.shape == prompt.pixels.shape
    assert not torch.equal(pixels, prompt.pixels)
    assert torch.equal(pixels, encode_view(policy, prompt, view, seed=3, step=5).pixels)
    assert not torch.equal(pixels, encode_view(policy, prompt, view, seed=4, step=5).pixels)
    assert not torch.equal(pixels, encode_view(policy, prompt, renamed, seed=3, step=5).pixels)


def test_each_step_draws_a_view_anew_unless_it_is_drawn_for_good(policy: Policy) -> None:
    prompt = make_prompt(policy, ITEMS[1])
    anew = View(name="any", perturbations=NOISE, draw="image")
    for_good = View(name="any", perturbations=NOISE, draw="item")
    one, other = (encode_view(policy, prompt, anew, seed=3, step=step) for step in (1, 2))
    assert not torch.equal(one.pixels, other.pixels)
    one, other = (encode_view(policy, prompt, for_good, seed=3, step=step) for step in (1, 2))
    assert torch.equal(one.pixels, other.pixels)


def test_a_draw_per_item_is_one_for_all_its_images(policy: Policy) -> None:
    same = picture(1, 128, 128)
    item = Item(row="twins", images=(same, same), question="<image><image>?", answer="1")
    prompt = make_prompt(policy, item)
    for draw, alike in (("item", True), ("image", False)):
        view = View(name="noise", perturbations={"gaussian_noise": {}}, draw=draw)  # type: ignore[arg-type]
        first, second = encode_view(policy, prompt, view, seed=0, step=0).pixels.chunk(2)
        assert torch.equal(first, second) is alike


def test_images_stand_where_the_question_puts_them(policy: Policy) -> None:
    item = Item(
        row="order",
        images=(picture(1, 64, 64), picture(2, 128, 128)),
        question="first <image> then <image>, but last this",
        answer="1",
    )
    prompt = make_prompt(policy, item)
    token = policy.tokenizer.convert_ids_to_tokens(policy.family.image_token)
    before, rest = policy.tokenizer.decode(prompt.ids).split("first ")
    first, rest = rest.split(" then ")
    last, rest = rest.split(", but last this")
    counts = [text.count(token) for text in (before, first, last, rest)]
    written = [text.count(token) for text in policy.family.image_texts(prompt.grids)]
    assert counts == [0, *written, 0]
    assert sum(counts) == int(prompt.image_mask.sum())
    assert rest == " Think first.<|im_end|>\n<|im_start|>assistant\n"


def test_prompts_up_to_the_limit_pass_and_longer_ones_are_bad_rows(policy: Policy) -> None:
    length = len(make_prompt(policy, ITEMS[0]).ids)
    assert len(make_prompt(policy, ITEMS[0], max_tokens=length).ids) == length
    with pytest.raises(BadRow, match=f"{length} tokens, {length - 1} allowed") as caught:
        make_prompt(policy, ITEMS[0], max_tokens=length - 1)
    assert (caught.value.reason, caught.value.row) == ("prompt too long", "made:1")


def test_a_literal_image_token_in_the_question_is_a_bad_row(policy: Policy) -> None:
    token = policy.tokenizer.convert_ids_to_tokens(policy.family.image_token)
    with pytest.raises(BadRow) as caught:
        make_prompt(policy, make_item(4, [(64, 64)], words=f"what does {token} mean"))
    assert (caught.value.reason, caught.value.row) == ("placeholder count", "made:4")


@pytest.mark.parametrize("folder", QWEN, indirect=True)
def test_an_image_the_processor_refuses_is_a_bad_row(policy: Policy) -> None:
    with pytest.raises(BadRow, match="aspect ratio") as caught:
        make_prompt(policy, make_item(5, [(64, 64), (900, 3)]))
    assert (caught.value.reason, caught.value.row) == ("image not usable", "made:5")


@pytest.mark.parametrize("folder", ["internvl"], indirect=True)
@pytest.mark.parametrize("template", ["<|endoftext|>", ""], ids=["in the template", "not in it"])
def test_a_start_token_is_written_once(policy: Policy, template: str) -> None:
    """By the chat template, or by a tokenizer that adds it where the template does not."""
    from tokenizers.processors import TemplateProcessing

    start = ("<|endoftext|>", policy.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    policy.tokenizer.bos_token = start[0]
    policy.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start[0]} $A", special_tokens=[start]
    )
    policy.tokenizer.chat_template = template + policy.tokenizer.chat_template
    ids = make_prompt(policy, ITEMS[0]).ids
    assert ids[0] == start[1]
    assert (ids == start[1]).sum() == 1
