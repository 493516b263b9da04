"""What is measured of a policy: how it answers on views of the pictures, and its detector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cppo.builtin import ShapesTask
from cppo.builtin.task import COLOURS, SHAPES
from cppo.config import MeasureConfig
from cppo.evaluation.metrics import avg_at_k
from cppo.evaluation.perception import measure_detector
from cppo.evaluation.run import Questions, evaluate
from cppo.methods import CPPO, View
from cppo.policy import Prompt, Scorer, encode_view
from cppo.rollout import Sampling
from cppo.sources import open_data
from cppo.trainer import Trainer

SEED = 0  # of views and of sampling: the same in all runs, so that these differ in the policy alone
AS_IT_IS = "as_it_is"
PRESERVED, REMOVED = CPPO().views
# The last leaves nothing of the picture: what is then answered is guessed.
VIEWS: Mapping[str, View | None] = {
    AS_IT_IS: None,
    "preserved": PRESERVED,
    "removed": REMOVED,
    "black": View(name="black", perturbations={"blackout": {}}),
}


def measure_answers(trainer: Trainer, settings: MeasureConfig) -> dict[str, float]:
    """avg@k on held-out items, under each of `VIEWS`; and the chance of guessing, on average."""
    config, policy = trainer.config, trainer.policy
    questions = Questions(
        open_data(config.data, config.dataset, "eval"),
        trainer.encoder,
        trainer.ledger,
        count=settings.items,
    )
    sampling = Sampling(
        responses=settings.k,
        max_new_tokens=config.rollout.max_new_tokens,
        batch_responses=config.rollout.batch_responses,
        compile=config.rollout.compile,
    )
    found = {}
    for name, view in VIEWS.items():

        def show(prompt: Prompt, view: View | None = view) -> Prompt:
            if view is None:
                return prompt
            return encode_view(policy, prompt, view, seed=SEED, step=0)

        outcome = evaluate(policy, questions.shown(show), trainer.grader, sampling, seed=SEED)
        found[name] = avg_at_k(outcome.accuracies).value
    guessed = [chance(prompt.item.answer) for batch in questions.batches(64) for prompt in batch]
    return {**found, "chance": sum(guessed) / len(guessed)}


def measure_perception(trainer: Trainer, settings: MeasureConfig) -> dict[str, Any]:
    """The detector against ground truth, on CPPO's removing view: ROC AUC of each score rule."""
    source = open_data("builtin", trainer.config.dataset, "eval")
    assert isinstance(source, ShapesTask)
    puzzles = [source.puzzle(index) for index in range(settings.puzzles)]
    scorer = Scorer(trainer.policy, trainer.backend, temperature=1.0)
    reports = measure_detector(trainer.policy, scorer, puzzles, REMOVED, seed=SEED)
    return {report.score: report.roc_auc for report in reports}


def chance(answer: str) -> float:
    """How often the best guess at an answer is right, made without its picture.

    The places in an answer follow from the question. A picture has three of the colours and three
    of the shapes, and each cell any of them: no guess beats one colour and one shape throughout.
    """
    cells = len(answer.split()) // 3  # place, colour and shape
    drawn = 3
    return drawn / len(COLOURS) * drawn / len(SHAPES) * (1 / drawn) ** (2 * cells)
