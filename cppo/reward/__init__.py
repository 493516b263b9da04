"""Verifiable rewards: what a response earns, and a grader whose time limit always holds."""

from cppo.reward.answers import close, extract_answer, final_answer, same_answer, well_formed
from cppo.reward.functions import (
    Reward,
    RewardFunction,
    accuracy,
    default_reward,
    resolve,
)
from cppo.reward.grader import Grader

__all__ = [
    "Grader",
    "Reward",
    "RewardFunction",
    "accuracy",
    "close",
    "default_reward",
    "extract_answer",
    "final_answer",
    "resolve",
    "same_answer",
    "well_formed",
]
