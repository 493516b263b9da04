"""Visionary-R1 (2505.14677): a caption earns what the policy answers from it without the image.

GRPO on the reward accuracy + format + 0.1 accuracy of that answer, which counts as wrong where the
policy finds that the caption does more than describe. Settings are those of the published code.
"""

from __future__ import annotations

from dataclasses import dataclass

from cppo.methods.grpo import GRPO
from cppo.methods.schedule import Schedule
from cppo.objective import Aggregation


@dataclass(frozen=True, kw_only=True)
class VisionaryR1(GRPO):
    """GRPO on a reward that asks the policy again from its caption."""

    advantage_epsilon: float = 1e-4
    aggregation: Aggregation = "sequence-mean"
    reference_kl: float = 0.04
    reference_kl_schedule: Schedule = "cosine"

    @property
    def second_look(self) -> str | None:
        return "visionary_r1"
