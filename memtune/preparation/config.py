"""The settings of `memtune.fit`, and their defaults by mode."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from transformers import SchedulerType

from ..errors import ConfigError
from ..trunk_cache import DTYPES, CacheType

RECIPES: dict[str, dict[str, float]] = {
    "unmasked": {"learning_rate": 5e-3, "weight_decay": 0.01, "label_smoothing_factor": 0.0},
    "masked": {"learning_rate": 4e-3, "weight_decay": 1.0, "label_smoothing_factor": 0.1},
}
"""Defaults by mode. A task stream overfits where an adapted one does not: it asks for strong weight decay and smoothing
(docs/results.md has the comparison)."""

SCHEDULES = tuple(each.value for each in SchedulerType if each.value not in ("reduce_lr_on_plateau", "greedy"))
"""How a learning rate can go: transformers' schedules that do not ask for a score at each step."""

Rule = tuple[str, Callable[[Any], bool]]
"""What is expected of a setting, and whether a value is that."""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _path(value: Any) -> bool:
    return isinstance(value, (str, Path)) and bool(str(value))


def _whole_to(most: float) -> Callable[[Any], bool]:
    return lambda value: value == 0 or (_whole(value) and value <= most)


def _settings(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _weights(value: Any) -> bool:
    if isinstance(value, str):
        return value == "balanced"
    numbers = isinstance(value, Sequence) and bool(value) and all(_number(each) and each >= 0 for each in value)
    return numbers and any(value)


def _one_of(*choices: str) -> Rule:
    return f"one of {choices}", lambda value: value in choices


_WHOLE: Rule = ("a whole number, 1 or more", _whole)
_NOT_NEGATIVE: Rule = ("a number, 0 or more", lambda value: _number(value) and value >= 0)
_SHARE: Rule = ("a number from 0 to below 1", lambda value: _number(value) and 0 <= value < 1)
_FLAG: Rule = ("True or False", lambda value: isinstance(value, bool))
_NAME: Rule = ("the name of a column", lambda value: isinstance(value, str) and bool(value))
_FOLDER: Rule = ("the path of a folder", _path)

_RULES: dict[str, Rule] = {
    "num_train_epochs": _NOT_NEGATIVE,
    "max_steps": ("a number of steps, or -1", lambda value: value == -1 or _whole(value)),
    "per_device_train_batch_size": _WHOLE,
    "per_device_eval_batch_size": _WHOLE,
    "auto_find_batch_size": _FLAG,
    "gradient_accumulation_steps": _WHOLE,
    "optim": _one_of("adamw", "sgd"),
    "learning_rate": _NOT_NEGATIVE,
    "layerwise_lr_decay": ("a number above 0, at most 1", lambda value: _number(value) and 0 < value <= 1),
    "weight_decay": _NOT_NEGATIVE,
    "momentum": _SHARE,
    "warmup_ratio": _SHARE,
    "warmup_steps": ("a whole number, 0 or more", _whole_to(math.inf)),
    "lr_scheduler_type": _one_of(*SCHEDULES),
    "lr_scheduler_kwargs": ("settings of the schedule by their names", _settings),
    "max_grad_norm": _NOT_NEGATIVE,
    "label_smoothing_factor": _SHARE,
    "class_weights": ("a number, 0 or more, for each class, and not 0 for all; or 'balanced'", _weights),
    "balanced_sampling": _FLAG,
    "ema_decay": _SHARE,
    "mixup_alpha": _NOT_NEGATIVE,
    "cutmix_alpha": _NOT_NEGATIVE,
    "randaugment_ops": ("a whole number, 0 or more", _whole_to(math.inf)),
    "random_horizontal_flip": _SHARE,
    "random_resized_crop": _SHARE,
    "color_jitter": _SHARE,
    "randaugment_magnitude": ("a whole number from 0 to 30", _whole_to(30)),
    "mixed_precision": _one_of("no", "bf16", "fp16"),
    "image_size": _WHOLE,
    "image_column": _NAME,
    "label_column": _NAME,
    "seed": ("a whole number from 0 to 2**32 - 1", _whole_to(2**32 - 1)),
    "on_error": _one_of("raise", "skip"),
    "dataloader_num_workers": ("a whole number, 0 or more", _whole_to(math.inf)),
    "dataloader_pin_memory": _FLAG,
    "dataloader_prefetch_factor": _WHOLE,
    "dataloader_drop_last": _FLAG,
    "disable_tqdm": _FLAG,
    "logging_steps": _WHOLE,
    "output_dir": _FOLDER,
    "eval_strategy": _one_of("epoch", "steps", "no"),
    "eval_steps": _WHOLE,
    "save_strategy": _one_of("epoch", "steps", "no"),
    "save_steps": _WHOLE,
    "save_total_limit": _WHOLE,
    "load_best_model_at_end": _FLAG,
    "metric_for_best_model": ("the name of a score", lambda value: isinstance(value, str) and bool(value)),
    "greater_is_better": _FLAG,
    "early_stopping_patience": _WHOLE,
    "trunk_cache": _FOLDER,
    "trunk_cache_dtype": _one_of(*DTYPES),
    "trunk_cache_max_gb": _NOT_NEGATIVE,
    "trunk_cache_versions": _WHOLE,
}

_OPTIONAL = {"layerwise_lr_decay", "class_weights", "ema_decay", "image_size", "output_dir", "save_total_limit"}
_OPTIONAL |= {"image_column", "label_column", "metric_for_best_model", "greater_is_better", "lr_scheduler_kwargs"}
_OPTIONAL |= {"dataloader_prefetch_factor"}
_OPTIONAL |= {"early_stopping_patience", "trunk_cache", "trunk_cache_max_gb", *RECIPES["masked"]}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of `fit`; names and meanings are those of `transformers.TrainingArguments` where it has them.

    Example:
        >>> config = memtune.TrainingConfig(num_train_epochs=20, mixed_precision="bf16", output_dir="pets-run")

    Args:
        num_train_epochs: Passes over the training images; a fraction is allowed.
        max_steps: Steps of the optimizer in place of epochs; -1 for epochs.
        per_device_train_batch_size: Images a step on each device.
        per_device_eval_batch_size: The same in evaluation.
        auto_find_batch_size: Where a GPU's memory is too small, begin anew with half as many images a pass, and twice
            as many passes a step.
        gradient_accumulation_steps: Batches whose gradients make one step.
        optim: "adamw" or "sgd".
        learning_rate: The highest learning rate; None for that of the model's mode (see `RECIPES`).
        layerwise_lr_decay: Factor of the learning rate for each block further from the head; None for none.
        weight_decay: On all trained values but biases; None for that of the mode.
        momentum: Of SGD.
        warmup_ratio: Share of the steps in which the learning rate rises to its highest.
        warmup_steps: So many steps in place of that share; 0 for the share.
        lr_scheduler_type: How it falls afterwards: "cosine", "linear", "constant_with_warmup" or another of
            transformers' schedules (`SCHEDULES`).
        lr_scheduler_kwargs: Settings of the schedule, such as {"num_cycles": 2} for "cosine_with_restarts".
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        label_smoothing_factor: Share of the target that is spread over all classes; None for that of the mode.
        class_weights: Weights of the classes in the training loss, in the order of the labels; "balanced" for weights
            in inverse proportion to the images of each class; None for equal ones.
        balanced_sampling: In training draw images of each class equally often, with replacement; an epoch has as many
            as ever.
        mixup_alpha: Mix pairs of images, by shares from a beta distribution with this parameter (0.2 is usual; needs
            torchvision); 0 for none.
        cutmix_alpha: The same for rectangles of one image in another (1.0 is usual).
        random_horizontal_flip: The probability that a training image of a `datasets.Dataset` is mirrored (0.5 is usual;
            needs torchvision).
        random_resized_crop: The least share of the image's area that a random crop has (0.35 or more is usual for few
            images); 0 for no crop.
        color_jitter: How strongly brightness, contrast and saturation change (0.4 is usual); 0 for not at all.
        randaugment_ops: RandAugment's number of operations on each training image of a `datasets.Dataset`, before the
            processor (2 is usual; needs torchvision); 0 for none.
        randaugment_magnitude: How strong they are, 0 to 30.
        ema_decay: Evaluate, and end with, a moving average of the trained values, which keeps this share of itself at
            each step; None for the values themselves.
        mixed_precision: "no", "bf16" or "fp16"; None for what `accelerate launch` was told, "no" without it.
        image_size: Height and width in pixels to train at, in place of the processor's; positions are interpolated.
        image_column: The column of images of a `datasets.Dataset`; None for `image`, or the only one of that type.
        label_column: The column of labels; None for `label` or `labels`, or the only one of that type.
        on_error: "raise" at an image that cannot be read, or "skip" it.
        dataloader_num_workers: Processes that read images; 0 for none beside this one.
        dataloader_pin_memory: Copy batches for a GPU from pinned memory.
        dataloader_prefetch_factor: Batches that each of them reads ahead; None for torch's 2.
        dataloader_drop_last: Leave out the last batch of an epoch in training if it is not full.
        seed: Of the order of the images and of everything random in training.
        disable_tqdm: No progress bar.
        logging_steps: Steps between two entries in the log and in the trackers, beside those of each epoch.
        report_to: "tensorboard", "trackio", "wandb" or any other of Accelerate's trackers, or several; "none".
        output_dir: A folder for checkpoints of the run, `checkpoint-<step>`, to go on from (docs/training.md); None for
            no checkpoints.
        eval_strategy: When the model is evaluated: after each "epoch", each `eval_steps` "steps" and at the end, or
            "no" at all.
        eval_steps: Steps between two evaluations.
        save_strategy: When a checkpoint is saved: after each "epoch", each `save_steps` "steps", or "no" at all.
        save_steps: Steps between two checkpoints.
        save_total_limit: Checkpoints to keep, the oldest go; None for all.
        load_best_model_at_end: End with the values whose evaluation was best.
        metric_for_best_model: The score that is best or not: "accuracy", "loss", or any other that evaluations give;
            None for the usual one ("accuracy", "mean_average_precision", or of numbers "r2").
        greater_is_better: Whether larger ones are better; None for what the name says: "loss" and errors are not.
        early_stopping_patience: Stop after so many evaluations in a row without a better one; None to go on.
        trunk_cache: A folder for what the trunk makes of each image, in masked mode: computed once, then read, by any
            method, task and run with the same images and backbone (docs/trunk_cache.md). None to compute it each time.
        trunk_cache_dtype: "float32", "float16", "bfloat16" or "int8": what keys and values are kept as.
        trunk_cache_max_gb: Most gigabytes (1e9 bytes) that the folder may hold; None for all that the disk has left.
        trunk_cache_versions: With RandAugment: how many versions of each training image the cache holds, the image
            itself among them; epochs go through them in turn.

    Raises:
        ConfigError: A setting is wrong.
    """

    num_train_epochs: float = 10
    max_steps: int = -1
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    auto_find_batch_size: bool = False
    gradient_accumulation_steps: int = 1
    optim: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float | None = None
    layerwise_lr_decay: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    warmup_ratio: float = 0.1
    warmup_steps: int = 0
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    max_grad_norm: float = 1.0
    label_smoothing_factor: float | None = None
    class_weights: Sequence[float] | Literal["balanced"] | None = None
    balanced_sampling: bool = False
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    random_horizontal_flip: float = 0.0
    random_resized_crop: float = 0.0
    color_jitter: float = 0.0
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    ema_decay: float | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    image_size: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_prefetch_factor: int | None = None
    dataloader_drop_last: bool = False
    seed: int = 42
    disable_tqdm: bool = False
    logging_steps: int = 10
    report_to: Any = "none"
    output_dir: str | Path | None = None
    eval_strategy: Literal["epoch", "steps", "no"] = "epoch"
    eval_steps: int = 500
    save_strategy: Literal["epoch", "steps", "no"] = "epoch"
    save_steps: int = 500
    save_total_limit: int | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    trunk_cache: str | Path | None = None
    trunk_cache_dtype: CacheType = "bfloat16"
    trunk_cache_max_gb: float | None = None
    trunk_cache_versions: int = 1

    def __post_init__(self) -> None:
        if self.mixed_precision is None:
            object.__setattr__(self, "mixed_precision", os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
        for name, (expected, holds) in _RULES.items():
            value = getattr(self, name)
            if not holds(value) and not (value is None and name in _OPTIONAL):
                raise ConfigError(f"{name}: got {value!r}, expected {expected}")
        if self.dataloader_prefetch_factor and not self.dataloader_num_workers:
            raise ConfigError(
                f"dataloader_prefetch_factor: got {self.dataloader_prefetch_factor}, but no process reads ahead; set "
                "dataloader_num_workers to 1 or more"
            )

    def with_columns(self, image: str | None, label: str | None) -> TrainingConfig:
        """The same settings, with the columns that are given in place of theirs."""
        given = {"image_column": image, "label_column": label}
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def for_mode(self, masked: bool) -> TrainingConfig:
        """The same settings, with those that were left to the mode filled in."""
        recipe = RECIPES["masked" if masked else "unmasked"]
        return replace(self, **{name: value for name, value in recipe.items() if getattr(self, name) is None})
