"""NoisyRollout (2504.13055): half of each group is sampled on noised images.

All log-probabilities, and the update, are on the images as they are, without a correction; both
halves make one group for the advantages. The noise is `diffusion_noise` after the step

    k = floor(k_0 (1 - sigmoid(slope (progress - midpoint))))

with the published values for Geometry3K and 7B: k_0 500, slope 30, midpoint step 40 of 60. Groups
there are 6 + 6 responses, the clip is 0.2, there is no reference term, the vision tower is frozen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cppo.methods.grpo import GRPO
from cppo.methods.method import View
from cppo.methods.options import require


@dataclass(frozen=True, kw_only=True)
class NoisyRollout(GRPO):
    """GRPO on groups of which half was sampled on noised images, less and less so.

    Args:
        noise_step: Step of the diffusion noise at first (k_0).
        noise_slope: How steeply it falls.
        noise_midpoint: Share of the training at which it has fallen by half.
    """

    noise_step: int = 500
    noise_slope: float = 30.0
    noise_midpoint: float = 40 / 60

    def __post_init__(self) -> None:
        super().__post_init__()
        require("noise_step", self.noise_step, 0 <= self.noise_step <= 999, "from 0 to 999")
        require("noise_slope", self.noise_slope, self.noise_slope >= 0, "at least 0")
        require("noise_midpoint", self.noise_midpoint, 0 <= self.noise_midpoint <= 1, "from 0 to 1")

    def rollout_view(self, progress: float) -> View | None:
        """The noised view; None once its step is 0, which nobody could see."""
        past = self.noise_slope * (progress - self.noise_midpoint)
        step = int(self.noise_step * (1 - math.tanh(past / 2)) / 2)  # 1 - sigmoid, at any slope
        if step == 0:
            return None
        return View(name="noised", perturbations={"diffusion_noise": {"step": step}})
