"""How right a model is on a data set, on one device or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import EvalPrediction
from transformers.modeling_outputs import ImageClassifierOutput

from ..errors import ConfigError, InputError
from ..models import TunedModel
from ..preparation import TrainingConfig, borrowed_state, check_items, make_accelerator, make_items, make_loader
from ..tasks import IGNORED, Objective, SingleLabel
from ..trunk_cache import to_pass
from .metrics import check_metrics, make_scores

MetricsFunction: TypeAlias = Callable[[EvalPrediction], Mapping[str, float]]
"""What makes scores of all logits (`predictions`, images x outputs) and labels (`label_ids`) of an evaluation."""


def evaluate(
    model: TunedModel,
    dataset: Any,
    config: TrainingConfig | None = None,
    *,
    classes: Sequence[int] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, float]:
    """The `accuracy` and mean `loss` of a model on a data set (see `fit`), its mode left as it was.

    For several classes an image these are `mean_average_precision` and `f1` (means over the classes that there are),
    `f1_micro`, `subset_accuracy` (the share of images with all classes right) and `loss`; for numbers `r2`, `mse`,
    `mae` and `loss`. Each image counts exactly once, on any number of devices; those labelled -100, and those that are
    skipped, do not.

    Args:
        model: The model.
        dataset: The images and labels.
        config: The settings.
        classes: Indices of the classes to choose among, as if the head had no others; None for all.
        image_column: As in `TrainingConfig`.
        label_column: The same.

    Raises:
        InputError: The data set, an image or a label is wrong.
        ConfigError: `classes` for a task that has not one class an image.
        MemtuneError: scikit-learn is not installed, where it measures.
    """
    model.task.require_head("evaluate")
    check_metrics(model.task.objective)
    if classes is not None and not isinstance(model.task.objective, SingleLabel):
        raise ConfigError(f"classes: got a task of {model.task.objective.problem_type}, whose classes exclude no other")
    config = (config or TrainingConfig(disable_tqdm=True)).with_columns(image_column, label_column)
    training = model.training
    try:
        with borrowed_state():
            accelerator = make_accelerator(config)
            items = make_items(model, dataset, config)
            check_items(model, items, config)
            loader: Any = accelerator.prepare_data_loader(make_loader(model, items, config, accelerator))
            with accelerator.autocast():
                return measure(
                    accelerator, model.to(accelerator.device), loader, config, model.task.objective, classes=classes
                )
    finally:
        if training:
            model.train()


def run_batch(model: nn.Module, batch: dict[str, Any], config: TrainingConfig) -> ImageClassifierOutput:
    """A model's output, with float32 logits, for a batch of images or of what a trunk cache has of them."""
    if "trunk" in batch:
        outputs = model(trunk=to_pass(batch["trunk"]))
    else:
        outputs = model(pixel_values=batch["pixel_values"], interpolate_pos_encoding=config.image_size is not None)
    outputs.logits = outputs.logits.float()
    return outputs


@torch.no_grad()
def measure(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Any,
    config: TrainingConfig,
    objective: Objective,
    *,
    classes: Sequence[int] | None = None,
    compute_metrics: MetricsFunction | None = None,
) -> dict[str, float]:
    """The same for what Accelerate has prepared; leaves the model in evaluation mode.

    Args:
        accelerator: What has prepared them.
        model: The model.
        loader: The batches.
        config: The settings.
        objective: What the labels are.
        classes: As for `evaluate`.
        compute_metrics: What makes further scores of all logits and labels, as for transformers' Trainer.
    """
    model.eval()
    scores, kept_logits, kept_labels = make_scores(objective), [], []
    for batch in loader:
        logits = run_batch(model, batch, config).logits
        logits, labels = accelerator.gather_for_metrics((logits, batch["labels"]))
        kept = objective.kept(labels)
        logits, labels = logits[kept], labels[kept]
        if classes is not None:
            chosen = torch.tensor(classes, device=logits.device)
            logits = torch.full_like(logits, -torch.inf).index_copy(1, chosen, logits[:, chosen])
        scores.add(logits, labels)
        if compute_metrics is not None:
            kept_logits.append(logits.cpu())
            kept_labels.append(labels.cpu())
    if not scores.images:
        raise InputError(f"no image of the data set has a label to measure by: all are skipped, or labelled {IGNORED}")
    more: dict[str, Any] = {}
    if compute_metrics is not None:
        logits, labels = torch.cat(kept_logits).numpy(), torch.cat(kept_labels).numpy()
        more = _check_scores(compute_metrics(EvalPrediction(predictions=logits, label_ids=labels)))
    return scores.compute() | more


def _check_scores(found: Any) -> dict[str, float]:
    """The scores that a user's function gave, without the prefix `eval_`.

    Raises:
        ConfigError: They are no scores.
    """
    if not isinstance(found, Mapping) or not all(isinstance(each, (Real, np.generic)) for each in found.values()):
        raise ConfigError(f"compute_metrics: gave {str(found)[:200]}, expected a dictionary of numbers")
    return {str(name).removeprefix("eval_"): float(value) for name, value in found.items()}
