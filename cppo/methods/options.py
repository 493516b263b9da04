"""Checks of a method's options: what is raised names the option and says what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from PIL import Image

from cppo.perturb import PRESERVING, REMOVING, perturb

KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def require(name: str, given: object, fine: object, allowed: str) -> None:
    """Raises ValueError where an option is out of range."""
    if not fine:
        raise ValueError(f"{name} is {given!r}; it must be {allowed}")


def require_types(options: Any) -> None:
    """Raises ValueError where an option of this dataclass is to be a number, or true or false, and
    is neither: a word would count as true."""
    for name, hint in get_type_hints(type(options)).items():
        given, allowed = getattr(options, name), get_args(hint) or (hint,)
        kind = next((kind for kind in KINDS if kind in allowed), None)
        optional = type(None) in allowed
        if kind is None or (optional and given is None):
            continue
        number = isinstance(given, (int, kind)) and not isinstance(given, bool)
        fine = isinstance(given, bool) if kind is bool else number
        require(name, given, fine, KINDS[kind] + (", or null" if optional else ""))


def require_choice(name: str, given: object, choices: Any) -> None:
    """Raises ValueError where an option is none of a Literal's values."""
    allowed = get_args(choices)
    require(name, given, given in allowed, f"one of {allowed}")


def require_perturbations(name: str, given: object) -> None:
    """Raises where an option is not a view's perturbations, each with parameters that it takes.

    TypeError where it is no mapping or a value has the wrong type, else ValueError.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must map perturbations to their parameters")
    known = {*PRESERVING, *REMOVING}
    close = [difflib.get_close_matches(each, known, n=1) for each in {*given} - known]
    hint = ", ".join(f" (did you mean {match[0]!r}?)" for match in close if match)
    require(name, set(given), given and set(given) <= known, f"some of {sorted(known)}{hint}")
    for perturbation, parameters in given.items():  # bad ones show now, not at the first step
        perturb(Image.new("RGB", (8, 8)), perturbation, seed=0, **parameters)
