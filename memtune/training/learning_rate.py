"""A learning rate found by a short run in which it grows from step to step.

"Cyclical Learning Rates for Training Neural Networks" (Smith, https://arxiv.org/abs/1506.01186, section 3.3), with the
geometric growth, the smoothing and the stop of fastai's `lr_find`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from ..drawing import new_figure
from ..errors import ConfigError
from ..evaluation import run_batch
from ..models import TunedModel
from ..preparation import (
    TrainingConfig,
    borrowed_state,
    check_items,
    make_accelerator,
    make_augmentation,
    make_items,
    make_loader,
    release,
)
from .fitting import check_objective
from .optimization import class_weights, make_optimizer, plain_loss

_SMOOTHING = 0.9
"""Share of the mean loss so far that a step keeps."""

_DIVERGED = 4.0
"""So many times its least value the smoothed loss may be."""

_LEAST_STEPS = 5
"""Steps without which nothing is suggested."""


@dataclass
class LearningRateResult:
    """What `find_learning_rate` found; print it to see what it suggests.

    Attributes:
        learning_rates: The learning rate of each step, ascending.
        losses: The mean loss after each step, smoothed over those before it.
    """

    learning_rates: list[float]
    losses: list[float]

    @property
    def suggestion(self) -> float | None:
        """The rate at which the loss falls most steeply, over the logarithm of the rate; None if it never falls."""
        end = int(np.argmin(self.losses)) + 1 if self.losses else 0
        if end < _LEAST_STEPS:
            return None
        slopes = np.gradient(np.asarray(self.losses), np.log(self.learning_rates))[:end]
        steepest = int(np.argmin(slopes))
        return self.learning_rates[steepest] if slopes[steepest] < 0 else None

    def plot(self, path: str | Path) -> None:
        """Draw the loss over the learning rate.

        Args:
            path: The picture's file; its ending says the format (.png, .svg, .pdf).

        Raises:
            MemtuneError: matplotlib is not installed.
        """
        figure = new_figure(figsize=(6, 3.5))
        axes = figure.subplots()
        axes.plot(self.learning_rates, self.losses)
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss, smoothed")
        axes.grid(alpha=0.3)
        if (rate := self.suggestion) is not None:
            loss = self.losses[self.learning_rates.index(rate)]
            axes.scatter([rate], [loss], color="tab:red", zorder=3, label=f"suggestion: {rate:.2g}")
            axes.legend()
        figure.savefig(path)

    def __str__(self) -> str:
        if self.suggestion is None:
            return f"no learning rate is suggested: in {len(self.losses)} steps the loss has not fallen steadily"
        first, last = self.learning_rates[0], self.learning_rates[-1]
        return f"learning rate {self.suggestion:.2g} ({len(self.losses)} steps from {first:.2g} to {last:.2g})"


def find_learning_rate(
    model: TunedModel,
    train_dataset: Any,
    config: TrainingConfig | None = None,
    *,
    start: float = 1e-6,
    end: float = 1.0,
    num_steps: int = 100,
) -> LearningRateResult:
    """Train for some steps while the learning rate grows, and see where the loss falls; the model stays as it was.

    Example:
        >>> model = memtune.wrap(backbone, memtune.MemoryConfig(4), labels=["cat", "dog"], processor=processor)
        >>> result = memtune.find_learning_rate(model, train_dataset, num_steps=20)
        >>> result.plot("learning_rates.png")

    Args:
        model: The model.
        train_dataset: The images and labels, as `fit` takes them.
        config: The settings of the run that is to follow; its own learning rate, schedule and number of steps do not
            count here.
        start: The learning rate of the first step.
        end: That of the last.
        num_steps: How many there are at most: it ends before where the loss is four times its least, or no number.

    Raises:
        ConfigError: A setting is wrong, or there are several processes.
        InputError: The data set, an image or a label is wrong.
    """
    config = config or TrainingConfig(disable_tqdm=True)
    check_objective(model.task.objective, config)
    config = config.for_mode(model.task.masked)
    if not (0 < start < end < math.inf):
        raise ConfigError(f"start, end: got {start!r} and {end!r}, expected learning rates above 0, the first smaller")
    if type(num_steps) is not int or num_steps < _LEAST_STEPS:
        raise ConfigError(f"num_steps: got {num_steps!r}, expected a whole number, {_LEAST_STEPS} or more")
    if PartialState().num_processes > 1:
        raise ConfigError("find_learning_rate: got several processes; look for a learning rate in one, then train")
    model.task.require_head("find_learning_rate")
    model.require_adapter("find_learning_rate")
    before = {name: tensor.clone() for name, tensor in model.task.tensors().items()}
    training = model.training
    rates = np.geomspace(start, end, num_steps).tolist()
    set_seed(config.seed)
    try:
        with torch.inference_mode(False), torch.enable_grad(), borrowed_state():
            losses = list(_losses(model, train_dataset, config, rates))
    finally:
        model.task.load_tensors(before)
        model.train(training)
    return LearningRateResult(rates[: len(losses)], losses)


def _losses(model: TunedModel, dataset: Any, config: TrainingConfig, rates: list[float]) -> Iterator[float]:
    """The smoothed loss of each step, until it grows too large."""
    accelerator, augmentation = make_accelerator(config), make_augmentation(config)
    items = make_items(model, dataset, config, augmentation)
    check_items(model, items, config)
    order = torch.Generator().manual_seed(config.seed)
    loader = make_loader(model, items, config, accelerator, order=order, augment=augmentation)
    weights = class_weights(config, items, len(model.task.labels), accelerator.device)
    prepared: Any = accelerator.prepare(model, make_optimizer(model, config), loader)
    trained, optimizer, loader = prepared
    # Groups learn at shares of the learning rate (`layerwise_lr_decay`).
    shares = [group["lr"] / config.learning_rate if config.learning_rate else 1.0 for group in optimizer.param_groups]
    objective, mean, least = model.task.objective, 0.0, math.inf
    try:
        trained.train()
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        for step, rate in enumerate(tqdm(rates, disable=config.disable_tqdm, unit="step"), start=1):
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
            batch = next(each for each in batches if objective.kept(each["labels"]).any())
            outputs = run_batch(trained, batch, config)
            assert outputs.logits is not None
            loss = plain_loss(objective, outputs.logits, batch["labels"], config, weights)
            if (penalty := model.task.penalty()) is not None:
                loss = loss + penalty
            mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss.item()
            smoothed = mean / (1 - _SMOOTHING**step)
            if not math.isfinite(smoothed) or smoothed > _DIVERGED * least:
                return
            least = min(least, smoothed)
            yield smoothed
            accelerator.backward(loss)
            if config.max_grad_norm:
                accelerator.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        release(accelerator, model)
