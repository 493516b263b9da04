"""Reward functions: the default one, and one's own by name."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cppo.reward.answers import final_answer, same_answer, well_formed

ACCURACY_WEIGHT = 0.9
FORMAT_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What one response earns. `total` trains; the others, in [0, 1], are reported.

    `second_look` is the accuracy of what the policy replied without the image, 0 where it was not
    asked (see `cppo.reward.second_look`).
    """

    total: float
    accuracy: float
    format: float
    second_look: float = 0.0


NOTHING = Reward(total=0.0, accuracy=0.0, format=0.0)
RewardFunction = Callable[[str, str, str], "float | Reward"]


def accuracy(response: str, answer: str) -> float:
    """1.0 where the response's final answer is the gold answer, else 0.0."""
    predicted = final_answer(response)
    return float(predicted is not None and same_answer(predicted, answer))


def default_reward(response: str, answer: str, question: str) -> Reward:
    """``0.9 * accuracy + 0.1 * format`` (2601.00501, published code); the question is not used."""
    correct, formed = accuracy(response, answer), float(well_formed(response))
    total = ACCURACY_WEIGHT * correct + FORMAT_WEIGHT * formed
    return Reward(total=total, accuracy=correct, format=formed)


def resolve(spec: str) -> RewardFunction:
    """The reward function that a config names.

    Args:
        spec: ``"default"``, or ``"package.module:function"``. Like ``python -m``, this finds
            modules in the current working directory first, which it adds to `sys.path`.

    Returns:
        A function of (response, answer, question). It returns a `Reward`, or a finite float, which
        becomes the total; its accuracy is then the float clipped to [0, 1] and its format 0.

    Raises:
        ValueError: The spec has another form, or names no function of three arguments, or its
            module cannot be imported.
    """
    if spec == "default":
        return default_reward
    expected = "expected 'default' or 'package.module:function', as in 'my_rewards:exact_match'"
    module_name, colon, function_name = spec.partition(":")
    names = [*module_name.split("."), *function_name.split(".")]
    if not colon or not all(name.isidentifier() for name in names):
        raise ValueError(f"reward: {spec!r} names no function; {expected}")
    directory = os.getcwd()
    if directory not in sys.path and "" not in sys.path:
        sys.path.insert(0, directory)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"reward: {spec!r}: module {module_name!r} was found, but it imports"
                f" {error.name!r}, which is not installed"
            ) from error
        raise ValueError(
            f"reward: {spec!r}: no module named {error.name!r} in {directory} or among the"
            f" installed packages; {expected}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"reward: {spec!r}: importing {module_name!r} failed with"
            f" {type(error).__name__}: {error}"
        ) from error
    for name in function_name.split("."):
        if not hasattr(found, name):
            public = [each for each in dir(found) if not each.startswith("_")]
            raise ValueError(
                f"reward: {spec!r}: {module_name!r} has no {name!r}; it has"
                f" {', '.join(public)[:500] or 'no public names'}"
            )
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(
            f"reward: {spec!r} is a {type(found).__name__}, not a function; {expected}"
        )
    try:
        signature = inspect.signature(found)
    except ValueError:  # some built-in functions have none
        return found  # type: ignore[no-any-return]
    try:
        signature.bind("response", "answer", "question")
    except TypeError as error:
        raise ValueError(
            f"reward: {spec!r} has the signature {signature}, but is called with three positional"
            f" arguments: (response, answer, question)"
        ) from error
    return found  # type: ignore[no-any-return]
