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
from cppo.reward.second_look import SECOND_LOOKS, SecondLook

__all__ = [
    "SECOND_LOOKS",
    "Grader",
    "Reward",
    "RewardFunction",
    "SecondLook",
    "accuracy",
    "close",
    "default_reward",
    "extract_answer",
    "final_answer",
    "resolve",
    "same_answer",
    "well_formed",
]
