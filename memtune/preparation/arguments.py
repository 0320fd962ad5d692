"""The settings of training as options of a command line, with the names, defaults and words of `TrainingConfig`."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .config import TrainingConfig


def add_training_arguments(parser: Any, *, leave_out: Collection[str] = (), **defaults: Any) -> None:
    """Add an option for each setting.

    Args:
        parser: The parser, or a group of its arguments.
        leave_out: Settings that get none.
        defaults: Other defaults than `TrainingConfig` has.
    """
    hints, descriptions = get_type_hints(TrainingConfig), _descriptions()
    for each in fields(TrainingConfig):
        if each.name in leave_out:
            continue
        default = defaults.get(each.name, each.default)
        text = descriptions[each.name].replace("%", "%%")
        shown = "" if default is None or default is False else f" ({default})"
        parser.add_argument(f"--{each.name}", default=default, help=text + shown, **_kind(hints[each.name], default))


def read_training_arguments(args: argparse.Namespace, **settings: Any) -> TrainingConfig:
    """The settings that were given, and further ones.

    Raises:
        ConfigError: One is wrong.
    """
    names = {each.name for each in fields(TrainingConfig)}
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names}
    for name, value in given.items():
        if isinstance(value, list) and isinstance(value[0], str):  # a word in the place of numbers
            given[name] = value[0]
    return TrainingConfig(**given | settings)


def _kind(hint: Any, default: Any) -> dict[str, Any]:
    """How argparse reads a value of a type."""
    words: tuple[str, ...] = ()
    if get_origin(hint) in (Union, types.UnionType):
        hint, *others = [each for each in get_args(hint) if each is not type(None)]
        words = tuple(word for other in others if get_origin(other) is Literal for word in get_args(other))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction if default else "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is not None and issubclass(get_origin(hint), Mapping):
        return {"type": json.loads, "metavar": "JSON"}
    if get_origin(hint) is not None and issubclass(get_origin(hint), Sequence):
        kind = get_args(hint)[0]
        return {"nargs": "+", "type": lambda text: text if text in words else kind(text)}
    return {"type": hint if hint in (int, float, str, Path) else str}


def _descriptions() -> dict[str, str]:
    """What the docstring says of each setting."""
    text = inspect.getdoc(TrainingConfig) or ""
    found = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", text, flags=re.MULTILINE)
    return {name: " ".join(description.split()).rstrip(".") for name, description in found}
