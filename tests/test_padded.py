"""Laws of padded rows: models that cannot attend in groups get what transformers gives them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    ITEMS,
    continued,
    make_prompt,
    random_response,
    save_family,
    true_inputs,
)

from cppo.device import choose
from cppo.policy import Policy, Row, Scorer, load
from cppo.rollout import Sampling, generate


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model, the first and last of whose three layers see the last 16 tokens alone."""
    folder = save_family("qwen2_5_vl", tmp_path_factory.mktemp("sliding"), tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "use_sliding_window": True,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_rows(policy: Policy, *, responses: int = 3) -> list[Row]:
    """Prompts longer than the window, with ragged responses."""
    return [
        Row(
            prompt=prompt,
            response=random_response(policy, 1 + (5 * number) % 9, seed=number),
        )
        for prompt in [make_prompt(policy, item) for item in ITEMS]
        for number in range(responses)
    ]


def assert_like_plain_model(folder: Path, **options: Any) -> None:
    """Scores and gradients are those of transformers' own forward, one row at a time."""
    from transformers import AutoModelForImageTextToText

    policy = load(str(folder), dtype=torch.float32, **options)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    rows = make_rows(policy)
    scores = Scorer(policy, choose("cpu"), temperature=1.0)(rows)
    truth = []
    for row in rows:
        inputs = true_inputs(folder, row.prompt.item)
        logits = model(**continued(inputs, row.response), use_cache=False).logits[0]
        logprobs = logits[len(row.prompt.ids) - 1 : -1].log_softmax(-1)
        truth.append(logprobs.gather(-1, row.response[:, None])[:, 0])
    found = [scores.logprobs[n, : len(row.response)] for n, row in enumerate(rows)]
    torch.testing.assert_close(torch.cat(found), torch.cat(truth), atol=1e-5, rtol=0)

    torch.cat(found).square().sum().backward()
    torch.cat(truth).square().sum().backward()
    mine = dict(policy.model.named_parameters())
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    for name, parameter in model.named_parameters():
        assert (mine[name].grad - parameter.grad).norm() <= 1e-5 * whole, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_layers_with_sliding_windows_score_as_the_plain_model(
    sliding: Path, attention: str, checkpointing: bool
) -> None:
    assert_like_plain_model(sliding, attention=attention, gradient_checkpointing=checkpointing)


def test_attention_that_is_dropped_in_training_is_an_obstacle(
    tmp_path: Path, tokenizer: Any
) -> None:
    folder = save_family("qwen2_5_vl", tmp_path, tokenizer)
    assert load(str(folder), dtype=torch.float32, attention="sdpa").packs
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    assert not load(str(folder), dtype=torch.float32, attention="sdpa").packs


def test_the_reason_for_padding_is_logged(sliding: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="cppo"):
        policy = load(str(sliding), dtype=torch.float32, attention="sdpa")
    assert not policy.packs
    (line,) = [r.message for r in caplog.records if r.name.startswith("cppo")]
    assert line == (
        "a prompt is scored once for each of its responses: it has layers of sliding_attention"
    )


def test_a_padded_row_pays_for_its_prompt(sliding: Path) -> None:
    policy = load(str(sliding), dtype=torch.float32, attention="sdpa")
    rows, shapes = make_rows(policy), []
    hook = policy.language.layers[0].register_forward_pre_hook(
        lambda _, given: shapes.append(given[0].shape[:2])
    )
    Scorer(policy, choose("cpu"), temperature=1.0)(rows)
    hook.remove()
    longest = max(len(row.prompt.ids) + len(row.response) for row in rows)
    assert shapes == [(len(rows), longest)]
    assert policy.count_tokens(rows) == len(rows) * longest


def test_what_sliding_windows_sample_is_what_they_score(sliding: Path) -> None:
    policy = load(str(sliding), dtype=torch.float32, attention="sdpa")
    prompts = [make_prompt(policy, item) for item in ITEMS]
    sampling = Sampling(responses=2, max_new_tokens=20)
    groups = list(generate(policy, prompts, sampling, torch.Generator().manual_seed(0)))
    rows = [
        Row(prompt=prompt, response=response.ids)
        for prompt, group in zip(prompts, groups, strict=True)
        for response in group
    ]
    with policy.evaluating():
        scores = Scorer(policy, choose("cpu"), temperature=1.0)(rows)
    sampled = [response.logprobs for group in groups for response in group]
    for number, logprobs in enumerate(sampled):
        torch.testing.assert_close(
            logprobs, scores.logprobs[number, : len(logprobs)], atol=1e-4, rtol=0
        )


def test_a_sliding_window_is_felt(sliding: Path, tmp_path: Path) -> None:
    """The same weights, and windows wider than any row: else the laws above would say little."""
    for file in sliding.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((sliding / "config.json").read_text())
    config["text_config"]["sliding_window"] = 1000
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = []
    for folder in (sliding, tmp_path):
        policy = load(str(folder), dtype=torch.float32, attention="sdpa")
        with policy.evaluating():
            found.append(Scorer(policy, choose("cpu"), temperature=1.0)(make_rows(policy)).logprobs)
    assert (found[0] - found[1]).abs().max() > 0.01


# --- image tokens that attend to later ones ------------------------------------------------------


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_family("gemma3", tmp_path_factory.mktemp("gemma3"), tokenizer)


def test_image_tokens_attend_to_each_other_both_ways(both_ways: Path) -> None:
    """Before the picture nothing knows of it; its first token knows of its last corner."""
    policy = load(str(both_ways), dtype=torch.float32, attention="sdpa")
    prompt = make_prompt(policy, ITEMS[0])
    first = int(prompt.image_mask.nonzero()[0])
    corner = prompt.pixels.clone()
    corner[..., -16:, -16:] *= -1  # of the last of four tokens; the tower spreads it
    found = []
    for change in (False, True):
        with policy.evaluating():
            features = policy.family.encode(policy.base, prompt.pixels, prompt.grids)[0].clone()
            if change:  # past the tower
                features[:, -1] = policy.family.encode(policy.base, corner, prompt.grids)[0][:, -1]
            found.append(
                policy.family.hidden_states(
                    policy.base,
                    prompt.ids[None],
                    prompt.positions[:, None],
                    prompt.image_mask[None],
                    features,
                    use_cache=False,
                ).last_hidden_state[0]
            )
    moved = (found[0] - found[1]).abs().amax(-1)
    assert moved[:first].max() == 0
    assert moved[first] > 1e-3


def test_an_image_token_may_lie_outside_of_the_vocabulary(both_ways: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    for file in both_ways.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = AutoModelForImageTextToText.from_pretrained(both_ways)
    outside = model.config.image_token_id
    model.resize_token_embeddings(outside)
    model.save_pretrained(tmp_path)
    assert_like_plain_model(tmp_path, attention="sdpa")
    policy = load(str(tmp_path), dtype=torch.float32, attention="sdpa")
    assert outside not in policy.family.forbidden
    sampling = Sampling(responses=1, max_new_tokens=2)
    assert list(generate(policy, [make_prompt(policy, ITEMS[0])], sampling, torch.Generator()))


def test_flash_attention_gives_way_where_it_has_no_mask(
    both_ways: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="cppo"):
        policy = load(str(both_ways), dtype=torch.float32, attention="flash_attention_2")
    assert policy.attention == policy.language.config._attn_implementation == "sdpa"
    assert "sdpa instead of flash_attention_2, which has no mask" in caplog.text
