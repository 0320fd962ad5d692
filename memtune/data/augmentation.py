"""Augmentation by torchvision: versions of an image, each the same whenever it is read; and mixtures of images."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError


class Augmentation:
    """RandAugment (https://arxiv.org/abs/1909.13719) of an image.

    What is drawn depends on the seed, the version and the image's place in the data set alone: not on which process
    reads the image, how many batches ahead, or whether the run was interrupted before. The random states of training
    are left as they are.

    Args:
        operations: Operations on each image, one after the other.
        magnitude: Their strength, 0 to 30.
        seed: Of all that is drawn, 0 or more.

    Raises:
        ConfigError: torchvision is not installed.
    """

    def __init__(self, operations: int, magnitude: int, seed: int) -> None:
        self._transform = torchvision_transforms("randaugment_ops").RandAugment(operations, magnitude)
        self._drawn_from = (seed, operations, magnitude)

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
            return self._transform(image)

    def describe(self, index: int, version: int) -> str:
        """All that a version of an image depends on beside the image."""
        if version == 0:
            return ""
        release = import_module("torchvision").__version__
        return f"RandAugment of torchvision {release}: {(*self._drawn_from, version, index)}"


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
