"""Vision-SR1 (2508.19652): a description earns what the policy answers from it without the image.

GRPO on the reward 0.9 accuracy + 0.1 format + 1.0 accuracy of that answer. Settings are those of
the published code.
"""

from __future__ import annotations

from dataclasses import dataclass

from cppo.methods.grpo import GRPO


@dataclass(frozen=True, kw_only=True)
class VisionSR1(GRPO):
    """GRPO on a reward that asks the policy again from its description."""

    clip_high: float = 0.3
    dual_clip: float | None = 3.0
    reference_kl: float = 0.01

    @property
    def second_look(self) -> str | None:
        return "vision_sr1"
