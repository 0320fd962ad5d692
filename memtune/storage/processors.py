"""Image processors in an adapter folder, those of timm's models among them."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from ..errors import CheckpointError, InputError

PROCESSOR_NAME = "preprocessor_config.json"

_OF_TIMM = "TimmWrapperImageProcessor"


def image_processor_of(processor: Any) -> Any:
    """The image processor of a whole processor, which has a tokenizer too (CLIP's, say); an image processor itself."""
    own = getattr(processor, "image_processor", None)
    return processor if own is None else own


def sized(processor: Any, pixels: int) -> Any:
    """An image processor like another one that makes square images of a size, its crop and its margin in proportion.

    Raises:
        InputError: It cannot make images of that size.
    """
    kind = type(processor).__name__
    refusal = f"image_size: got {pixels}, but {kind} makes no images of {pixels} x {pixels} pixels"
    if kind == _OF_TIMM:
        raise InputError(f"{refusal}: it has a size of its own; make it with another input_size, or take another one")
    values = processor.to_dict()
    size, crop = dict(values.get("size") or {}), dict(values.get("crop_size") or {})
    square = {"height": pixels, "width": pixels}
    if values.get("do_center_crop") and crop:
        before = crop.get("height") or crop.get("shortest_edge") or pixels
        values["crop_size"] = square
        values["size"] = {name: round(edge * pixels / before) for name, edge in size.items() if edge}
    elif values.get("crop_pct") and "shortest_edge" in size:
        values["size"] = {"shortest_edge": pixels}
    else:
        values["size"] = square
    try:
        made = type(processor).from_dict(values)
        shape = tuple(made(Image.new("RGB", (2 * pixels, 3 * pixels)), return_tensors="pt").pixel_values.shape[-2:])
    except Exception as error:
        raise InputError(f"{refusal}: {error}") from error
    if shape != (pixels, pixels):
        raise InputError(f"{refusal}, but of {shape[0]} x {shape[1]}; pass a processor that does to wrap")
    return made


def pixel_values_of(processor: Any, image: Image.Image, name: str) -> Tensor:
    """What a processor makes of a picture, (channels, height, width).

    Raises:
        InputError: It fails at it.
    """
    try:
        return torch.as_tensor(processor(image, return_tensors="pt").pixel_values[0])
    except Exception as error:  # processors raise errors of every kind at pictures that they cannot take
        raise InputError(f"{name}, {image.width} x {image.height} pixels, fails in the processor: {error}") from error


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


def make_processor(values: Any, path: Path | None = None) -> Any:
    """The image processor of what `save_processor` saved.

    Args:
        values: The values of its file.
        path: The file, for errors.

    Raises:
        CheckpointError: They are those of no image processor.
    """
    try:
        if not isinstance(values, dict) or values.get("image_processor_type") != _OF_TIMM:
            # In a folder of its own, where nothing else lies that a stranger has put beside it; no code of theirs runs.
            with TemporaryDirectory() as place:
                Path(place, PROCESSOR_NAME).write_text(json.dumps(values), encoding="utf-8")
                return AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
        return getattr(transformers, _OF_TIMM)(values["pretrained_cfg"], values["architecture"])
    except Exception as error:  # transformers' classes raise errors of every kind at settings that are wrong
        raise CheckpointError(
            f"{path or PROCESSOR_NAME} is missing or damaged: {type(error).__name__}: {str(error)[:300]}"
        ) from error
