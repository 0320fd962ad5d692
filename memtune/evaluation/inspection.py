"""A look at data before training: what is in each part, what cannot be read, is there twice, or is named wrongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import check_kind, class_names, find_columns, item_parts, load_splits, make_reader
from ..drawing import as_picture, new_figure
from ..errors import InputError, MemtuneError
from ..models import TunedModel
from ..preparation import TrainingConfig, check_items, make_items
from ..storage import decode
from ..tasks import MultiLabel, Objective, Regression, find_objective
from ..trunk_cache import digest_of

_UNEVEN = 10
"""How many times as many images the largest class may have as the smallest without a note."""

_SHOWN = 8
"""Of each thing that is found so many are named, and so many images are drawn."""


@dataclass
class DataPart:
    """What is in one part of the data.

    Attributes:
        images: How many images it has.
        looked_at: How many of them were read.
        classes: Images by the names of their classes, or by their numbers where these have no names.
        unreadable: What is wrong with each that cannot be read.
        smallest: The least height and the least width in pixels.
        largest: The largest ones.
        repeated: Images whose very bytes are there already.
    """

    images: int
    looked_at: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    repeated: int = 0


@dataclass
class DataReport:
    """What `inspect_data` has found; as a string, for people.

    Attributes:
        parts: What is in each part, by name.
        problems: What would stop a training, or make its figures wrong.
        notes: What may be as it should be.
        samples: Some images of the first part as the model sees them, (images, channels, height, width); None without
            a model.
    """

    parts: dict[str, DataPart]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """All but the images, as JSON values."""
        return {
            "parts": {name: vars(part) for name, part in self.parts.items()},
            "problems": self.problems,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = []
        for name, part in self.parts.items():
            counts = Counter(part.classes).most_common()
            shown = ", ".join(f"{label} {count}" for label, count in counts[:_SHOWN])
            more = f" and {len(counts) - _SHOWN} classes more" if len(counts) > _SHOWN else ""
            lines.append(f"{name}: {part.images:,} images of {len(counts)} classes ({shown}{more})")
            if part.looked_at < part.images:
                lines.append(f"  {part.looked_at:,} of them were looked at")
            if part.smallest is not None and part.largest is not None:
                lines.append("  from {} x {} to {} x {} pixels".format(*part.smallest, *part.largest))
        lines += [f"problem: {each}" for each in self.problems] + [f"note: {each}" for each in self.notes]
        return "\n".join(lines if self.problems else [*lines, "nothing is wrong with it"])

    def draw(self, path: str | Path) -> None:
        """Draw the samples: a few images as the model sees them.

        Args:
            path: The picture's file; its ending says the format.

        Raises:
            MemtuneError: There are none, as no model was given; or matplotlib is not installed.
        """
        if self.samples is None:
            raise MemtuneError("there is nothing to draw: pass model=... to inspect_data, whose processor makes images")
        figure = new_figure(figsize=(2 * len(self.samples), 2.2))
        for axes, image in zip(figure.subplots(1, len(self.samples), squeeze=False).flat, self.samples, strict=True):
            axes.imshow(as_picture(image.numpy()), cmap="gray")
            axes.axis("off")
        figure.savefig(path, dpi=120)


def inspect_data(
    data: Any,
    *,
    validation: Any = None,
    test: Any = None,
    model: TunedModel | None = None,
    config: TrainingConfig | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_images: int | None = None,
    problem_type: str | None = None,
) -> DataReport:
    """Look at data as `fit` would take it, and say all that is wrong with it.

    Every image is read and decoded: those that cannot be, images that are there twice within a part, images that are in
    two parts (which makes what is measured there too good), labels that are no class, classes that a part has and
    training does not, and uneven or tiny classes are named.

    Example:
        >>> report = memtune.inspect_data(train_dataset)
        >>> report.parts["train"].classes
        {'cat': 6, 'dog': 6}

    Args:
        data: The data to train on (see `fit`); a folder, or a `DatasetDict`, has the other parts as well.
        validation: The data to evaluate on.
        test: The same.
        model: The model to be trained: its labels are those that the data's are found among, and one item of each part
            goes the whole way to it.
        config: The settings of the training, which say columns and size.
        image_column: As in `TrainingConfig`.
        label_column: The same.
        max_images: At most so many images of each part are read, evenly spread; None for all.
        problem_type: What the labels are, as for `wrap`; with a model what its are.

    Raises:
        ConfigError: There is no such problem type.
        InputError: The data is none, so that there is nothing to look at.
    """
    config = (config or TrainingConfig()).with_columns(image_column, label_column)
    objective = find_objective(problem_type) if model is None else model.task.objective
    if isinstance(data, (str, Path)):
        data = load_splits(data)
    several = isinstance(data, (dict, datasets.DatasetDict))
    splits: dict[str, Any] = {str(name): part for name, part in data.items()} if several else {"train": data}
    splits = {name: splits[name] for name in sorted(splits, key=lambda each: each != "train")}
    given = {"validation": validation, "test": test}
    splits |= {name: part for name, part in given.items() if part is not None}
    found: dict[str, _Part] = {}
    report = DataReport({})
    for name, part in splits.items():
        found[name] = _Part(name, part, model, config, objective, max_images)
        report.parts[name] = found[name].summary
        report.problems += found[name].problems
        if model is not None and not found[name].problems:
            _try(name, part, model, config, report)
    _compare(found, report)
    return report


class _Part:
    """One part of the data, looked at.

    Args:
        name: Its name.
        data: The data set.
        model: The model, whose labels count.
        config: The settings.
        objective: What the labels are.
        limit: At most so many images are read.
    """

    def __init__(
        self,
        name: str,
        data: Any,
        model: TunedModel | None,
        config: TrainingConfig,
        objective: Objective,
        limit: int | None,
    ) -> None:
        check_kind(data)
        self.summary = DataPart(len(data))
        self.problems: list[str] = []
        self.names: list[str] | None = None
        self.digests: dict[str, str] = {}
        self._name = name
        columns = config.image_column, config.label_column
        if (
            isinstance(data, datasets.Dataset)
            and data.format["type"] != "custom"
            and "pixel_values" not in data.features
        ):
            data = data.with_format(None)
            columns = find_columns(data, *columns)
            if isinstance(data.features[columns[0]], datasets.Image):
                data = data.cast_column(columns[0], datasets.Image(decode=False))
        self.names = class_names(data, columns[1])
        labels = None if model is None else model.task.labels
        self._labels = labels or self.names
        self._objective = objective
        self._reader = make_reader(objective, self._labels, self.names)
        count = len(data) if limit is None else min(limit, len(data))
        sizes, wrong = [], []
        for place in tqdm(np.linspace(0, len(data) - 1, count).round().astype(int).tolist(), desc=name, disable=None):
            self._look(data, place, columns, sizes, wrong)
        self.summary.looked_at = count
        shapes = np.array(sizes)
        if len(sizes):
            self.summary.smallest = tuple(shapes.min(axis=0).tolist())
            self.summary.largest = tuple(shapes.max(axis=0).tolist())
        self._tell(wrong)

    def _look(
        self, data: Any, place: int, columns: tuple[str | None, str | None], sizes: list[Any], wrong: list[str]
    ) -> None:
        """Read one image and its label."""
        what = f"image {place}"
        try:
            image, label = item_parts(data[place], place, columns)
        except InputError as error:
            wrong.append(str(error))
            return
        except Exception as error:  # noqa: BLE001 - whatever a data set of others' raises
            self.summary.unreadable.append(f"{what}: {type(error).__name__}: {error}")
            return
        try:
            self._count(label, self._reader(label, what))
        except InputError as error:
            wrong.append(str(error))
        if isinstance(image, Mapping) and image.get("path"):
            what = f"{what} ({image['path']})"
        try:
            content, size = _content(image)
        except (InputError, OSError) as error:
            self.summary.unreadable.append(f"{what} {error}")
            return
        sizes.append(size)
        self.summary.repeated += content in self.digests
        self.digests.setdefault(content, what)

    def _count(self, label: Any, found: Any) -> None:
        """Count an image for its class, or for each of its classes; one that is left out for none."""
        if isinstance(self._objective, MultiLabel):
            names = [str((self._labels or range(len(found)))[place]) for place, share in enumerate(found) if share]
        elif isinstance(self._objective, Regression) or found < 0:
            names = []
        elif isinstance(label, str):
            names = [label]
        else:
            names = [str(found) if self.names is None else self.names[int(label)]]
        for name in names:
            self.summary.classes[name] = self.summary.classes.get(name, 0) + 1

    def _tell(self, wrong: Sequence[str]) -> None:
        """Put what was found into words."""
        unreadable = self.summary.unreadable
        if unreadable:
            self.problems.append(f"{self._name}: {len(unreadable)} images cannot be read: {_few(unreadable)}")
        if wrong:
            self.problems.append(f"{self._name}: {len(wrong)} images have no right label: {_few(wrong)}")


def _content(image: Any) -> tuple[str, tuple[int, int]]:
    """A digest of an image's bytes or values, and its height and width."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, Tensor) or (isinstance(image, np.ndarray) and image.dtype != np.uint8):
        values = torch.as_tensor(image)
        return digest_of(values), (int(values.shape[-2]), int(values.shape[-1]))
    if isinstance(image, (str, Path)):
        image = Path(image).read_bytes()
    picture = decode(image)
    data = image if isinstance(image, bytes) else picture.tobytes()
    return digest_of(data), (picture.height, picture.width)


