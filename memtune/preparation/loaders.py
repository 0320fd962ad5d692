"""What a training run and an evaluation make before their first batch: an accelerator, and loaders of batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from ..backbones import Backbone
from ..data import Augmentation, Changes, Collator, Items, Mixing, as_items, mixing
from ..errors import ConfigError
from ..models import TunedModel
from ..tasks import IGNORED, check_images
from ..trunk_cache import CacheSettings, cached_dataset
from .config import TrainingConfig
from .distribution import settle


def make_accelerator(config: TrainingConfig, *, tracking: bool = False) -> Accelerator:
    """An accelerator for the settings; `tracking` with the trackers that they name.

    Raises:
        ConfigError: A tracker is unknown or not installed; or what the launcher asks for is (DeepSpeed), or shards or
            casts parameters in a way that views cannot follow.
    """
    # Accelerate keeps the precision of a process's first accelerator, and refuses another one.
    kept = AcceleratorState._shared_state
    if kept.get("_mixed_precision", config.mixed_precision) != config.mixed_precision:
        if kept["distributed_type"] == DistributedType.FSDP:  # which a new state would not find again
            kept["_mixed_precision"] = config.mixed_precision
        else:
            AcceleratorState._reset_state()
    trackers: Any = config.report_to if tracking and config.report_to not in ("none", None, []) else None
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=trackers,
            project_dir=config.output_dir,
        )
    except (ValueError, ImportError) as error:
        told = f"report_to: got {config.report_to!r}" if trackers else "Accelerate cannot start as it was launched"
        raise ConfigError(f"{told}: {error}") from error
    settle(accelerator, config)
    wanted = len(trackers) if isinstance(trackers, (list, tuple)) else int(trackers is not None)
    if len(accelerator.log_with) < wanted and "all" not in trackers:
        raise ConfigError(
            f"report_to: got {config.report_to!r}, of which Accelerate found {accelerator.log_with}; install the others"
        )
    return accelerator


@contextmanager
def borrowed_state() -> Iterator[None]:
    """Within, accelerators can be made; afterwards those that there were before, or come later, find all as it was.

    All accelerators of a process share what they know: their precision, how many gradients they accumulate, and which
    loader is read.
    """
    kept = [(kind, dict(kind._shared_state)) for kind in (AcceleratorState, GradientState)]
    try:
        yield
    finally:
        sharding = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # which a new state would not find again
        if kept[0][1] or AcceleratorState._shared_state.get("distributed_type") not in sharding:
            for kind, before in kept:
                kind._shared_state.clear()
                kind._shared_state.update(before)


def check_folders(config: TrainingConfig) -> None:
    """Try the folders that a run will write to, and leave them as they were.

    Raises:
        ConfigError: One is a file, or cannot be written to.
    """
    for name in ("output_dir", "trunk_cache"):
        folder = getattr(config, name)
        if folder is None:
            continue
        path = Path(folder).absolute()
        new = [each for each in (path, *path.parents) if not each.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ConfigError(f"{name}: got {str(folder)!r}, where nothing can be written: {error}") from error
        finally:
            for each in new:
                with suppress(OSError):  # not there, or another process has begun to write
                    each.rmdir()


def release(accelerator: Accelerator, prepared: nn.Module) -> None:
    """Take off a model what Accelerate put on it, with the mark that keeps the next accelerator from preparing it."""
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    for name in ("forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)


def make_loader(
    model: TunedModel,
    dataset: Any,
    config: TrainingConfig,
    accelerator: Accelerator,
    *,
    order: torch.Generator | None = None,
    augment: Augmentation | None = None,
) -> DataLoader:
    """Batches of a data set (see `memtune.fit`), or of what a trunk cache has of it.

    Args:
        model: The model that they are for.
        dataset: The images and labels.
        config: The settings.
        accelerator: What fills the cache.
        order: To train: what gives each epoch a new order. None to evaluate, in the data set's own order.
        augment: What changes the images; None for nothing, as always to evaluate.
    """
    items = make_items(model, dataset, config, augment)
    sampler = None if order is None or not config.balanced_sampling else _balanced(items, order)
    collator: Any = Collator(len(model.task.labels), model.task.objective)
    if config.trunk_cache is not None:
        versions = 1 if augment is None else min(int(config.trunk_cache_versions), _epochs(items, config, accelerator))
        items, collator = cached_dataset(model, items, cache_settings(model, config), accelerator, versions=versions)
    workers = config.dataloader_num_workers
    more: dict[str, Any] = {"prefetch_factor": config.dataloader_prefetch_factor} if workers else {}
    return DataLoader(
        items,
        batch_size=config.per_device_eval_batch_size if order is None else config.per_device_train_batch_size,
        shuffle=order is not None and sampler is None,
        sampler=sampler,
        generator=order,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=config.dataloader_pin_memory and accelerator.device.type == "cuda",
        drop_last=config.dataloader_drop_last and order is not None,
        **more,
    )


def _balanced(items: Items, order: torch.Generator) -> WeightedRandomSampler:
    """What draws as many images of each class, with replacement, as many as there are in all."""
    labels = items.labels()
    counts = Counter(label for label in labels if label != IGNORED)
    weights = [0.0 if label == IGNORED else 1 / counts[label] for label in labels]
    return WeightedRandomSampler(weights, len(labels), generator=order)


def make_items(model: TunedModel, dataset: Any, config: TrainingConfig, augment: Augmentation | None = None) -> Items:
    """A data set as a model takes it (see `memtune.fit`).

    Raises:
        InputError: It is no such data set, or a label is wrong.
    """
    return as_items(
        dataset,
        model.processor,
        config.image_size,
        config.on_error,
        augment,
        labels=model.task.labels,
        channels=Backbone(model.backbone).channels,
        image_column=config.image_column,
        label_column=config.label_column,
        objective=model.task.objective,
    )


def check_items(model: TunedModel, items: Items, config: TrainingConfig) -> tuple[int, int]:
    """Take one item of a data set the way that all will go, as far as the model; gives the size of its image in pixels.

    Raises:
        InputError: The item is none that the model takes.
    """
    item = items.version(0, 0)
    batch = Collator(len(model.task.labels), model.task.objective)([item])
    interpolate = config.image_size is not None or model.task.image_size is not None
    images = check_images(batch["pixel_values"], Backbone(model.backbone), interpolate=interpolate)
    return images.shape[2], images.shape[3]


def _epochs(items: Items, config: TrainingConfig, accelerator: Accelerator) -> int:
    """How many epochs a run has, as far as it is known before its loader is."""
    if config.max_steps <= 0:
        return max(1, math.ceil(config.num_train_epochs))
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    return math.ceil(config.max_steps * batch / len(items)) + 1


def make_augmentation(config: TrainingConfig) -> Augmentation | None:
    """What augments the images of training; None if the settings ask for nothing.

    From a trunk cache all seeds get the same versions, so that they share it.

    Raises:
        ConfigError: torchvision is not installed, or those settings and the trunk cache do not fit.
    """
    changes = Changes(
        config.random_resized_crop,
        config.random_horizontal_flip,
        config.color_jitter,
        int(config.randaugment_ops),
        int(config.randaugment_magnitude),
    )
    versions = config.trunk_cache_versions
    if versions > 1 and not (changes and config.trunk_cache):
        raise ConfigError(
            f"trunk_cache_versions: got {versions}, but only a trunk cache with augmentation holds several; set "
            "trunk_cache and randaugment_ops (or random_resized_crop ...), or leave it out"
        )
    if not changes:
        return None
    if config.trunk_cache is not None and versions == 1:
        raise ConfigError(
            "randaugment_ops, random_resized_crop, random_horizontal_flip, color_jitter: a trunk cache computes each "
            "image once; say how many versions of each it shall hold by trunk_cache_versions, such as 4, or leave one "
            "of them out"
        )
    return Augmentation(changes, config.seed if config.trunk_cache is None else 0)


def make_mixing(config: TrainingConfig, classes: int) -> Mixing | None:
    """What mixes the batches in training; None if the settings ask for nothing.

    Raises:
        ConfigError: torchvision is not installed, or the images are not there to be mixed.
    """
    if config.trunk_cache is not None and (config.mixup_alpha or config.cutmix_alpha):
        raise ConfigError("mixup_alpha, cutmix_alpha: a trunk cache has no images to mix; leave it or them out")
    return mixing(classes, mixup_alpha=config.mixup_alpha, cutmix_alpha=config.cutmix_alpha)


def cache_settings(model: TunedModel, config: TrainingConfig) -> CacheSettings:
    """The settings of a run's trunk cache."""
    assert config.trunk_cache is not None
    return CacheSettings(
        folder=config.trunk_cache,
        dtype=config.trunk_cache_dtype,
        max_gb=config.trunk_cache_max_gb,
        precision=config.mixed_precision or "no",
        interpolate=config.image_size is not None or model.task.image_size is not None,
        batch_size=config.per_device_train_batch_size,
        workers=config.dataloader_num_workers,
        quiet=config.disable_tqdm,
    )
