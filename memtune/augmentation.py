"""RandAugment by torchvision: each epoch has its own version of an image, the same one whenever it is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors import ConfigError
from .training_config import TrainingConfig


class Augmentation:
    """RandAugment (https://arxiv.org/abs/1909.13719) of an image.

    What is drawn depends on the seed, the epoch and the image's place in the data set alone: not on which process reads
    the image, how many batches ahead, or whether the run was interrupted before. The random states of training are left
    as they are.

    Args:
        operations: Operations on each image, one after the other.
        magnitude: Their strength, 0 to 30.
        seed: Of all that is drawn, 0 or more.

    Raises:
        ConfigError: torchvision is not installed.
    """

    def __init__(self, operations: int, magnitude: int, seed: int) -> None:
        self._transform = torchvision_transforms("randaugment_ops").RandAugment(operations, magnitude)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, counted from 0."""
        self._epoch = epoch

    def __call__(self, image: Image.Image, index: int) -> Image.Image:
        """An RGB image as it is in this epoch, in the size that it has.

        Args:
            image: The image.
            index: Its place in the data set.
        """
        state = np.random.SeedSequence([self._seed, self._epoch, index]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            # torchvision draws from this generator only; `torch.manual_seed` would seed those of GPUs as well.
            torch.default_generator.manual_seed(int(state[0]))
            return self._transform(image)


def make_augmentation(config: TrainingConfig) -> Augmentation | None:
    """What augments the images of training; None if the settings ask for nothing.

    Raises:
        ConfigError: torchvision is not installed, or the images are not there to be augmented.
    """
    if not config.randaugment_ops:
        return None
    if config.trunk_cache is not None:
        raise ConfigError(
            "randaugment_ops: a trunk cache has no images to augment; leave it or the cache out, or give the cache a "
            "data set with a fixed number of views of each image"
        )
    return Augmentation(int(config.randaugment_ops), int(config.randaugment_magnitude), config.seed)


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
