"""Image processors in an adapter folder, those of timm's models among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor

PROCESSOR_NAME = "preprocessor_config.json"

_OF_TIMM = "TimmWrapperImageProcessor"


def takes_size(processor: Any) -> bool:
    """Whether an image processor can be told the size of its images: not the one for timm's models."""
    return type(processor).__name__ != _OF_TIMM


def save_processor(processor: Any, folder: Path) -> None:
    """Save an image processor in a folder: also the one for timm's models, which does not save itself."""
    if type(processor).__name__ != _OF_TIMM:
        processor.save_pretrained(folder)
        return
    values = {
        "image_processor_type": _OF_TIMM,
        "architecture": processor.architecture,
        "pretrained_cfg": processor.data_config,
    }
    (folder / PROCESSOR_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_processor(folder: Path) -> Any:
    """What `save_processor` saved.

    Raises:
        OSError: A file is missing.
        ValueError: A file is damaged.
    """
    values = json.loads((folder / PROCESSOR_NAME).read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.get("image_processor_type") != _OF_TIMM:
        return AutoImageProcessor.from_pretrained(folder)
    missing = {"architecture", "pretrained_cfg"} - values.keys()
    if missing:
        raise ValueError(f"{sorted(missing)} not found")
    return getattr(transformers, _OF_TIMM)(values["pretrained_cfg"], values["architecture"])
