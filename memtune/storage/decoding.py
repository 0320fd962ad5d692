"""The one decoder: a picture from a file, bytes or an object, upright, in eight bits and the channels asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError

_BITS = (8, 10, 12, 14, 16)
"""How many bits the values of a grey image may have; the fewest that hold its largest value are taken."""

_MODES = {1: "L", 3: "RGB"}


def decode(value: Any, channels: int = 3) -> Image.Image:
    """The picture that a value holds, as `datasets`, torchvision or a person gives it.

    Turned as its EXIF data says; of an animation the first frame; without transparency; grey values of 16 and 32 bits
    in the range of the fewest usual bits that hold them (10, 12, 14, 16), floats in that from 0 to 1 if they lie there,
    and in their own otherwise.

    Args:
        value: A PIL image, a path, bytes, an array, or a dictionary with `bytes` or `path`.
        channels: 3 for RGB, 1 for grey; a picture is left in its own mode for any other number.

    Raises:
        InputError: It is none, or cannot be read.
    """
    try:
        return _converted(ImageOps.exif_transpose(_opened(value)), channels)
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise errors of every kind at a file that is broken
        raise InputError(f"cannot be read: {type(error).__name__}: {error}") from error


def image_files(folder: Path) -> Iterator[Path]:
    """The images in a folder and in those within, by their endings; links followed, each folder once, none hidden."""
    seen = set()
    for place, within, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            within.clear()
            continue
        seen.add(real)
        within[:] = sorted(name for name in within if not name.startswith("."))
        yield from (path for name in names if is_image(path := Path(place, name)))


def is_image(path: Path) -> bool:
    """Whether a path is that of an image, by its ending."""
    return path.suffix.lower() in Image.registered_extensions() and not path.name.startswith(".") and path.is_file()


def _opened(value: Any) -> Image.Image:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray):
        return _of_array(value)
    if isinstance(value, (bytes, bytearray)):
        value = io.BytesIO(value)
    elif isinstance(value, (str, os.PathLike)) and value:
        value = Path(value)
        if not value.is_file():
            raise InputError(f"cannot be read: {value} is no file")
    else:
        raise InputError(f"cannot be read: got {type(value).__name__}, expected an image, a path or bytes")
    with Image.open(value) as image:
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise InputError(
                f"cannot be read: it says that it has {image.width} x {image.height} pixels; if that is so, set "
                "PIL.Image.MAX_IMAGE_PIXELS to more"
            )
        image.load()
        return image.copy() if getattr(image, "is_animated", False) else image


def _of_array(values: np.ndarray) -> Image.Image:
    """An array (height, width) or (height, width, channels), of values in any range."""
    shaped = values.size and (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] <= 4))
    if not shaped or values.dtype.kind not in "buif":
        raise InputError(
            f"cannot be read: got an array of {values.dtype} and the shape {values.shape}, expected numbers (height, "
            "width) or (height, width, channels), of 1 to 4 channels"
        )
    if values.dtype.kind == "b":
        values = values.astype(np.uint8) * 255
    elif values.dtype != np.uint8:
        values = _in_eight_bits(values)
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)


def _converted(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_in_eight_bits(np.asarray(image)))
    mode = _MODES.get(channels)
    return image if mode is None or image.mode == mode else image.convert(mode)


def _in_eight_bits(values: np.ndarray) -> np.ndarray:
    """Values of any type from 0 to 255."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError("cannot be read: it has values that are not finite")
    low, high = values.min(initial=0.0), values.max(initial=0.0)
    whole = bool((values == np.round(values)).all())
    if low >= 0 and not whole and high <= 1:
        scale = 255.0
    elif low >= 0 and high < 2 ** _BITS[-1]:
        scale = 255 / (2 ** next(bits for bits in _BITS if high < 2**bits) - 1)
    else:
        values, scale = values - values.min(), 255 / max(values.max() - values.min(), 1e-30)
    return np.clip(np.round(values * scale), 0, 255).astype(np.uint8)
