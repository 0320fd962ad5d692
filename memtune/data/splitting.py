"""Which images of a data set are held out, and a digest that tells data sets apart."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Subset

from ..errors import ConfigError
from .images import ImageDataset, Items

_LOOKED_AT = 16
"""Images, evenly spread over a data set, whose contents are part of its digest."""


def held_out(labels: Sequence[Hashable], validation: float | Sequence[int], seed: int) -> list[int]:
    """The places of the images that trials are measured on, ascending.

    Args:
        labels: The class of each image; or what else it is labelled with.
        validation: A share of the images: of each class as nearly that share as whole images allow, drawn by the seed,
            and not the last one of a class. Or the places themselves.
        seed: Of the draw.

    Raises:
        ConfigError: The share is not above 0 and below 1, leaves no image on one side, or the places are wrong.
    """
    total = len(labels)
    if isinstance(validation, Sequence) and not isinstance(validation, str):
        places = sorted(set(validation))
        whole = all(isinstance(place, (int, np.integer)) and 0 <= place < total for place in places)
        if not (whole and 0 < len(places) == len(validation) < total):
            raise ConfigError(
                f"validation: got {len(validation)} places, expected different ones from 0 to {total - 1}, and not all"
            )
        return [int(place) for place in places]
    if type(validation) is not float or not 0 < validation < 1:
        raise ConfigError(
            f"validation: got {validation!r}, expected a share above 0 and below 1, or the places of images"
        )
    count = round(validation * total)
    if not 0 < count < total:
        raise ConfigError(
            f"validation: got {validation!r}, which of {total} images is {count}; each side needs one or more"
        )
    sizes, seen = Counter(labels), Counter()
    ranks = []
    for place in np.random.default_rng(seed).permutation(total).tolist():
        label = labels[place]
        last = seen[label] + 1 == sizes[label]  # of its class: held out only where all others are
        ranks.append((last, (seen[label] + 0.5) / sizes[label], len(ranks), place))
        seen[label] += 1
    return sorted(place for *_, place in sorted(ranks)[:count])


def select(dataset: Any, places: Sequence[int]) -> Any:
    """The items of a data set at some places."""
    return dataset.select(places) if isinstance(dataset, datasets.Dataset) else Subset(dataset, list(places))


def digest(items: Items) -> str | None:
    """A text that is another one for other data, made of all labels and of some images.

    None where an image is another one each time it is read: then the data cannot be told from others.
    """
    items.set_epoch(0)
    places = sorted({round(place) for place in np.linspace(0, len(items) - 1, _LOOKED_AT)})
    with torch.random.fork_rng(devices=[]):
        one, again = ([_content(items, place) for place in places] for _ in range(2))
    labels = items.labels() if isinstance(items, ImageDataset) else []
    whole = b"".join(one) + repr((len(items), labels)).encode()
    return hashlib.sha256(whole).hexdigest()[:16] if one == again else None


def _content(items: Items, place: int) -> bytes:
    """A digest of an image and its class."""
    if isinstance(items, ImageDataset):
        return hashlib.sha256(items.source(place) or b"").digest()
    item = items.read(place)
    return hashlib.sha256(items.source(place) or b"").digest() + str(item and item["labels"]).encode()
