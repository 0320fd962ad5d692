"""How right a model is on a data set, on one device or many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.modeling_outputs import ImageClassifierOutput

from ..data import Items
from ..errors import ConfigError, InputError
from ..models import MultiTaskModel, TunedModel
from ..preparation import TrainingConfig, borrowed_state, check_items, make_accelerator, make_items, make_loader
from ..tasks import IGNORED, Objective, SingleLabel, check_task_names
from ..trunk_cache import to_pass
from .metrics import check_metrics, make_scores
from .report import SHOWN_ERRORS, EvaluationReport

_NOTHING = f"no image of the data set has a label to measure by: all are skipped, or labelled {IGNORED}"

MetricsFunction: TypeAlias = Callable[[EvalPrediction], Mapping[str, float]]
"""What makes scores of all logits (`predictions`, images x outputs) and labels (`label_ids`) of an evaluation."""


@overload
def evaluate(
    model: TunedModel,
    dataset: Any,
    config: TrainingConfig | None = None,
    *,
    classes: Sequence[int] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    report: Literal[False] = False,
) -> dict[str, float]: ...


@overload
def evaluate(
    model: TunedModel,
    dataset: Any,
    config: TrainingConfig | None = None,
    *,
    classes: None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    report: Literal[True],
) -> EvaluationReport: ...


@overload
def evaluate(
    model: MultiTaskModel,
    dataset: Mapping[str, Any],
    config: TrainingConfig | None = None,
    *,
    classes: None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    report: bool = False,
) -> dict[str, Any]: ...


def evaluate(
    model: TunedModel | MultiTaskModel,
    dataset: Any,
    config: TrainingConfig | None = None,
    *,
    classes: Sequence[int] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    report: bool = False,
) -> Any:
    """The `accuracy` and mean `loss` of a model on a data set (see `fit`), its mode left as it was.

    For several classes an image these are `mean_average_precision` and `f1` (means over the classes that there are),
    `f1_micro`, `subset_accuracy` (the share of images with all classes right) and `loss`; for numbers `r2`, `mse`,
    `mae` and `loss`. Each image counts exactly once, on any number of devices; those labelled -100, and those that are
    skipped, do not.

    Example:
        >>> scores = memtune.evaluate(memtune.load("pets-lora"), eval_dataset)
        >>> sorted(scores)
        ['accuracy', 'loss']

    Args:
        model: The model.
        dataset: The images and labels; of a model of many tasks a data set for each task, by its name.
        config: The settings.
        classes: Indices of the classes to choose among, as if the head had no others; None for all.
        image_column: As in `TrainingConfig`.
        label_column: The same.
        report: Give an `EvaluationReport` in place of the scores: by class, by pair of classes, calibration, and the
            worst errors.

    Returns:
        The scores by name, or the report; of a model of many tasks these by task.

    Raises:
        InputError: The data set, an image or a label is wrong.
        ConfigError: `classes` for a task that has not one class an image, or with `report`; or a task is unknown.
        MemtuneError: scikit-learn is not installed, where it measures.
    """
    config = (config or TrainingConfig(disable_tqdm=True)).with_columns(image_column, label_column)
    if isinstance(model, MultiTaskModel):
        return _evaluate_tasks(model, dataset, config, classes, report=report)
    objective = model.task.objective
    model.task.require_head("evaluate")
    model.require_adapter("evaluate")
    check_metrics(objective, report=report)
    if classes is not None and (report or not isinstance(objective, SingleLabel)):
        what = "a report" if report else f"a task of {objective.problem_type}"
        raise ConfigError(f"classes: got {list(classes)} for {what}, which is of all classes; leave it out")
    training = model.training
    try:
        with borrowed_state():
            accelerator = make_accelerator(config)
            items = make_items(model, dataset, config)
            check_items(model, items, config)
            loader: Any = accelerator.prepare_data_loader(make_loader(model, items, config, accelerator))
            model.to(accelerator.device)
            with accelerator.autocast():
                if report:
                    return _report(accelerator, model, items, loader, config)
                return measure(accelerator, model, loader, config, objective, classes=classes)
    finally:
        if training:
            model.train()


def _evaluate_tasks(
    model: MultiTaskModel, data: Any, config: TrainingConfig, classes: Any, *, report: bool
) -> dict[str, Any]:
    """The same for some tasks of a model, each on its own data."""
    if not isinstance(data, Mapping) or not data:
        raise ConfigError(f"dataset: got {type(data).__name__}, expected a data set for each task by its name")
    if classes is not None:
        raise ConfigError("classes: got them for a model of many tasks; evaluate the task alone")
    check_task_names("dataset", list(data), model.arrangement.tasks)
    found = {}
    for name, dataset in data.items():
        task = copy.deepcopy(model.arrangement.tasks[name])
        alone = TunedModel(model.backbone, task, processor=model.processors[name]).eval()
        try:
            found[name] = evaluate(alone, dataset, config, report=report)  # type: ignore[call-overload]
        except InputError as error:
            raise InputError(f"task {name!r}: {error}") from error
        finally:
            alone.detach()
    return found


def _report(
    accelerator: Accelerator, model: TunedModel, items: Items, loader: Any, config: TrainingConfig
) -> EvaluationReport:
    """Collect all answers, and the images that were answered worst."""
    objective, scores = model.task.objective, make_scores(model.task.objective)
    collected: list[tuple[Tensor, ...]] = []
    for logits, labels in answers(accelerator, model, loader, config):
        kept = objective.kept(labels)
        own, right = logits[kept], labels[kept]
        scores.add(own, right)
        collected.append((kept.cpu(), objective.scores(own).cpu(), right.cpu(), objective.losses(own, right).cpu()))
    if not scores.images:
        raise InputError(_NOTHING)
    kept, answered, targets, losses = (torch.cat(part).numpy() for part in zip(*collected, strict=True))
    names = [items.name(index) for index in range(len(items))]
    places = np.flatnonzero(kept).tolist()
    found = EvaluationReport(
        list(model.task.labels),
        objective.problem_type,
        scores.compute(),
        [names[place] for place in places],
        answered,
        targets.reshape(answered.shape) if targets.dtype.kind == "f" else targets,
        losses,
        [names[place] for place in np.flatnonzero(~kept)],
    )
    for place in found.worst[:SHOWN_ERRORS]:
        found.pictures[place] = items.version(places[place], 0)["pixel_values"].float().numpy()
    return found


def run_batch(model: nn.Module, batch: dict[str, Any], config: TrainingConfig) -> ImageClassifierOutput:
    """A model's output, with float32 logits, for a batch of images or of what a trunk cache has of them."""
    if "trunk" in batch:
        outputs = model(trunk=to_pass(batch["trunk"]))
    else:
        outputs = model(pixel_values=batch["pixel_values"], interpolate_pos_encoding=config.image_size is not None)
    outputs.logits = outputs.logits.float()
    return outputs


@torch.no_grad()
def answers(
    accelerator: Accelerator, model: nn.Module, loader: Any, config: TrainingConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of batches, of all processes in the order of the data set; the model is in evaluation mode."""
    model.eval()
    for batch in loader:
        logits = run_batch(model, batch, config).logits
        gathered: Any = accelerator.gather_for_metrics((logits, batch["labels"]))
        yield gathered


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
    scores, kept_logits, kept_labels = make_scores(objective), [], []
    for logits, labels in answers(accelerator, model, loader, config):
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
        raise InputError(_NOTHING)
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
