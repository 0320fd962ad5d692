"""Checks of what a model is given, each with an error that says what was got and what was expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..errors import ConfigError, InputError


def check_images(images: Any, backbone: Backbone, *, interpolate: bool) -> Tensor:
    """Give images back that a backbone takes.

    Args:
        images: Expected: a float tensor (batch, channels, height, width).
        backbone: The backbone; its channels and, unless it takes any, its image size are expected.
        interpolate: Whether its position embeddings will be interpolated to any size.

    Raises:
        InputError: They are something else.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise InputError(
            f"pixel_values: got {describe_value(images)}, expected a float tensor (batch, channels, height, width)"
        )
    if not len(images):
        raise InputError("pixel_values: got no image; expected a batch of one or more")
    if images.shape[1] != backbone.channels:
        raise InputError(f"pixel_values: got {images.shape[1]} channels, expected {backbone.channels}")
    height, width = backbone.image_size
    if not (backbone.family.any_size or interpolate or tuple(images.shape[2:]) == (height, width)):
        raise InputError(
            f"pixel_values: got {images.shape[2]} x {images.shape[3]} pixels, expected {height} x {width}; "
            "let the processor resize the images, or pass interpolate_pos_encoding=True"
        )
    if problem := backbone.family.refuses_size(backbone.tower, images.shape[2], images.shape[3]):
        raise InputError(f"pixel_values: got {images.shape[2]} x {images.shape[3]} pixels, {problem}")
    return images


def interpolates(images: Any, trained: Mapping[str, tuple[int, int]], *, asked: bool) -> bool:
    """Whether positions are to be interpolated for images.

    Args:
        images: Those that were given.
        trained: The size in pixels that each task was trained at; nothing where all were at the backbone's.
        asked: Whether the caller asks for it, and so takes images of any size.

    Raises:
        InputError: A task was trained at another size than the images have.
    """
    if asked or not trained or not isinstance(images, Tensor) or images.ndim != 4:
        return asked
    size = tuple(images.shape[2:])
    if others := {name: each for name, each in trained.items() if each != size}:
        name, (height, width) = next(iter(others.items()))
        of = f"task {name!r}" if name else "this adapter"
        raise InputError(
            f"pixel_values: got {size[0]} x {size[1]} pixels, but {of} was trained at {height} x {width}: use its own "
            "processor, or pass interpolate_pos_encoding=True to take any size"
        )
    return True


def is_text(value: str) -> bool:
    """Whether a string is text that a file can hold: half of a surrogate pair is none."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_label_names(labels: Sequence[str] | None, num_labels: int | None) -> list[str]:
    """The names of a task's classes, from the names or their number.

    Raises:
        ConfigError: They are not names, not distinct, of another number, or neither is given.
    """
    if labels is None:
        if not isinstance(num_labels, int) or isinstance(num_labels, bool) or num_labels < 1:
            raise ConfigError(f"num_labels: got {num_labels!r}; give labels=[...], or their number, 1 or more")
        return [f"LABEL_{index}" for index in range(num_labels)]
    names = list(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else []
    if not names or not all(isinstance(name, str) and name and is_text(name) for name in names):
        raise ConfigError(f"labels: got {labels!r}, expected a sequence of class names")
    if len(set(names)) < len(names):
        raise ConfigError(f"labels: {sorted({name for name in names if names.count(name) > 1})} stand there twice")
    if num_labels not in (None, len(names)):
        raise ConfigError(f"num_labels: got {num_labels}, but labels has {len(names)} names; give one of the two")
    return names


def check_task_names(what: str, names: Any, known: Collection[str], *, once: bool = True) -> None:
    """Raise unless `names` are names of tasks that a model has; each `once`, or else any number of times.

    Raises:
        InputError: It is no sequence of names, or names a task twice.
        ConfigError: A task is unknown.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(f"{what}: got {names!r}, expected a sequence of the names of tasks")
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{what}: got the unknown tasks {unknown}; this model has {list(known)}")
    if once and len(set(names)) < len(names):
        raise InputError(f"{what}: got {list(names)}, which names a task twice")


def describe_value(value: Any) -> str:
    """What a value is, for an error: of a tensor its type and shape."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def misfits(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Why some tensors cannot take the place of others: missing, unexpected, misshapen, no numbers, or not finite."""
    problems = [f"missing: {key}" for key in own if key not in given]
    problems += [f"unexpected: {key if key.isprintable() else ascii(key)}" for key in given if key not in own]
    for key in own.keys() & given.keys():
        if given[key].shape != own[key].shape:
            problems.append(f"{key}: got the shape {tuple(given[key].shape)}, expected {tuple(own[key].shape)}")
        elif not given[key].is_floating_point():
            problems.append(f"{key}: got {given[key].dtype}, expected floating-point numbers")
        elif not torch.isfinite(given[key].to(own[key].dtype)).all():
            problems.append(f"{key}: has values that are not finite")
    return problems
