"""What a training run and an evaluation make before their first batch: an accelerator, and loaders of batches."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader

from .augmentation import Augmentation
from .data import Collator, as_items
from .distribution import settle
from .errors import ConfigError
from .training_config import TrainingConfig
from .trunk_data import cached_dataset
from .tuned import TunedModel


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
    items = as_items(dataset, model.processor, config.image_size, config.on_error, augment)
    collator: Any = Collator(len(model.task.labels))
    if config.trunk_cache is not None:
        versions = 1 if augment is None else int(config.trunk_cache_versions)
        items, collator = cached_dataset(model, items, config, accelerator, versions=versions)
    return DataLoader(
        items,
        batch_size=config.per_device_eval_batch_size if order is None else config.per_device_train_batch_size,
        shuffle=order is not None,
        generator=order,
        collate_fn=collator,
        num_workers=config.dataloader_num_workers,
    )
