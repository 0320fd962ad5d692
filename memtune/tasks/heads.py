"""Heads: a linear layer on a feature, or on many random ones made of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, relu

from ..errors import ConfigError

HEAD_STD = 0.02
"""Standard deviation of a new head's weights, as in transformers' vision models."""


@dataclass(frozen=True)
class RandomFeatures:
    """A head on ReLU(norm(f) R) in place of the feature f, R being fixed random numbers ("RanPAC", arXiv:2307.02251).

    Classes that no plane separates in f are often separated there. norm(f) has mean 0 and variance 1 over the values of
    each feature; R (backbone's width, `width`) is drawn from N(0, 1 / backbone's width) by the seed, and not saved.

    Example:
        >>> alone = memtune.MemoryConfig(tokens=0, class_token=False)
        >>> head = memtune.RandomFeatures(width=500)
        >>> model = memtune.wrap(backbone, alone, labels=["cat", "dog"], head=head, processor=processor)
        >>> result = memtune.fit_closed_form(model, train_dataset)

    Args:
        width: Number of random features.
        seed: What they are drawn from.

    Raises:
        ConfigError: A setting is no whole number, or too small.
    """

    width: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"random features, {name}: got {value!r}, expected a whole number from {least} on")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)


class RandomFeatureHead(nn.Linear):
    """A linear layer on random features.

    Attributes:
        settings: How these are made.

    Args:
        width: Width of the features that they are made of.
        classes: Number of classes.
        settings: How they are made.
    """

    def __init__(self, width: int, classes: int, settings: RandomFeatures) -> None:
        super().__init__(settings.width, classes)
        self.settings = settings
        # The one generator of numpy's whose numbers are promised to stay the same in all releases.
        drawn = np.random.RandomState(settings.seed).standard_normal((width, settings.width))
        self.register_buffer("projection", torch.from_numpy(drawn * width**-0.5).float(), persistent=False)

    def expand(self, features: Tensor) -> Tensor:
        """The random features (..., random features) of features (..., width)."""
        projection: Any = self.projection
        normed = layer_norm(features.to(projection.dtype), features.shape[-1:])
        return relu(normed @ projection)

    def forward(self, input: Tensor) -> Tensor:
        """Logits (..., classes) of features (..., width)."""
        return super().forward(self.expand(input))


def create_head(width: int, classes: int, random_features: RandomFeatures | None = None) -> nn.Linear:
    """A new head for features (..., width)."""
    head = nn.Linear(width, classes) if random_features is None else RandomFeatureHead(width, classes, random_features)
    nn.init.normal_(head.weight, std=HEAD_STD)
    nn.init.zeros_(head.bias)
    return head
