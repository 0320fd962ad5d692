"""Augmentation by torchvision: versions of an image, each the same whenever it is read; and mixtures of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError

_SETTINGS = "random_resized_crop, random_horizontal_flip, color_jitter, randaugment_ops"
"""What needs torchvision."""


@dataclass(frozen=True)
class Changes:
    """What may change in an image from one version to the next, in the order of the attributes.

    Attributes:
        crop: The least share of the area that a random crop has; 0 for no crop.
        flip: The probability that it is mirrored.
        jitter: How strongly brightness, contrast and saturation change.
        operations: RandAugment's operations (https://arxiv.org/abs/1909.13719), one after the other.
        magnitude: Their strength, 0 to 30.
    """

    crop: float = 0.0
    flip: float = 0.0
    jitter: float = 0.0
    operations: int = 0
    magnitude: int = 9

    def __bool__(self) -> bool:
        return bool(self.crop or self.flip or self.jitter or self.operations)


class Augmentation:
    """Random changes of an image, by torchvision.

    What is drawn depends on the seed, the version and the image's place in the data set alone: not on which process
    reads the image, how many batches ahead, or whether the run was interrupted before. The random states of training
    are left as they are.

    Args:
        changes: What may change.
        seed: Of all that is drawn, 0 or more.

    Raises:
        ConfigError: torchvision is not installed.
    """

    def __init__(self, changes: Changes, seed: int) -> None:
        v2 = torchvision_transforms(_SETTINGS)
        self._crop = changes.crop
        self._transforms: list[Any] = []
        if changes.flip:
            self._transforms.append(v2.RandomHorizontalFlip(changes.flip))
        if changes.jitter:
            self._transforms.append(v2.ColorJitter(*[changes.jitter] * 3))
        if changes.operations:
            self._transforms.append(v2.RandAugment(changes.operations, changes.magnitude))
        self._plain = not (changes.crop or changes.flip or changes.jitter)
        self._drawn_from = (seed, changes.operations, changes.magnitude) if self._plain else (seed, *astuple(changes))

    def __call__(self, image: Image.Image, index: int, version: int) -> Image.Image:
        """A version of an RGB image, in the size that it has.

        Args:
            image: The image.
            index: Its place in the data set.
            version: The number of the version; 0 is the image as it is.
        """
        if version == 0:
            return image
        state = np.random.SeedSequence([self._drawn_from[0], version, index]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            # torchvision draws from this generator only; `torch.manual_seed` would seed those of GPUs as well.
            torch.default_generator.manual_seed(int(state[0]))
            if self._crop:
                size = image.height, image.width
                image = torchvision_transforms(_SETTINGS).RandomResizedCrop(
                    size, scale=(self._crop, 1.0), antialias=True
                )(image)
            for transform in self._transforms:
                image = transform(image)
            return image

    def describe(self, index: int, version: int) -> str:
        """All that a version of an image depends on beside the image."""
        if version == 0:
            return ""
        release = import_module("torchvision").__version__
        kind = "RandAugment" if self._plain else "changes"
        return f"{kind} of torchvision {release}: {(*self._drawn_from, version, index)}"


def torchvision_transforms(settings: str) -> Any:
    """The module `torchvision.transforms.v2`.

    Args:
        settings: The names of the settings that need it.

    Raises:
        ConfigError: torchvision is not installed.
    """
    try:
        from torchvision.transforms import v2  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"{settings}: torchvision is needed; pip install torchvision") from error
    return v2


Mixing: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Gives of images (batch, channels, height, width) and labels (batch,) mixed images, and labels as (batch, classes)."""


def mixing(classes: int, *, mixup_alpha: float, cutmix_alpha: float) -> Mixing | None:
    """What mixes the images of a batch; None where both are 0. With both, each batch gets one of them.

    "mixup" (https://arxiv.org/abs/1710.09412), "CutMix" (https://arxiv.org/abs/1905.04899).

    Args:
        classes: Number of classes.
        mixup_alpha: Both parameters of the beta distribution of MixUp's shares.
        cutmix_alpha: Those of CutMix's.

    Raises:
        ConfigError: torchvision is not installed.
    """
    alphas = {"MixUp": mixup_alpha, "CutMix": cutmix_alpha}
    if not any(alphas.values()):
        return None
    v2 = torchvision_transforms("mixup_alpha, cutmix_alpha")
    chosen = [getattr(v2, name)(num_classes=classes, alpha=alpha) for name, alpha in alphas.items() if alpha]
    return v2.RandomChoice(chosen) if len(chosen) > 1 else chosen[0]
