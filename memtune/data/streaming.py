"""Data sets that are iterated over: as many of their items as a run of so many steps reads."""

from __future__ import annotations

from itertools import islice
from typing import Any

import datasets
from torch.utils.data import IterableDataset

from ..errors import InputError


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be iterated over."""
    return isinstance(dataset, (datasets.IterableDataset, IterableDataset)) or (
        hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__") and not hasattr(dataset, "__getitem__")
    )


def take(dataset: Any, count: int) -> Any:
    """The first items of a stream as a data set with a length; its images stay as they are in their files.

    Args:
        dataset: The stream.
        count: How many to take at most.

    Raises:
        InputError: There is none.
    """
    if isinstance(dataset, datasets.IterableDataset):
        features = dataset.features
        if features is None:
            dataset = dataset._resolve_features()
            features = dataset.features
        images = [name for name, kind in (features or {}).items() if isinstance(kind, datasets.Image)]
        for name in images:
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        items = list(dataset.take(count))
        found: Any = datasets.Dataset.from_list(items, features=dataset.features) if items else []
        for name in images if items else []:
            found = found.cast_column(name, datasets.Image())
    else:
        found = list(islice(dataset, count))
    if not len(found):
        raise InputError("the data set is empty: it gives no item")
    return found
