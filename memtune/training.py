"""One training loop on Accelerate: a CPU, a GPU or many, by how the program is launched."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler
from transformers.modeling_outputs import ImageClassifierOutput

from .data import Collator, as_items
from .errors import ConfigError
from .metrics import Accuracy
from .trunk_cache import DTYPES, CacheType, to_pass
from .trunk_data import cached_dataset, check_cacheable
from .tuned import TunedModel

logger = logging.getLogger(__name__)

LossFunction: TypeAlias = Callable[[ImageClassifierOutput, Tensor], Tensor]
"""The mean loss of a batch from the model's output, whose logits are float32, and the labels (batch,)."""

RECIPES: dict[str, dict[str, float]] = {
    "unmasked": {"learning_rate": 5e-3, "weight_decay": 0.01, "label_smoothing_factor": 0.0},
    "masked": {"learning_rate": 4e-3, "weight_decay": 1.0, "label_smoothing_factor": 0.1},
}
"""Defaults by mode. A task stream overfits where an adapted one does not: it asks for strong weight decay and smoothing
(docs/results.md has the comparison)."""

_CHOICES = {
    "optim": ("adamw", "sgd"),
    "lr_scheduler_type": ("cosine", "linear", "constant", "constant_with_warmup"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "on_error": ("raise", "skip"),
    "trunk_cache_dtype": tuple(DTYPES),
}
_WHOLE = {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
_SHARES = {"warmup_ratio", "label_smoothing_factor", "momentum"}
_NOT_NEGATIVE = {"learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "dataloader_num_workers"}
_NOT_NEGATIVE |= {"trunk_cache_max_gb"}
_OPTIONAL = {"trunk_cache", "trunk_cache_max_gb"}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of `fit`; names and meanings are those of `transformers.TrainingArguments` where it has them.

    Args:
        num_train_epochs: Passes over the training images; a fraction is allowed.
        max_steps: Steps of the optimizer in place of epochs; -1 for epochs.
        per_device_train_batch_size: Images a step on each device.
        per_device_eval_batch_size: The same in evaluation.
        gradient_accumulation_steps: Batches whose gradients make one step.
        optim: "adamw" or "sgd".
        learning_rate: The highest learning rate; None for that of the model's mode (see `RECIPES`).
        weight_decay: On all trained values but biases; None for that of the mode.
        momentum: Of SGD.
        warmup_ratio: Share of the steps in which the learning rate rises to its highest.
        lr_scheduler_type: How it falls afterwards.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        label_smoothing_factor: Share of the target that is spread over all classes; None for that of the mode.
        mixed_precision: "no", "bf16" or "fp16".
        image_size: Height and width in pixels to train at, in place of the processor's; positions are interpolated.
        on_error: "raise" at an image that cannot be read, or "skip" it.
        dataloader_num_workers: Processes that read images; 0 for none beside this one.
        seed: Of the order of the images and of everything random in training.
        disable_tqdm: No progress bar.
        trunk_cache: A folder for what the trunk makes of each image, in masked mode: computed once, then read, by any
            method, task and run with the same images and backbone (docs/trunk_cache.md). None to compute it each time.
        trunk_cache_dtype: "float32", "float16", "bfloat16" or "int8": what keys and values are kept as.
        trunk_cache_max_gb: Most gigabytes (1e9 bytes) that the folder may hold; None for all that the disk has left.

    Raises:
        ConfigError: A setting is wrong.
    """

    num_train_epochs: float = 10
    max_steps: int = -1
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    optim: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    warmup_ratio: float = 0.1
    lr_scheduler_type: str = "cosine"
    max_grad_norm: float = 1.0
    label_smoothing_factor: float | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    image_size: int | None = None
    on_error: Literal["raise", "skip"] = "raise"
    dataloader_num_workers: int = 0
    seed: int = 42
    disable_tqdm: bool = False
    trunk_cache: str | Path | None = None
    trunk_cache_dtype: CacheType = "bfloat16"
    trunk_cache_max_gb: float | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            problem = _problem(each.name, getattr(self, each.name))
            if problem:
                raise ConfigError(f"{each.name}: got {getattr(self, each.name)!r}, expected {problem}")

    def for_mode(self, masked: bool) -> TrainingConfig:
        """The same settings, with those that were left to the mode filled in."""
        recipe = RECIPES["masked" if masked else "unmasked"]
        return replace(self, **{name: value for name, value in recipe.items() if getattr(self, name) is None})


def _problem(name: str, value: Any) -> str | None:
    """What was expected of a setting, if its value is wrong."""
    if value is None and (name in RECIPES["masked"] or name in _OPTIONAL):
        return None
    if name in _CHOICES:
        return None if value in _CHOICES[name] else f"one of {_CHOICES[name]}"
    given = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    number = float(value) if given and value is not None else math.nan  # which no comparison below holds for
    if name in _WHOLE or (name == "image_size" and value is not None):
        return None if number >= 1 and number.is_integer() else "a whole number, 1 or more"
    if name in _SHARES:
        return None if 0 <= number < 1 else "a number from 0 to below 1"
    if name == "trunk_cache":
        return None if isinstance(value, (str, Path)) and str(value) else "the path of a folder"
    if name in _NOT_NEGATIVE:
        return None if number >= 0 else "a number, 0 or more"
    if name == "max_steps":
        return None if number == -1 or number >= 1 else "a number of steps, or -1"
    return None


@dataclass
class TrainingResult:
    """What a run did.

    Attributes:
        history: For each epoch `epoch`, `loss`, `learning_rate`, `seconds`, and what evaluation gave as `eval_...`.
        steps: Steps of the optimizer.
        seconds: The whole run, the filling of a trunk cache included.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


def fit(
    model: TunedModel,
    train_dataset: Any,
    eval_dataset: Any = None,
    config: TrainingConfig | None = None,
    *,
    compute_loss_func: LossFunction | None = None,
) -> TrainingResult:
    """Train a model's adapter.

    Args:
        model: The model; it is left in evaluation mode, on the device it was trained on.
        train_dataset: A `datasets.Dataset` with the columns `image` and `label`, which go through the model's
            processor, or any indexable data set of `{"pixel_values": (channels, height, width), "labels": int}`.
        eval_dataset: The same; evaluated after each epoch.
        config: The settings.
        compute_loss_func: The loss in training, `f(outputs, labels)`, in place of cross-entropy with label smoothing;
            what the methods add to it is still added.

    Raises:
        InputError: A data set, an image or a label is wrong.
    """
    config = (config or TrainingConfig()).for_mode(model.task.masked)
    if config.trunk_cache is not None:
        check_cacheable(model)
    start = time.perf_counter()
    set_seed(config.seed)
    accelerator = _accelerator(config)
    eval_loader = None if eval_dataset is None else _loader(model, eval_dataset, config, accelerator, training=False)
    loss = compute_loss_func or partial(_cross_entropy, label_smoothing=config.label_smoothing_factor or 0.0)
    loader = _loader(model, train_dataset, config, accelerator, training=True)
    run = _Run(accelerator, model, loader, eval_loader, config, loss)
    try:
        while run.result.steps < run.steps:
            model.train()
            run.train_epoch()
    finally:
        run.close()
        model.eval()
    run.result.seconds = time.perf_counter() - start
    return run.result


class _Run:
    """One call of `fit`: what is prepared by Accelerate, and how far it has come."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: TunedModel,
        loader: DataLoader,
        eval_loader: DataLoader | None,
        config: TrainingConfig,
        compute_loss: LossFunction,
    ) -> None:
        self.config = config
        self.compute_loss = compute_loss
        self.accelerator = accelerator
        self.task = model.task
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, _optimizer(model, config), loader)
        self.eval_loader = None if eval_loader is None else self.accelerator.prepare(eval_loader)
        self.steps = _total_steps(len(self.loader), config)
        warmup = math.ceil(config.warmup_ratio * self.steps)
        self.schedule = get_scheduler(config.lr_scheduler_type, self.optimizer, warmup, self.steps)
        self.result = TrainingResult()
        quiet = config.disable_tqdm or not self.accelerator.is_main_process
        self.bar = tqdm(total=self.steps, disable=quiet, unit="step")

    def train_epoch(self) -> None:
        """Train until the data or the steps end, evaluate, and write it down."""
        start = time.perf_counter()
        total, images = torch.zeros((), device=self.accelerator.device), 0
        for batch in self.loader:
            count = len(batch["labels"])
            total, images = total + self._train_batch(batch) * count, images + count
            if self.result.steps == self.steps:
                break
        sums = torch.stack([total, torch.tensor(float(images), device=self.accelerator.device)])
        loss, images = self.accelerator.reduce(sums).tolist()  # type: ignore[union-attr]
        entry = {"epoch": len(self.result.history) + 1.0, "loss": loss / images}
        entry |= {"learning_rate": self.schedule.get_last_lr()[0], "seconds": time.perf_counter() - start}
        if self.eval_loader is not None:
            scores = _evaluate(self.accelerator, self.model, self.eval_loader, self.config)
            entry |= {f"eval_{name}": value for name, value in scores.items()}
        self.result.history.append(entry)
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in entry.items() if name != "seconds"})
        logger.info("%s", entry)

    def _train_batch(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward and backward over one batch, and a step when enough of them have come; gives the mean loss."""
        with self.accelerator.accumulate(self.model):
            loss = self.compute_loss(_forward(self.model, batch, self.config), batch["labels"])
            if (penalty := self.task.penalty()) is not None:
                loss = loss + penalty
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients and self.config.max_grad_norm:
                trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
                self.accelerator.clip_grad_norm_(trained, self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            if not self.optimizer.step_was_skipped:
                self.schedule.step()
            self.result.steps += 1
            self.bar.update()
        return loss.detach()

    def close(self) -> None:
        """Take off the model what Accelerate put on it."""
        self.bar.close()
        _release(self.accelerator, self.model)


def evaluate(
    model: TunedModel, dataset: Any, config: TrainingConfig | None = None, *, classes: Sequence[int] | None = None
) -> dict[str, float]:
    """The `accuracy` and mean `loss` of a model on a data set (see `fit`), its mode left as it was.

    Each image counts exactly once, on any number of devices.

    Args:
        model: The model.
        dataset: The images and labels.
        config: The settings.
        classes: Indices of the classes to choose among, as if the head had no others; None for all.
    """
    config = config or TrainingConfig(disable_tqdm=True)
    accelerator = _accelerator(config)
    prepared, loader = accelerator.prepare(model, _loader(model, dataset, config, accelerator, training=False))
    training = model.training
    try:
        return _evaluate(accelerator, prepared, loader, config, classes)
    finally:
        _release(accelerator, prepared)
        if training:
            model.train()


def _accelerator(config: TrainingConfig) -> Accelerator:
    # Accelerate keeps the precision of a process's first accelerator, and refuses another one.
    if AcceleratorState._shared_state.get("_mixed_precision", config.mixed_precision) != config.mixed_precision:
        AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation_steps
    )


def _release(accelerator: Accelerator, prepared: nn.Module) -> None:
    """Take off a model what Accelerate put on it, with the mark that keeps the next accelerator from preparing it."""
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    for name in ("forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)


def _loader(
    model: TunedModel, dataset: Any, config: TrainingConfig, accelerator: Accelerator, *, training: bool
) -> DataLoader:
    items = as_items(dataset, model.processor, config.image_size, config.on_error)
    collator: Any = Collator(len(model.task.labels))
    if config.trunk_cache is not None:
        items, collator = cached_dataset(model, items, config, accelerator)
    return DataLoader(
        items,
        batch_size=config.per_device_train_batch_size if training else config.per_device_eval_batch_size,
        shuffle=training,
        generator=torch.Generator().manual_seed(config.seed) if training else None,
        collate_fn=collator,
        num_workers=config.dataloader_num_workers,
    )


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trained if not name.endswith("bias")]},
        {"params": [parameter for name, parameter in trained if name.endswith("bias")], "weight_decay": 0.0},
    ]
    assert config.learning_rate is not None
    assert config.weight_decay is not None
    if config.optim == "sgd":
        return torch.optim.SGD(groups, config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay)


def _total_steps(batches: int, config: TrainingConfig) -> int:
    an_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    return config.max_steps if config.max_steps > 0 else math.ceil(an_epoch * config.num_train_epochs)


def _forward(model: nn.Module, batch: dict[str, Any], config: TrainingConfig) -> ImageClassifierOutput:
    if "trunk" in batch:
        outputs = model(trunk=to_pass(batch["trunk"]))
    else:
        outputs = model(pixel_values=batch["pixel_values"], interpolate_pos_encoding=config.image_size is not None)
    outputs.logits = outputs.logits.float()
    return outputs


def _cross_entropy(outputs: ImageClassifierOutput, labels: Tensor, label_smoothing: float) -> Tensor:
    assert outputs.logits is not None
    return cross_entropy(outputs.logits, labels, label_smoothing=label_smoothing)


@torch.no_grad()
def _evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Any,
    config: TrainingConfig,
    classes: Sequence[int] | None = None,
) -> dict[str, float]:
    model.eval()
    accuracy, losses = Accuracy(), []
    for batch in loader:
        logits = _forward(model, batch, config).logits
        logits, labels = accelerator.gather_for_metrics((logits, batch["labels"]))
        if classes is not None:
            chosen = torch.tensor(classes, device=logits.device)
            logits = torch.full_like(logits, -torch.inf).index_copy(1, chosen, logits[:, chosen])
        accuracy.add_batch(predictions=logits.argmax(dim=-1).cpu(), references=labels.cpu())
        losses.append(cross_entropy(logits, labels, reduction="none").cpu())
    scores = accuracy.compute()
    assert scores is not None
    return {"accuracy": scores["accuracy"], "loss": torch.cat(losses).mean().item()}
