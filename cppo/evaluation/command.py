"""What `cppo eval` does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, cast

from cppo.builtin import ShapesTask
from cppo.collect import Encoder
from cppo.config import EvalConfig
from cppo.console import Console
from cppo.data import SkipLedger
from cppo.device import choose, resolve_attention, resolve_precision
from cppo.evaluation.perception import measure_detector
from cppo.evaluation.run import Outcome, Questions, evaluate
from cppo.methods import CPPO
from cppo.policy import Policy, Scorer
from cppo.reward import SECOND_LOOKS, Grader, final_answer
from cppo.rollout import Sampling
from cppo.sources import open_data, open_policy

DETECTOR_PUZZLES = 256


def run(config: EvalConfig) -> Outcome:
    """Evaluates, prints tables, and writes the results where `config.json` says."""
    console = Console()
    if config.json is not None:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
    backend = choose(config.backend)
    precision = resolve_precision(backend, config.precision)
    source = open_data(config.data, config.dataset, cast(Literal["train", "eval"], config.split))
    policy = open_policy(
        config.model,
        config.policy,
        difficulty=config.dataset.difficulty,
        precision=precision,
        attention=resolve_attention(backend, config.attention, precision=precision),
        device=backend.device,
        console=console,
        training=False,
    )
    ledger = SkipLedger(None, max_share=config.dataset.max_skipped_share)
    instruction, look = config.dataset.instruction, SECOND_LOOKS.get(config.reward)
    if instruction is None and look is not None:
        instruction = look.instruction
    questions = Questions(
        source,
        Encoder(policy, instruction=instruction, max_tokens=config.policy.max_prompt_tokens),
        ledger,
        count=config.count,
    )
    sampling = Sampling(
        responses=config.k,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        batch_responses=config.batch_responses,
        compile=config.compile,
    )
    settings = config.rewards
    with (
        Grader(
            config.reward if look is None else look.spec,
            timeout_seconds=settings.timeout_seconds,
            workers=settings.workers,
        ) as grader,
        console.progress("evaluation", len(questions)) as show,
    ):
        outcome = evaluate(
            *(policy, questions, grader, sampling),
            seed=config.seed,
            final=final_answer if look is None else look.final,
            progress=show,
        )
    results, kinds = outcome.summary(), outcome.kind_summary()
    console.estimates(f"{config.model} on {len(questions)} items of {config.data}", results)
    if kinds:
        console.estimates(f"avg@{config.k} by kind", kinds)
    console.say(f"skipped rows: {ledger.summary()}")
    report: dict[str, Any] = {
        "settings": dataclasses.asdict(config),
        "results": {name: dataclasses.asdict(value) for name, value in results.items()},
        "kinds": {name: dataclasses.asdict(value) for name, value in kinds.items()},
        "responses": dataclasses.asdict(outcome),
    }
    if config.detector:
        scorer = Scorer(policy, backend, temperature=1.0)
        report["detector"] = _detector(config, policy, scorer, console)
    if config.json is not None:
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        Path(config.json).write_text(text, encoding="utf-8")
    return outcome


def _detector(
    config: EvalConfig, policy: Policy, scorer: Scorer, console: Console
) -> list[dict[str, Any]]:
    source = open_data("builtin", config.dataset, "eval")
    assert isinstance(source, ShapesTask)
    puzzles = [source.puzzle(index) for index in range(DETECTOR_PUZZLES)]
    reports = [
        report
        for view in CPPO().views
        if view.detects
        for report in measure_detector(policy, scorer, puzzles, view, seed=config.seed)
    ]
    fields = ("score", "base_rate", "roc_auc", "precision_at_k", "mask_precision", "mask_recall")
    rows = []
    for report in reports:
        values = dataclasses.asdict(report)
        rows.append(tuple(v if isinstance(v := values[n], str) else f"{v:.3f}" for n in fields))
    console.table(f"perception-token detector, {len(puzzles)} reference solutions", fields, rows)
    return [dataclasses.asdict(report) for report in reports]
