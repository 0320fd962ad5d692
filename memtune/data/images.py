"""From images and labels to batches, with every unreadable image named."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..storage import takes_size
from ..tasks import check_label_range
from .augmentation import Augmentation

logger = logging.getLogger(__name__)

Item: TypeAlias = dict[str, Any]


class ImageDataset(Dataset):
    """A `datasets.Dataset` of images and labels as a map-style data set of what a model takes.

    Args:
        dataset: The images and labels.
        processor: The image processor.
        image_column: The column of images.
        label_column: The column of class indices.
        image_size: Height and width in pixels to resize to, in place of the processor's.
        on_error: What to do with an image that cannot be read: "raise", or "skip" it with a warning that names it.
        augment: What makes another version of an image for each epoch, before the processor; None for the image itself.

    Raises:
        InputError: A column is missing, or there is no processor, or it takes no size.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: Any,
        *,
        image_column: str = "image",
        label_column: str = "label",
        image_size: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        augment: Augmentation | None = None,
    ) -> None:
        missing = [name for name in (image_column, label_column) if name not in dataset.column_names]
        if missing:
            raise InputError(f"the data set has no column {missing}; it has {dataset.column_names}")
        if processor is None:
            raise InputError(
                "the model has no image processor; pass processor=... to wrap, or a data set of pixel_values"
            )
        if image_size is not None and not takes_size(processor):
            raise InputError(
                f"image_size: got {image_size}, but {type(processor).__name__} has a size of its own; make it with "
                "another input_size, or take another processor"
            )
        # Undecoded, so that an unreadable image can be named by its path.
        self._dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self._processor = processor
        self._columns = (image_column, label_column)
        self._options = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
        self._on_error = on_error
        self._augment = augment
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, counted from 0; Accelerate's loaders call this at the beginning of each."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Item | None:
        """The image as `pixel_values` (channels, height, width), and its label; None for one to be skipped."""
        return self.version(index, self._epoch + 1)

    def version(self, index: int, version: int) -> Item | None:
        """The same in a version; 0 is the image as it is."""
        row = self._dataset[index]
        image_column, label_column = self._columns
        try:
            image = _decode(row[image_column])
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
            name = f"image {index} ({row[image_column].get('path') or 'no path'})"
            if self._on_error == "raise":
                raise InputError(
                    f"{name} cannot be read: {error}; repair it, or skip such with on_error='skip'"
                ) from error
            logger.warning("%s cannot be read and is skipped: %s", name, error)
            return None
        if self._augment is not None:
            image = self._augment(image, index, version)
        pixel_values = self._processor(image, return_tensors="pt", **self._options).pixel_values[0]
        return {"pixel_values": pixel_values, "labels": int(row[label_column])}

    def source(self, index: int) -> bytes | None:
        """The file of an image, undecoded; None if it cannot be read."""
        value = self._dataset[index][self._columns[0]]
        try:
            return value.get("bytes") or Path(value["path"]).read_bytes()
        except (OSError, TypeError, ValueError):
            return None

    def describe(self, index: int, version: int) -> str:
        """What makes a version of an image of the image; nothing where it is the image itself."""
        return "" if self._augment is None else self._augment.describe(index, version)

    def labels(self) -> list[int]:
        """The indices of all items' classes."""
        return [int(label) for label in self._dataset[self._columns[1]]]

    def transform(self) -> dict[str, Any]:
        """What makes `pixel_values` of an image, as JSON values."""
        return {"processor": json.loads(self._processor.to_json_string()), "options": self._options}


def _decode(value: dict[str, Any]) -> Image.Image:
    source = io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]
    with Image.open(source) as image:
        return image.convert("RGB")


class Collator:
    """Puts items together to a batch: `pixel_values` (batch, channels, height, width) and `labels` (batch,).

    Args:
        classes: Number of classes; a label outside is refused here, before the batch is moved to a device.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes

    def __call__(self, items: Sequence[Item | None]) -> dict[str, Tensor]:
        """One batch; items that are None are left out."""
        read = [item for item in items if item is not None]
        if not read:
            raise InputError(f"none of the {len(items)} images of a batch can be read")
        if missing := {"pixel_values", "labels"} - read[0].keys():
            raise InputError(f"an item of the data set lacks {sorted(missing)}; it has {sorted(read[0])}")
        labels = torch.as_tensor([int(item["labels"]) for item in read])
        check_label_range(labels, self._classes)
        return {"pixel_values": torch.stack([torch.as_tensor(item["pixel_values"]) for item in read]), "labels": labels}


def as_items(
    dataset: Any,
    processor: Any,
    image_size: int | None,
    on_error: Literal["raise", "skip"],
    augment: Augmentation | None = None,
) -> Any:
    """A data set of items: a `datasets.Dataset` of images through the processor, any other as it is.

    Raises:
        InputError: It is empty, of a kind that cannot be indexed, or has no images to augment.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InputError(f"got a {type(dataset).__name__}, expected a data set with a length and items")
    if len(dataset) == 0:
        raise InputError("the data set is empty")
    if isinstance(dataset, datasets.Dataset) and "pixel_values" not in dataset.column_names:
        return ImageDataset(dataset, processor, image_size=image_size, on_error=on_error, augment=augment)
    if augment is not None:
        raise InputError(
            f"randaugment_ops: got a {type(dataset).__name__} of pixel_values, expected a datasets.Dataset of images; "
            "leave it out, and augment what your data set gives"
        )
    return dataset
