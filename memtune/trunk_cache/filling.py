"""Batches of what the trunk left, in place of images: filling a trunk cache, and reading it in training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..backbones import Backbone
from ..data import ItemDataset, Items
from ..errors import ConfigError, InputError
from ..models import TunedModel
from ..tasks import IGNORED, Objective
from .reader import BatchReader
from .store import CacheType, TrunkCache, describe_trunk, digest_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheSettings:
    """Where a trunk cache is, what it holds, and how it is filled.

    Attributes:
        folder: The folder of all entries.
        dtype: What keys and values are kept as.
        max_gb: Most gigabytes that the folder may hold; None for all that the disk has left.
        precision: The mixed precision that the trunk runs in.
        interpolate: Whether positions are interpolated.
        batch_size: Images in one pass.
        workers: Processes that read images.
        quiet: No progress bar.
    """

    folder: str | Path
    dtype: CacheType
    max_gb: float | None
    precision: str
    interpolate: bool
    batch_size: int
    workers: int
    quiet: bool


class CachedDataset(Dataset):
    """A data set whose items are entries of a trunk cache.

    Args:
        cache: The cache.
        images: For each version, and in it for each item, the digest of its image; None for one that cannot be read and
            is skipped: another one stands in its place, with the label that is left out.
        labels: For each item its label.
        blank: The label that is left out.

    Raises:
        InputError: No image can be read.
    """

    def __init__(
        self, cache: TrunkCache, images: Sequence[str | None], labels: Sequence[Any], blank: Any = IGNORED
    ) -> None:
        self._cache = cache
        self._blank_label = blank
        self._images = images
        self._labels = labels
        self._first = 0
        self._blank = next((image for image in images if image is not None), None)
        if self._blank is None:
            raise InputError(f"none of the {len(labels)} images can be read")

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, counted from 0, and its version; Accelerate's loaders call this at the beginning of each."""
        self._first = epoch * len(self._labels) % len(self._images)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Where the entry is as `trunk`, and the label as `labels`."""
        image = self._images[self._first + index]
        if image is None:
            assert self._blank is not None
            return {"trunk": self._cache.path(self._blank), "labels": self._blank_label}
        return {"trunk": self._cache.path(image), "labels": self._labels[index]}


class CachedCollator:
    """Makes a batch of items of a `CachedDataset`: `labels` (batch,), and `trunk` as `BatchReader.read` gives it.

    Args:
        outputs: Number of labels of the task; one outside is refused.
        objective: What the labels are.
    """

    def __init__(self, outputs: int, objective: Objective) -> None:
        self._outputs = outputs
        self._objective = objective
        self._reader = BatchReader()

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One batch."""
        labels = self._objective.stack([item["labels"] for item in items], self._outputs)
        return {"labels": labels, "trunk": self._reader.read([item["trunk"] for item in items])}


def check_cacheable(model: TunedModel) -> None:
    """Raise `ConfigError` if a model's trunk is not the same at every step, or not all that its stream reads."""
    if not model.reads_trunk or any(parameter.requires_grad for parameter in model.backbone.parameters()):
        raise ConfigError(
            "trunk_cache: got an unmasked model, whose backbone computes something else after each step; only a masked "
            "one (wrap(..., masked=True)), or a head alone on a frozen backbone, can read its trunk from a cache"
        )
    if model.task.extends:
        raise ConfigError("trunk_cache: got a model that extends others, which the cache does not hold; leave it out")


def cached_dataset(
    model: TunedModel, items: Items, settings: CacheSettings, accelerator: Accelerator, *, versions: int = 1
) -> tuple[CachedDataset, CachedCollator]:
    """The data set of a trunk cache for one of images, after all that the cache lacks of it has been computed.

    Several processes compute a share each.

    Args:
        model: A masked model, or a head alone; it is moved to the accelerator's device.
        items: What `as_items` gave.
        settings: Those of the cache.
        accelerator: Where to compute, and with how many other processes.
        versions: How many versions of each image to hold.

    Raises:
        ConfigError: The model's trunk cannot be kept, the images change from one reading to the next, or the cache
            would become larger than its limit or than the disk.
        InputError: An image cannot be read.
    """
    check_cacheable(model)
    images, labels, transform = _identify(items, versions)
    transform["interpolate"] = settings.interpolate
    context = describe_trunk(Backbone(model.backbone), transform, settings.precision)
    cache = TrunkCache(settings.folder, context, dtype=settings.dtype)
    _Filler(model.to(accelerator.device), items, cache, settings, accelerator).fill(images)
    found = [None if image is None or not cache.path(image).is_file() else image for image in images]
    dataset = CachedDataset(cache, found, labels, items.blank_label)
    return dataset, CachedCollator(len(model.task.labels), model.task.objective)


def _identify(items: Items, versions: int) -> tuple[list[str | None], list[Any], dict[str, Any]]:
    """For each version and item the digest of the image, or None; for each item its label; what is done to all.

    Raises:
        ConfigError: An image is another one from one reading, or one epoch, to the next.
    """
    if isinstance(items, ItemDataset):
        _check_fixed(items)
    sources = (items.source(index) for index in range(len(items)))
    images = [None if data is None else digest_of(data) for data in sources]
    in_order = [
        _digest_of_version(image, items.describe(index, version))
        for version in range(versions)
        for index, image in enumerate(images)
    ]
    return in_order, items.labels(), items.transform()


_REFUSAL = (
    "trunk_cache: the {} of the data set was another one {}; random augmentation cannot be kept. Leave the cache out, "
    "give a data set with a fixed number of views of each image, or use randaugment_ops with trunk_cache_versions"
)


