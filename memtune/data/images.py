"""From images and labels to batches, with every image that cannot be read named, and labels by their names."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..storage import decode, pixel_values_of, sized
from ..tasks import IGNORED, Objective, find_objective
from .augmentation import Augmentation
from .labels import class_names, make_reader

logger = logging.getLogger(__name__)

Item: TypeAlias = dict[str, Any]

_KINDS = (
    "expected a datasets.Dataset with a column of images and one of labels, or an indexable data set of "
    "{'pixel_values': (channels, height, width), 'labels': index}, of {'image': picture, 'label': index or name}, or "
    "of pairs (image, label)"
)


_NO_PATH = "no path"


class Items(Dataset, ABC):
    """A data set as a model takes it: `pixel_values` (channels, height, width) and `labels`, an index of the model's.

    Of a task of several classes an image, or of numbers, `labels` are a tuple of floats, one for each of its labels.

    Args:
        count: Number of items.
        on_error: "raise" at an image that cannot be read, or "skip": a blank one stands in its place, with the label
            that training and evaluation leave out.
        processor: The image processor, sized; None where no picture needs it.
        channels: Those of the backbone.
        augment: What makes another version of a picture for each epoch, before the processor.
        blank: The label of an image that is skipped.
    """

    def __init__(
        self,
        count: int,
        on_error: Literal["raise", "skip"],
        processor: Any,
        channels: int,
        augment: Augmentation | None,
        blank: Any = IGNORED,
    ) -> None:
        self.blank_label = blank
        self._count = count
        self._on_error = on_error
        self._processor = processor
        self._channels = channels
        self._augment = augment
        self._epoch = 0

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, counted from 0; Accelerate's loaders call this at the beginning of each."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> Item:
        """The image as `pixel_values` and its label as `labels`."""
        return self.version(index, self._epoch + 1)

    def version(self, index: int, version: int) -> Item:
        """The same in a version; 0 is the image as it is."""
        item = self.read(index, version)
        return self._blank if item is None else item

    def read(self, index: int, version: int = 0) -> Item | None:
        """The same; None for one that cannot be read and is to be skipped.

        Raises:
            InputError: It cannot be read and is not to be skipped; or is none that a model takes.
        """
        try:
            return self._read(index, version)
        except Unreadable as error:
            if self._on_error == "raise":
                raise InputError(f"{error}; repair it, or skip such with on_error='skip'") from error
            logger.warning("%s; it is skipped", error)
            return None

    @cached_property
    def _blank(self) -> Item:
        """What stands for an image that is skipped, of the shape of the first that is not."""
        for index in range(len(self)):
            try:
                item = self._read(index, 0)
            except Unreadable:
                continue
            return {"pixel_values": torch.zeros_like(item["pixel_values"]), "labels": self.blank_label}
        raise InputError(f"none of the {len(self)} images can be read")

    def _processed(self, value: Any, index: int, version: int, name: str) -> Tensor:
        """What the processor makes of a picture in whatever form."""
        if self._processor is None:
            raise InputError(
                "the model has no image processor; pass processor=... to wrap, or a data set of pixel_values"
            )
        try:
            image = decode(value, self._channels)
        except InputError as error:
            raise Unreadable(f"{name} {error}") from error
        if self._augment is not None:
            image = self._augment(image, index, version)
        try:
            return pixel_values_of(self._processor, image, name)
        except InputError as error:
            raise Unreadable(str(error)) from error

    def name(self, index: int) -> str:
        """The path of an image, or where it has none its number."""
        return f"image {index}"

    def describe(self, index: int, version: int) -> str:
        """What makes a version of an image of the image; nothing where it is the image itself."""
        return "" if self._augment is None else self._augment.describe(index, version)

    @abstractmethod
    def _read(self, index: int, version: int) -> Item:
        """An item in a version.

        Raises:
            Unreadable: The image cannot be read.
            InputError: The item is none that a model takes.
        """

    @abstractmethod
    def source(self, index: int) -> bytes | None:
        """All that an item is made of; None if it cannot be read."""

    def source_of(self, item: Item, index: int) -> bytes | None:
        """The same of an item that was read a moment ago."""
        return self.source(index)

    @abstractmethod
    def labels(self) -> list[Any]:
        """The labels of all items; `blank_label` for one that cannot be read."""

    def transform(self) -> dict[str, Any]:
        """What makes `pixel_values` of the source of an item, as JSON values."""
        return {"pixel_values": True}


class Unreadable(Exception):
    """An image cannot be read."""


class ImageDataset(Items):
    """A `datasets.Dataset` with a column of images and a column of labels.

    Args:
        dataset: The images and labels.
        processor: The image processor.
        image_column: The column of images; None for `image`, or the only one of that type.
        label_column: The column of labels; None for `label`, `labels`, or the only one of classes.
        image_size: Height and width in pixels to make, in place of the processor's.
        on_error: What to do with an image that cannot be read: "raise", or "skip" it with a warning that names it.
        augment: What makes another version of an image for each epoch, before the processor; None for the image itself.
        labels: The model's labels; None to take the labels as they are.
        channels: Those of the backbone.
        objective: What the labels are; None for one class an image.

    Raises:
        InputError: A column is missing, there is no processor, it makes no images of that size, or a label is wrong.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: Any,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        image_size: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        augment: Augmentation | None = None,
        labels: Sequence[str] | None = None,
        channels: int = 3,
        objective: Objective | None = None,
    ) -> None:
        dataset = dataset.with_format(None)
        self._image_column, label_column = find_columns(dataset, image_column, label_column)
        if processor is None:
            raise InputError(
                "the model has no image processor; pass processor=... to wrap, or a data set of pixel_values"
            )
        processor = processor if image_size is None else sized(processor, image_size)
        objective = objective or find_objective(None)
        super().__init__(len(dataset), on_error, processor, channels, augment, objective.blank(len(labels or ())))
        # Undecoded, so that an unreadable image can be named by its path.
        decoded = isinstance(dataset.features[self._image_column], datasets.Image)
        self._dataset = dataset.cast_column(self._image_column, datasets.Image(decode=False)) if decoded else dataset
        names = class_names(dataset, label_column)
        kind: Any = dataset.features[label_column]
        if labels is None and isinstance(getattr(kind, "feature", kind), datasets.Value):  # texts
            labels = names
        reader = make_reader(objective, labels, names)
        column = dataset[label_column][:]
        self._labels = [reader(label, f"image {index}") for index, label in enumerate(column)]

    def _read(self, index: int, version: int) -> Item:
        value = self._dataset[index][self._image_column]
        return {
            "pixel_values": self._processed(value, index, version, f"image {index} ({_path(value)})"),
            "labels": self._labels[index],
        }

    def name(self, index: int) -> str:
        """The path of an image, or where it has none its number."""
        path = _path(self._dataset[index][self._image_column])
        return super().name(index) if path == _NO_PATH else path

    def source(self, index: int) -> bytes | None:
        """The file of an image, undecoded; None if it cannot be read."""
        value = self._dataset[index][self._image_column]
        try:
            return value.get("bytes") or Path(value["path"]).read_bytes()
        except (OSError, TypeError, ValueError, AttributeError):
            return None

    def labels(self) -> list[Any]:
        """The labels of all items."""
        return list(self._labels)

    def transform(self) -> dict[str, Any]:
        """What makes `pixel_values` of an image, as JSON values."""
        return {"processor": json.loads(self._processor.to_json_string()), "channels": self._channels}


