"""MixUp and CutMix by torchvision: batches of images that are mixtures of two, with labels that are so too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from .augmentation import torchvision_transforms
from .errors import ConfigError
from .training_config import TrainingConfig

Mixing: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Gives of images (batch, channels, height, width) and labels (batch,) mixed images, and labels as (batch, classes)."""


def make_mixing(config: TrainingConfig, classes: int) -> Mixing | None:
    """What mixes the batches in training; None if the settings ask for nothing. With both, each batch gets one of them.

    "mixup" (https://arxiv.org/abs/1710.09412), "CutMix" (https://arxiv.org/abs/1905.04899).

    Args:
        config: The settings; `mixup_alpha` and `cutmix_alpha` are the parameters of the shares' beta distributions.
        classes: Number of classes.

    Raises:
        ConfigError: torchvision is not installed, or the images are not there to be mixed.
    """
    alphas = {"MixUp": config.mixup_alpha, "CutMix": config.cutmix_alpha}
    if not any(alphas.values()):
        return None
    if config.trunk_cache is not None:
        raise ConfigError("mixup_alpha, cutmix_alpha: a trunk cache has no images to mix; leave it or them out")
    v2 = torchvision_transforms("mixup_alpha, cutmix_alpha")
    chosen = [getattr(v2, name)(num_classes=classes, alpha=alpha) for name, alpha in alphas.items() if alpha]
    return v2.RandomChoice(chosen) if len(chosen) > 1 else chosen[0]
