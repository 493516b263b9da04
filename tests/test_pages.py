"""What the pages show works as it stands there."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cppo.data import load
from cppo.methods import METHODS, Scores, Tokens, build
from cppo.reward import Grader
from cppo.reward.functions import default_reward

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str = "python") -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run(*texts: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for text in texts:
        exec(compile(text, "<page>", "exec"), names)
    return names


def test_the_readmes_snippet_runs() -> None:
    for block in blocks("README.md"):
        assert run(block)["loss"].isfinite().all()


def test_the_blocks_of_the_page_run_one_after_the_other() -> None:
    shown = run(*(block for block in blocks("docs/embedding.md") if "trl" not in block))
    views = shown["tokens"].views
    for scores in (shown["seen"], views["preserved"], views["removed"]):
        gradient = scores.logprobs.grad
        assert gradient.isfinite().all()
        assert gradient.any()
    assert shown["loss"].item() > 0
    torch.testing.assert_close(
        shown["logprobs"],
        -torch.nn.functional.cross_entropy(
            shown["hidden"] @ shown["weight"].T, shown["targets"], reduction="none"
        ),
    )


def test_a_recipe_for_trl_goes_where_our_update_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="the peer comes with the extra 'bench'")
    from test_bench import direction, work

    sys.modules.pop("subjects", None)
    import subjects
    import trl

    from cppo.device import choose

    (block,) = (block for block in blocks("docs/embedding.md") if "trl" in block)
    backend = choose("cpu")
    given = work(backend, (4, 16))
    ours = direction(subjects.Ours(given, backend))
    trainer = run(block)["PerceptionTrainer"]
    trainer.method = given.method
    monkeypatch.setattr(trl, "GRPOTrainer", trainer)
    peer = subjects.Trl(given)
    peer._inputs["views"] = {
        name: torch.cat([prompt.pixels for prompt in prompts])
        for name, prompts in given.views.items()
    }
    torch.testing.assert_close(direction(peer), ours, atol=1e-5, rtol=0)


def test_the_row_the_response_and_the_reward_of_the_page_are_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,), (response,), (module,) = (
        blocks("docs/data.md", language) for language in ("json", "text", "python")
    )
    (tmp_path / "rows.jsonl").write_text(row)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "17.png")
    item = load(str(tmp_path / "rows.jsonl"), split="eval", eval_share=1).read(0)
    assert default_reward(response.strip(), item.answer, item.question).total == 1.0
    bare = response.replace("\\boxed{3}", "<answer>3</answer>")
    assert default_reward(bare.strip(), item.answer, item.question).total == 0.0
    (tmp_path / "my_rewards.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    with Grader("my_rewards:brief", workers=1) as grader:
        (reward,) = grader.grade([(response, item.answer, item.question)])
    assert 0.9 < reward.total < 1.0


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_its_loss_and_says_which_view_is_missing(name: str) -> None:
    method = build(name, {"reference_kl": 0.1})

    def scores(*, requires_grad: bool = True) -> Scores:
        return Scores(
            logprobs=(-torch.rand(4, 6)).requires_grad_(requires_grad),
            entropy=torch.rand(4, 6),
        )

    views = {view.name: scores(requires_grad=view.gradient) for view in method.views}
    seen = scores()
    tokens = Tokens(
        mask=torch.ones(4, 6, dtype=torch.bool),
        advantages=method.score_groups(torch.tensor([0.0, 1.0, 1.0, 0.0]), 4),
        old_logprobs=seen.logprobs.detach() - 0.01,
        reference_logprobs=seen.logprobs.detach() - 0.1,
        seen=seen,
        views=views,
    )
    loss = method.loss(tokens, max_new_tokens=6)
    loss.backward()
    assert math.isfinite(loss.item())
    assert seen.logprobs.grad is not None
    assert seen.logprobs.grad.any()
    for missing in views:
        rest = {view: views[view] for view in views if view != missing}
        with pytest.raises(ValueError, match=rf"needs tokens' views\['{missing}'\] too"):
            method.loss(replace(tokens, views=rest), max_new_tokens=6)
    with pytest.raises(ValueError, match="needs tokens' reference_logprobs too"):
        method.loss(replace(tokens, reference_logprobs=None), max_new_tokens=6)


def test_a_loss_says_what_else_it_needs_and_divides_by_it() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    seen = Scores(logprobs=torch.zeros(2, 3), entropy=torch.zeros(2, 3))
    advantages = torch.tensor([1.0, -0.25])
    tokens = Tokens(mask=mask, advantages=advantages, old_logprobs=torch.zeros(2, 3), seen=seen)
    with pytest.raises(ValueError, match="needs max_new_tokens"):
        build("dr_grpo").loss(tokens)
    # Each token's loss is minus its advantage: (2 * -1 + 3 * 0.25) / (2 responses * 10 tokens).
    assert build("dr_grpo").loss(tokens, max_new_tokens=10).item() == pytest.approx(-1.25 / 20)
    assert build("grpo").loss(tokens).item() == pytest.approx(-1.25 / 5)
    full = build("cppo", {"divergence": "full"})
    views = {view.name: seen for view in full.views}
    with pytest.raises(ValueError, match=r"views\['preserved'\].divergence, "):
        full.loss(replace(tokens, views=views))
