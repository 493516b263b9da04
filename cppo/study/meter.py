"""What a training step passes through the model, counted where it passes: hooks, not formulas."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from cppo.collect import Group
from cppo.trainer import Trainer


class Meter:
    """Counts tokens through the language model and pictures through the vision tower, by phase.

    The reference policy's passes count too; what runs between steps (evaluation) does not.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._counts: Counter[str] = Counter()
        self._phase = ""
        family, collect = trainer.policy.family, trainer.collector.collect
        encode = family.encode

        def collecting(step: int) -> list[Group]:
            self._phase = "rollout"
            groups = collect(step)
            self._phase = "update"
            return groups

        def encoding(model: Any, pixels: Tensor, grids: Tensor) -> Any:
            self._counts[f"{self._phase}_pictures"] += len(grids)
            return encode(model, pixels, grids)

        def reading(_: Any, given: Any, named: dict[str, Any]) -> None:
            hidden = given[0] if given else named["hidden_states"]
            self._counts[f"{self._phase}_tokens"] += hidden.shape[0] * hidden.shape[1]

        trainer.collector.collect = collecting  # type: ignore[method-assign]
        family.encode = encoding  # type: ignore[method-assign]
        models = [trainer.policy.base]
        if trainer.learner.reference is not None:
            models.append(trainer.learner.reference.policy_model)
        for model in models:
            first = family.language_model(model).layers[0]
            first.register_forward_pre_hook(reading, with_kwargs=True)

    def end_step(self) -> dict[str, int]:
        """The counts of the step that has just ended."""
        names = [
            f"{phase}_{what}" for phase in ("rollout", "update") for what in ("tokens", "pictures")
        ]
        counts = {name: self._counts[name] for name in names}
        self._counts.clear()
        self._phase = ""
        return counts