def _few(found: Sequence[str]) -> str:
    more = len(found) - _SHOWN
    return "; ".join(found[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _try(name: str, data: Any, model: TunedModel, config: TrainingConfig, report: DataReport) -> None:
    """Take items of a part the whole way to the model."""
    try:
        items = make_items(model, data, config)
        check_items(model, items, config)
        if report.samples is None:
            places = np.linspace(0, len(items) - 1, min(_SHOWN, len(items))).round().astype(int)
            report.samples = torch.stack([items.version(int(place), 0)["pixel_values"] for place in places])
    except MemtuneError as error:
        report.problems.append(f"{name}: {error}")


def _compare(parts: Mapping[str, _Part], report: DataReport) -> None:
    """Compare the parts, and the classes of each."""
    first, *others = parts
    for name, part in parts.items():
        counts = part.summary.classes
        if part.summary.repeated:
            report.notes.append(f"{name}: {part.summary.repeated} images are there twice, byte for byte")
        if counts and max(counts.values()) >= _UNEVEN * min(counts.values()):
            least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
            report.notes.append(
                f"{name}: {most!r} has {counts[most]} images and {least!r} {counts[least]}; accuracy says little of "
                "rare classes, and class_weights can count them more"
            )
    trained = parts[first].summary.classes
    for name in others:
        if unknown := sorted(parts[name].summary.classes.keys() - trained.keys()):
            report.problems.append(f"{name}: has the classes {unknown[:_SHOWN]}, of which {first} has no image")
        if lacking := sorted(trained.keys() - parts[name].summary.classes.keys()):
            report.notes.append(f"{name}: lacks the classes {lacking[:_SHOWN]}, which are not measured there")
    names = list(parts)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            shared = parts[one].digests.keys() & parts[other].digests.keys()
            if shared:
                pairs = [f"{parts[one].digests[each]} is {parts[other].digests[each]}" for each in list(shared)[:3]]
                report.problems.append(
                    f"{one} and {other} share {len(shared)} images, byte for byte, so that {other} measures what was "
                    f"learned by heart: {'; '.join(pairs)}"
                )
