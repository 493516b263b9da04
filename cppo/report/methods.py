"""The methods and their options, as `cppo methods` shows them: read from their docstrings."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

from docstring_parser import parse

from cppo.console import Console
from cppo.methods import METHODS, build


def show_all(console: Console) -> None:
    """A line for each method."""
    rows = [(name, _summary(name)) for name in METHODS]
    console.table("Methods", ("--method", "what it is"), rows)
    console.say("cppo methods NAME shows a method's options; docs/methods.md, its formulas.")


def show(name: str, console: Console) -> None:
    """A method's options with their defaults. ValueError where no method has this name."""
    method = build(name)
    about = _about(method)
    text = [about.short_description or "", about.long_description or ""]
    console.say("\n\n".join(" ".join(paragraph.split()) for paragraph in text if paragraph) + "\n")
    meanings = option_meanings(type(method))
    rows = [
        (option, json.dumps(value), meanings[option])
        for option, value in dataclasses.asdict(method).items()
    ]
    console.table(name, ("--method_options.", "default", "meaning"), rows)


def option_meanings(kind: type) -> dict[str, str]:
    """What each option of a class of methods means, its bases' among them."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for parameter in parse(base.__doc__ or "").params:
            text = " ".join((parameter.description or "").split())
            meanings |= dict.fromkeys(parameter.arg_name.split(", "), text)
    return meanings


def _summary(name: str) -> str:
    made = METHODS[name]
    if not isinstance(made, partial):
        return str(_about(build(name)).short_description)
    options = ", ".join(f"{option} {json.dumps(value)}" for option, value in made.keywords.items())
    return f"{made.func.__name__} with {options}"


def _about(method: Any) -> Any:
    return parse(type(method).__doc__ or "")
