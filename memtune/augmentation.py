"""RandAugment by torchvision: versions of an image, each the same whenever it is read."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors import ConfigError
from .training_config import TrainingConfig


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


def make_augmentation(config: TrainingConfig) -> Augmentation | None:
    """What augments the images of training; None if the settings ask for nothing.

    From a trunk cache all seeds get the same versions, so that they share it.

    Raises:
        ConfigError: torchvision is not installed, or the settings of RandAugment and the trunk cache do not fit.
    """
    versions = config.trunk_cache_versions
    if versions > 1 and not (config.randaugment_ops and config.trunk_cache):
        raise ConfigError(
            f"trunk_cache_versions: got {versions}, but only a trunk cache with RandAugment holds several; set "
            "trunk_cache and randaugment_ops, or leave it out"
        )
    if not config.randaugment_ops:
        return None
    if config.trunk_cache is not None and versions == 1:
        raise ConfigError(
            "randaugment_ops: a trunk cache computes each image once; say how many versions of each it shall hold by "
            "trunk_cache_versions, such as 4, or leave one of them out"
        )
    seed = config.seed if config.trunk_cache is None else 0
    return Augmentation(int(config.randaugment_ops), int(config.randaugment_magnitude), seed)


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