class ItemDataset(Items):
    """Any other indexable data set: of dictionaries, or of pairs (image, label) as torchvision's are.

    Args:
        dataset: The data set.
        processor: What makes `pixel_values` of pictures; None where the items have them.
        on_error: As for `ImageDataset`; an item that is None counts as one that cannot be read.
        augment: As for `ImageDataset`, for items that are pictures.
        labels: The model's labels.
        channels: Those of the backbone.
        columns: The names of image and label in an item; None for the usual ones.
        objective: What the labels are; None for one class an image.
    """

    def __init__(
        self,
        dataset: Any,
        processor: Any,
        *,
        on_error: Literal["raise", "skip"] = "raise",
        augment: Augmentation | None = None,
        labels: Sequence[str] | None = None,
        channels: int = 3,
        columns: tuple[str | None, str | None] = (None, None),
        objective: Objective | None = None,
    ) -> None:
        objective = objective or find_objective(None)
        super().__init__(len(dataset), on_error, processor, channels, augment, objective.blank(len(labels or ())))
        self._dataset = dataset
        self._columns = columns
        self._reader = make_reader(objective, labels, class_names(dataset, columns[1]))

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, which the data set is told as well, if it has `set_epoch`."""
        super().set_epoch(epoch)
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)

    @property
    def changes_by_epoch(self) -> bool:
        """Whether the data set is told of epochs."""
        return hasattr(self._dataset, "set_epoch")

    def _read(self, index: int, version: int) -> Item:
        try:
            item = self._dataset[index]
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise Unreadable(f"item {index} cannot be read: {error}") from error
        if item is None:
            raise Unreadable(f"item {index} is None")
        image, label = item_parts(item, index, self._columns)
        if _is_picture(image):
            image = self._processed(image, index, version, f"item {index}")
        elif self._augment is not None:
            raise InputError(
                f"randaugment_ops: got items of pixel_values ({type(self._dataset).__name__}), expected pictures; "
                "leave it out, and augment what your data set gives"
            )
        return {"pixel_values": torch.as_tensor(image), "labels": self._reader(label, f"item {index}")}

    def source(self, index: int) -> bytes | None:
        """The values of an item."""
        item = self.read(index)
        return None if item is None else self.source_of(item, index)

    def source_of(self, item: Item, index: int) -> bytes | None:
        """The values of an item that was read a moment ago."""
        values = item["pixel_values"].detach().cpu().contiguous()
        return (
            f"{values.dtype} {tuple(values.shape)} ".encode() + values.reshape(-1).view(torch.uint8).numpy().tobytes()
        )

    def labels(self) -> list[Any]:
        """The labels of all items, for which each item is read where there is no column of them."""
        if isinstance(self._dataset, datasets.Dataset) and self._dataset.format["type"] != "custom":
            column = next((name for name in ("labels", "label") if name in self._dataset.column_names), None)
            if column is not None:
                values = self._dataset.with_format(None)[column][:]
                return [self._reader(label, f"item {index}") for index, label in enumerate(values)]
        return [
            self.blank_label if (item := self.read(index)) is None else item["labels"] for index in range(len(self))
        ]


def item_parts(item: Any, index: int, columns: tuple[str | None, str | None] = (None, None)) -> tuple[Any, Any]:
    """The image and the label of an item.

    Args:
        item: The item.
        index: Its number, for errors.
        columns: The names of image and label in it; None for the usual ones.

    Raises:
        InputError: It has no image or no label.
    """
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    if not isinstance(item, Mapping):
        raise InputError(f"item {index} of the data set is a {type(item).__name__}; {_KINDS}")
    parts, missing = [], []
    for column, usual in zip(columns, (("pixel_values", "image"), ("labels", "label")), strict=True):
        found = [name for name in ((column,) if column else usual) if name in item]
        parts.append(item[found[0]] if found else None)
        missing += [] if found else [column or usual[0]]
    if missing:
        raise InputError(f"item {index} of the data set lacks {sorted(missing)}; it has {sorted(map(str, item))}")
    return parts[0], parts[1]


def find_columns(dataset: datasets.Dataset, image: str | None, label: str | None) -> tuple[str, str]:
    """The columns of images and of labels.

    Args:
        dataset: The data set.
        image: The name of the one, if it was given.
        label: The name of the other.

    Raises:
        InputError: There are none, or several that it could be.
    """
    features = dataset.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    kinds: dict[str, Any] = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
    classes = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    found = []
    for given, usual, alike, what in (
        (image, ("image",), images, "image"),
        (label, ("label", "labels"), classes, "label"),
    ):
        names = [given] if given else [*usual, *(alike if len(alike) == 1 else [])]
        name = next((each for each in names if each in features), None)
        if name is None:
            raise InputError(
                f"the data set has no column {[given or usual[0]]}; it has {dataset.column_names}; name the one to "
                f"take by {what}_column"
            )
        found.append(name)
    return found[0], found[1]


def _is_picture(image: Any) -> bool:
    """Whether an image has yet to go through the processor."""
    if isinstance(image, (Tensor, np.ndarray)):
        whole = image.dtype == torch.uint8 if isinstance(image, Tensor) else image.dtype == np.uint8
        return whole and isinstance(image, np.ndarray)
    return isinstance(image, (Image.Image, str, Path, bytes)) or (
        isinstance(image, Mapping) and bool({"bytes", "path"} & image.keys())
    )


def _path(value: Any) -> str:
    return (value.get("path") if isinstance(value, Mapping) else value if isinstance(value, str) else None) or _NO_PATH


class Collator:
    """Puts items together to a batch: `pixel_values` (batch, channels, height, width) and `labels` (batch,).

    Args:
        outputs: Number of labels of the task; one outside is refused here, before the batch is moved to a device.
        objective: What the labels are; None for one class an image.
    """

    def __init__(self, outputs: int, objective: Objective | None = None) -> None:
        self._outputs = outputs
        self._objective = objective or find_objective(None)

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """One batch."""
        labels = self._objective.stack([item["labels"] for item in items], self._outputs)
        images = [torch.as_tensor(item["pixel_values"]) for item in items]
        if others := [tuple(image.shape) for image in images if image.shape != images[0].shape]:
            raise InputError(
                f"the images of a batch differ in their shapes: got {tuple(images[0].shape)} and {others[0]}; make all "
                "of the same size (the model's processor does)"
            )
        return {"pixel_values": torch.stack(images), "labels": labels}


def as_items(
    dataset: Any,
    processor: Any,
    image_size: int | None,
    on_error: Literal["raise", "skip"],
    augment: Augmentation | None = None,
    *,
    labels: Sequence[str] | None = None,
    channels: int = 3,
    image_column: str | None = None,
    label_column: str | None = None,
    objective: Objective | None = None,
) -> Items:
    """A data set as a model takes it.

    Raises:
        InputError: It is empty, of a kind that cannot be indexed, has wrong labels, or no images to augment.
    """
    if isinstance(dataset, Items):
        return dataset
    check_kind(dataset)
    columns = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    if columns and ("pixel_values" not in dataset.column_names or image_column is not None):
        return ImageDataset(
            dataset,
            processor,
            image_column=image_column,
            label_column=label_column,
            image_size=image_size,
            on_error=on_error,
            augment=augment,
            labels=labels,
            channels=channels,
            objective=objective,
        )
    if processor is not None and image_size is not None:
        processor = sized(processor, image_size)
    return ItemDataset(
        dataset,
        processor,
        on_error=on_error,
        augment=augment,
        labels=labels,
        channels=channels,
        columns=(image_column, label_column),
        objective=objective,
    )


def check_kind(dataset: Any) -> None:
    """Raise `InputError` unless a data set is of a kind that can be taken, and has items."""
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise InputError(f"got a {type(dataset).__name__} with the splits {list(dataset)}; pass one of them")
    if isinstance(dataset, (str, Path)):
        raise InputError(
            f"got the path {str(dataset)!r}; pass the data set itself, such as datasets.load_dataset('imagefolder', "
            f"data_dir={str(dataset)!r}, split='train')"
        )
    if hasattr(dataset, "__dataframe__"):
        raise InputError(f"got a {type(dataset).__name__}; pass datasets.Dataset.from_pandas(...) of it; {_KINDS}")
    indexable = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not indexable or isinstance(dataset, (Mapping, Tensor, np.ndarray)):
        raise InputError(f"got a {type(dataset).__name__}, expected a data set with a length and items; {_KINDS}")
    if len(dataset) == 0:
        raise InputError("the data set is empty")
