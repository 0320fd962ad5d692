"""Labels: by their names wherever a data set has them, by their numbers only where it has none."""

from __future__ import annotations

import numbers
import re
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from ..errors import InputError

IGNORED = -100
"""The label of an image that is left out, in training and in evaluation, as torch's losses leave it out."""

_NUMBERED = re.compile(r"LABEL_\d+")


def class_names(dataset: Any, column: str | None = None) -> list[str] | None:
    """The names of the classes of a data set, in its own order; None where it has none.

    Args:
        dataset: A `datasets.Dataset` whose labels are of the type ClassLabel, or texts (in alphabetical order then); a
            data set with a list `classes`, such as torchvision's; or a part (`Subset`) of such.
        column: The column of labels; None for `label` or `labels`.
    """
    if isinstance(dataset, datasets.Dataset):
        features = dataset.features or {}
        for name in ("label", "labels") if column is None else (column,):
            kind: Any = features.get(name)
            if isinstance(kind, datasets.ClassLabel):
                return list(kind.names)
            if isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string"):
                return sorted({each for each in dataset.with_format(None)[name] if each is not None})
        return None
    classes = getattr(dataset, "classes", None)
    if classes is None and (whole := getattr(dataset, "dataset", None)) is not None:
        return class_names(whole, column)
    named = isinstance(classes, Sequence) and not isinstance(classes, str)
    return list(classes) if named and classes and all(isinstance(name, str) for name in classes) else None


class LabelReader:
    """Gives the number that a model has for a class.

    Args:
        labels: The model's labels; None where there is no model yet: numbers are then taken as they are.
        names: The names that the data set's numbers have; None if they have none.
    """

    def __init__(self, labels: Sequence[str] | None, names: Sequence[str] | None) -> None:
        self._labels = None if labels is None else list(labels)
        self._names = None if names is None else list(names)
        self._places = {name: place for place, name in enumerate(self._labels or ())}
        named = self._labels is not None and not all(map(_NUMBERED.fullmatch, self._labels))
        self._by_name = named and self._names is not None

    def __call__(self, label: Any, what: str) -> int:
        """The number of a class.

        Args:
            label: Its number in the data set, or its name.
            what: Whose it is, for the error.

        Raises:
            InputError: It is no class, or none of the model's.
        """
        if isinstance(label, Tensor) and label.ndim == 0:
            label = label.item()
        if isinstance(label, np.ndarray) and label.ndim == 0:
            label = label[()]
        if isinstance(label, str):
            return self._named(label, what)
        if label is None:
            raise InputError(f"{what} has no label; give it one, leave it out, or label it {IGNORED}")
        if isinstance(label, (numbers.Integral, np.bool_)):
            return self._numbered(int(label), what)
        if isinstance(label, (float, np.floating)):
            raise InputError(
                f"{what} has the label {label!r}; expected the index or the name of a class: memtune has no regression"
            )
        raise InputError(
            f"{what} has the label {_shown(label)}; expected the index or the name of one class: several classes an "
            "image, or a share of each, are not taken"
        )

    def _named(self, name: str, what: str) -> int:
        if name in self._places:
            return self._places[name]
        raise InputError(f"{what} has the label {name!r}, {self._lacking([name])}")

    def _numbered(self, label: int, what: str) -> int:
        if label == IGNORED:
            return label
        names, labels = self._names, self._labels
        if self._by_name:
            assert names is not None
            if not 0 <= label < len(names):
                raise InputError(
                    f"{what} has the label {label}, expected an index of the data set's {len(names)} classes"
                )
            if names[label] not in self._places:
                raise InputError(f"{what} is of the class {names[label]!r}, {self._lacking(names)}")
            return self._places[names[label]]
        if labels is not None and not 0 <= label < len(labels):
            raise InputError(
                f"labels: got [{label}], expected class indices from 0 to {len(labels) - 1} ({what}), or {IGNORED} for "
                "an image to leave out"
            )
        return label

    def _lacking(self, names: Sequence[str]) -> str:
        if self._labels is None:
            return "a name, and there are no labels to find it among; pass labels=[...]"
        lacking = [name for name in names if name not in self._places]
        beyond = [label for label in self._labels if label not in names]
        return (
            f"which is none of the model's labels; of the data set's classes the model lacks {_few(lacking)}, of the "
            f"model's the data set lacks {_few(beyond)}. Wrap with the data set's names, or leave its other classes out"
        )


def _few(names: Sequence[str], most: int = 12) -> str:
    return f"{list(names[:most])}" + (f" and {len(names) - most} more" if len(names) > most else "")


def _shown(label: Any) -> str:
    return f"of shape {tuple(label.shape)}" if isinstance(label, (Tensor, np.ndarray)) else repr(label)[:80]