def _check_fixed(items: ItemDataset) -> None:
    """Raise `ConfigError` if the first images depend on the epoch."""
    if not items.changes_by_epoch:
        return
    seen = []
    for epoch in (1, 0):
        items.set_epoch(epoch)
        seen.append([items.source(index) for index in range(min(4, len(items)))])
    if seen[0] != seen[1]:
        raise ConfigError(_REFUSAL.format("first images", "in another epoch"))


def _digest_of_version(image: str | None, description: str) -> str | None:
    """The digest of a version, by that of its image."""
    return image if image is None or not description else digest_of(f"{image} {description}".encode())


class _Filler:
    """Computes what a cache lacks."""

    def __init__(
        self, model: TunedModel, items: Items, cache: TrunkCache, settings: CacheSettings, accelerator: Accelerator
    ) -> None:
        self.model = model
        self.items = items
        self.cache = cache
        self.settings = settings
        self.accelerator = accelerator

    def fill(self, images: Sequence[str | None]) -> None:
        """Check this process's share of the entries and compute those that are missing or damaged."""
        places = {image: place for place, image in enumerate(images) if image is not None}
        unread = [place for place, image in enumerate(images[: len(self.items)]) if image is None]
        self._report(unread)
        share = list(places)[self.accelerator.process_index :: self.accelerator.num_processes]
        missing = [image for image in share if not self.cache.is_valid(image)]
        self._check_room(missing, places)
        self._compute(missing, places)
        self.accelerator.wait_for_everyone()
        if self.accelerator.num_processes > 1:  # on machines that do not share the disk, those of the others too
            self._compute([image for image in places if not self.cache.path(image).is_file()], places)

    def _report(self, unread: Sequence[int]) -> None:
        for place in unread:
            self.items.read(place)  # raises, or warns, as without a cache

    def _check_room(self, missing: Sequence[str], places: dict[str, int]) -> None:
        """Say how much will be written, and raise if there is no room for it."""
        entry = self._first_size(missing, places)
        counts = [len(missing), entry * len(missing), self.cache.size(), self.cache.free()]
        given: Any = self.accelerator.gather(torch.tensor([counts], device=self.accelerator.device))
        images, more = given[:, :2].sum(dim=0).tolist()  # of all processes
        size, free = int(given[:, 2].max()), int(given[:, 3].min())
        if not images:
            return
        text = f"{images:,} of {len(places):,} images are to be computed, {more / 1e9:.2f} GB in {self.cache.folder}"
        limit = self.settings.max_gb
        if limit is not None and size + more > limit * 1e9:
            raise ConfigError(
                f"trunk_cache: {text}; with the {size / 1e9:.2f} GB that are there this is more than the limit of "
                f"{limit} GB. Raise trunk_cache_max_gb, delete old folders, or choose a smaller trunk_cache_dtype"
            )
        if more > free:
            raise ConfigError(f"trunk_cache: {text}, but the disk has only {free / 1e9:.2f} GB left; use another disk")
        logger.info("trunk cache: %s", text)

    def _first_size(self, missing: Sequence[str], places: dict[str, int]) -> int:
        """Bytes of the first entry that can be computed, 0 if there is none."""
        return next((len(data) for _, data in self._entries(missing, places, batch_size=1)), 0)

    def _compute(self, missing: Sequence[str], places: dict[str, int]) -> None:
        quiet = self.settings.quiet or not self.accelerator.is_main_process or not missing
        with tqdm(total=len(missing), disable=quiet, unit="image", desc="trunk cache") as bar:
            batch_size = self.settings.batch_size
            for image, data in self._entries(missing, places, batch_size, self.settings.workers):
                self.cache.write(image, data)
                bar.update()

    def _entries(
        self, images: Sequence[str], places: dict[str, int], batch_size: int, workers: int = 0
    ) -> Iterator[tuple[str, bytes]]:
        """The digest and the encoded entry of each image that can be read."""
        chosen = Subset(_Versions(self.items), [places[image] for image in images])
        names = {places[image]: image for image in images}
        generator = torch.Generator()  # of its own, so that training sees the same random numbers as without a cache
        for batch in DataLoader(chosen, batch_size, collate_fn=_read, num_workers=workers, generator=generator):
            if not batch:
                continue
            numbers, sources, pixel_values = zip(*batch, strict=True)
            for number, source in zip(numbers, sources, strict=True):
                if source != names[number]:  # an entry is of the image that was read for it, and of no other
                    raise ConfigError(_REFUSAL.format(f"image {number % len(self.items)}", "when it was read again"))
            with self.accelerator.autocast():
                current = self.model.trunk_pass(
                    torch.stack(pixel_values).to(self.accelerator.device),
                    interpolate_pos_encoding=self.settings.interpolate,
                )
            for row, number in enumerate(numbers):
                yield names[number], self.cache.encode(current, row)


class _Versions(Dataset):
    """The images of a data set, version after version: each one's number, digest and values; None for one skipped."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def __getitem__(self, number: int) -> tuple[int, str | None, torch.Tensor] | None:
        version, index = divmod(number, len(self._items))
        item = self._items.read(index, version)
        if item is None:
            return None
        data = self._items.source_of(item, index)
        described = self._items.describe(index, version)
        return number, _digest_of_version(None if data is None else digest_of(data), described), item["pixel_values"]


def _read(items: Sequence[Any]) -> list[Any]:
    return [item for item in items if item is not None]
