"""DAPO (2503.14476): GRPO with a higher upper clip, and no groups without spread."""

from functools import partial

from cppo.methods.grpo import GRPO

DAPO = partial(GRPO, clip_low=0.2, clip_high=0.28, resample=True)
