"""Labels: by their names wherever a data set has them, by their numbers only where it has none."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from ..errors import InputError
from ..tasks import IGNORED, MultiLabel, Objective, Regression

_NUMBERED = re.compile(r"LABEL_\d+")


def class_names(dataset: Any, column: str | None = None) -> list[str] | None:
    """The names of the classes of a data set, in its own order; None where it has none.

    Args:
        dataset: A `datasets.Dataset` whose labels are of the type ClassLabel, or texts (in alphabetical order then), or
            lists of these; a data set with a list `classes`, such as torchvision's; or a part (`Subset`) of such.
        column: The column of labels; None for `label` or `labels`.
    """
    if isinstance(dataset, datasets.Dataset):
        features = dataset.features or {}
        for name in ("label", "labels") if column is None else (column,):
            kind: Any = features.get(name)
            several = getattr(kind, "feature", None)
            kind = kind if several is None else several
            if isinstance(kind, datasets.ClassLabel):
                return list(kind.names)
            if isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string"):
                values = dataset.with_format(None)[name]
                found = values if several is None else (each for some in values for each in some or ())
                return sorted({each for each in found if each is not None})
        return None
    classes = getattr(dataset, "classes", None)
    if classes is None and (whole := getattr(dataset, "dataset", None)) is not None:
        return class_names(whole, column)
    named = isinstance(classes, Sequence) and not isinstance(classes, str)
    return list(classes) if named and classes and all(isinstance(name, str) for name in classes) else None


def make_reader(
    objective: Objective, labels: Sequence[str] | None, names: Sequence[str] | None
) -> LabelReader | ClassesReader | NumbersReader:
    """What makes a model's labels of a data set's.

    Args:
        objective: What the model's labels are.
        labels: Their names; None where there is no model yet.
        names: The names that the data set's numbers have; None if they have none.
    """
    if isinstance(objective, MultiLabel):
        return ClassesReader(labels, names)
    return NumbersReader(labels, names) if isinstance(objective, Regression) else LabelReader(labels, names)


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
                f"{what} has the label {label!r}; expected the index or the name of a class. To learn numbers, wrap "
                f"with problem_type={Regression.problem_type!r}"
            )
        raise InputError(
            f"{what} has the label {_shown(label)}; expected the index or the name of one class. For several classes "
            f"an image, wrap with problem_type={MultiLabel.problem_type!r}"
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


class ClassesReader:
    """Gives the share that each class of a model has in an image.

    Args:
        labels: The model's labels; None where there is no model yet: they are those of the data set then.
        names: The names that the data set's numbers have; None if they have none.
    """

    def __init__(self, labels: Sequence[str] | None, names: Sequence[str] | None) -> None:
        labels = names if labels is None else labels
        if labels is None:
            raise InputError(
                "the data set has no names of classes, and there are no labels in their place; pass labels=[...]"
            )
        self._outputs = len(labels)
        self._names = names
        self._one = LabelReader(labels, names)

    def __call__(self, label: Any, what: str) -> tuple[float, ...]:
        """The share of each class.

        Args:
            label: The names or indices of the image's classes; or, as floats, booleans, or a tensor or an array, a
                share for each class of the data set, or of the model where the data set has no names. A list of zeros
                and ones that is as long as there are classes, more than two, is one of shares.
            what: Whose it is, for the error.

        Raises:
            InputError: It is none of these, or names a class that the model lacks.
        """
        in_order = isinstance(label, (Tensor, np.ndarray))
        values = label.tolist() if isinstance(label, (Tensor, np.ndarray)) else label
        if not isinstance(values, (list, tuple, set, frozenset)):
            raise InputError(
                f"{what} has the label {_shown(label)}; expected a list of the classes in it, or a share for each class"
            )
        values = list(values)
        length = self._outputs if self._names is None else len(self._names)
        bits = len(values) == length and all(type(each) is int and each in (0, 1) for each in values)
        if bits and length <= 2 and not in_order:
            raise InputError(
                f"{what} has the label {values}, which may be the indices of classes or a share for each of {length}; "
                "give names, or shares as floats"
            )
        if bits or any(isinstance(each, (float, np.floating, bool, np.bool_)) for each in values):
            return self._shares(values, length, what)
        shares = [0.0] * self._outputs
        for each in values:
            place = self._one(each, what)
            if place == IGNORED:
                raise InputError(f"{what} has {IGNORED} among its classes; leave the image out of the data set")
            shares[place] = 1.0
        return tuple(shares)

    def _shares(self, values: Sequence[Any], length: int, what: str) -> tuple[float, ...]:
        numbers_ = all(isinstance(each, (numbers.Real, np.bool_)) for each in values)
        if len(values) != length or not numbers_ or not all(0 <= float(each) <= 1 for each in values):
            raise InputError(
                f"{what} has the label {_shown(values)}; expected a share from 0 to 1 for each of {length} classes"
            )
        shares = [0.0] * self._outputs
        for place, share in enumerate(values):
            if self._names is None:
                shares[place] = float(share)
            elif share:
                shares[self._one(place, what)] = float(share)
        return tuple(shares)


class NumbersReader:
    """Gives the numbers that a model is to learn of an image.

    Args:
        labels: The model's labels, one for each number; None where there is no model yet.
        names: The names of the data set's classes, if it has some.

    Raises:
        InputError: It has: then its labels are no numbers.
    """

    def __init__(self, labels: Sequence[str] | None, names: Sequence[str] | None = None) -> None:
        if names is not None:
            raise InputError(
                f"the data set's labels are the classes {_few(names)}, expected numbers; to tell classes apart, leave "
                "problem_type='regression' out"
            )
        self._outputs = None if labels is None else len(labels)

    def __call__(self, label: Any, what: str) -> tuple[float, ...]:
        """The numbers.

        Args:
            label: As many as the model has labels; or the number itself, for one.
            what: Whose it is, for the error.

        Raises:
            InputError: It is something else, or not finite.
        """
        values = label.tolist() if isinstance(label, (Tensor, np.ndarray)) else label
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        right = all(isinstance(each, numbers.Real) and math.isfinite(each) for each in values)
        if not right or (self._outputs is not None and len(values) != self._outputs):
            expected = "numbers" if self._outputs is None else f"{self._outputs} finite number(s), one for each label"
            raise InputError(f"{what} has the label {_shown(label)}; expected {expected}")
        return tuple(float(each) for each in values)


def _few(names: Sequence[str], most: int = 12) -> str:
    return f"{list(names[:most])}" + (f" and {len(names) - most} more" if len(names) > most else "")


def _shown(label: Any) -> str:
    return f"of shape {tuple(label.shape)}" if isinstance(label, (Tensor, np.ndarray)) else repr(label)[:80]
