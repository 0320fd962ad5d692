"""What the commands that train have in common: the processes, the frozen model with its processor, what labels are."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

import datasets
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from ..data import class_names
from ..errors import ConfigError, InputError
from ..tasks import OBJECTIVES, Regression, SingleLabel


def begin(*, cpu: bool) -> PartialState:
    """The processes that there are; only the main one tells what it does."""
    state = PartialState(cpu=cpu)
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.ERROR)
    if not state.is_main_process:
        datasets.disable_progress_bars()
    return state


def load_model(name: str, attn_implementation: str | None = None) -> tuple[PreTrainedModel, Any]:
    """The model that `--model_name_or_path` names, and its image processor.

    Raises:
        ConfigError: It cannot be loaded.
    """
    try:
        backbone = AutoModelForImageClassification.from_pretrained(
            name, attn_implementation=attn_implementation, trust_remote_code=False
        )
        return backbone, AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model_name_or_path: {name!r} cannot be loaded: {error}") from error


def add_problem_type(parser: argparse.ArgumentParser) -> None:
    """Add the option that says what labels are."""
    parser.add_argument(
        "--problem_type",
        choices=sorted(OBJECTIVES),
        default=SingleLabel.problem_type,
        help="what the labels of an image are: one class, several, or numbers (%(default)s)",
    )


def label_names(train: Dataset, label_column: str, problem_type: str) -> list[str]:
    """The names of the classes, at least two; or of numbers that of their column, with a place where there are several.

    Raises:
        InputError: They have no names, or there is only one.
    """
    if problem_type == Regression.problem_type:
        first = train.with_format(None)[label_column][0]
        several = isinstance(first, Sequence) and not isinstance(first, str)
        return [f"{label_column}_{place}" for place in range(len(first))] if several else [label_column]
    names = class_names(train, label_column)
    if names is None:
        raise InputError(
            f"the column {label_column!r} is of the type {train.features[label_column]}, which has no names of "
            "classes; expected ClassLabel or texts, or another column by --label_column_name"
        )
    if len(names) < 2:
        raise InputError(f"got the classes {names}, expected two or more: with one there is nothing to tell apart")
    return names
