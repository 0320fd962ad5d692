"""What the commands that train begin with: the processes, and the frozen model with its processor."""

from __future__ import annotations

import logging
from typing import Any

import datasets
from accelerate import PartialState
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from ..errors import ConfigError


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
