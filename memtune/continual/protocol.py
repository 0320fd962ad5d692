"""Class-incremental learning: tasks of new classes one after the other, and no image of earlier ones.

The protocol is that of CODA-Prompt (https://arxiv.org/abs/2211.13218 and https://github.com/GT-RIPL/CODA-Prompt, commit
6417d4f): the head has all classes from the start; a task trains with a new optimizer, by default on a cross-entropy
among its own classes alone; after each task, images of all tasks so far are classified among all classes so far,
without their task being told.
"""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers.modeling_outputs import ImageClassifierOutput

from ..data import ImageDataset, LabelReader, class_names
from ..errors import ConfigError, InputError
from ..evaluation import evaluate
from ..models import TunedModel
from ..preparation import TrainingConfig, make_items
from ..tasks import IGNORED, SingleLabel
from ..training import FeatureSums, fit, read_features, solve_head
from .folder import RunFolder, start_task
from .result import ContinualResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ContinualTask:
    """One task of a sequence.

    Attributes:
        classes: Indices of its classes among the labels of the model; no other task has them.
        train_dataset: Its images and labels, as `fit` takes them; the labels are those indices.
        eval_dataset: Its test images, the same way.
    """

    classes: Sequence[int]
    train_dataset: Any
    eval_dataset: Any


def class_order(classes: int, seed: int) -> list[int]:
    """CODA's order of classes: the natural one for the seed 0, otherwise shuffled by Python's generator."""
    order = list(range(classes))
    if seed:
        random.Random(seed).shuffle(order)
    return order


def split_by_class(
    train_dataset: datasets.Dataset, eval_dataset: datasets.Dataset, tasks: int, order: Sequence[int] | None = None
) -> list[ContinualTask]:
    """Split two data sets with the column `label` into tasks of new classes.

    Args:
        train_dataset: The images to train on.
        eval_dataset: The test images.
        tasks: Number of tasks; where it does not divide the number of classes, the first ones get one class more.
        order: Class indices in the order in which they come; by default ascending, all that are in `train_dataset`.

    Raises:
        ConfigError: There are fewer classes than tasks, or a class is named twice or has no images.
        InputError: A data set has no column `label`, its labels are no numbers, or a class of the test images is not
            among the training images'.
    """
    names = class_names(train_dataset) if isinstance(train_dataset, datasets.Dataset) else None
    labels = [_numbers(split, names) for split in (train_dataset, eval_dataset)]
    order = sorted(set(labels[0])) if order is None else list(order)
    if not 1 <= tasks <= len(order):
        raise ConfigError(f"tasks: got {tasks}, expected a number from 1 to that of the classes, {len(order)}")
    wrong = sorted({each for each in order if order.count(each) > 1 or any(each not in split for split in labels)})
    if wrong:
        raise ConfigError(f"order: the classes {wrong} are named twice, or have no images in one of the data sets")
    share, more = divmod(len(order), tasks)
    ends = [share * number + min(number, more) for number in range(tasks + 1)]
    return [
        ContinualTask(order[start:end], *(
            split.select([index for index, label in enumerate(column) if label in set(order[start:end])])
            for split, column in zip((train_dataset, eval_dataset), labels, strict=True)
        ))
        for start, end in pairwise(ends)
    ]  # fmt: skip


def _numbers(dataset: Any, names: Sequence[str] | None) -> list[int]:
    """The numbers that the classes of a data set's images have among some names; None for its own."""
    if not isinstance(dataset, datasets.Dataset) or "label" not in dataset.column_names:
        columns = getattr(dataset, "column_names", None)
        what = type(dataset).__name__ if columns is None else f"the columns {columns}"
        raise InputError(f"got {what}, expected a datasets.Dataset with the column label")
    column = dataset.with_format(None)["label"][:]
    if other := [each for each in column if type(each) is not int]:
        raise InputError(
            f"label: got {other[0]!r}, expected the number of a class; class_encode_column('label') numbers texts"
        )
    own = class_names(dataset)
    if names is None or own is None or list(own) == list(names):
        return column
    reader = LabelReader(names, own)
    return [reader(label, f"image {index}") for index, label in enumerate(column)]


def fit_continual(
    model: TunedModel,
    tasks: Sequence[ContinualTask],
    config: TrainingConfig | None = None,
    *,
    loss: Literal["local", "seen"] = "local",
    solver: Literal["gradient", "closed_form"] = "gradient",
    output_dir: str | Path | None = None,
) -> ContinualResult:
    """Train a model's adapter on one task after the other, and test it on all tasks so far after each.

    For each task the adapters' `start_task` is called, and `fit` makes a new optimizer and schedule. Task t, from 0 on,
    has the seed `config.seed + t`. For CODA prompts, set `weight_decay=0`: decay moves values that should be constant.

    Args:
        model: The model, newly wrapped; its labels are the classes of all tasks.
        tasks: The tasks in order.
        config: The settings of each task's training.
        loss: "local": cross-entropy among the classes of the present task, as if the head had no others; "seen": among
            those of all tasks so far.
        solver: "gradient": `fit` trains on each task. "closed_form": nothing but the head changes, which is solved anew
            from sums over the images of all tasks so far (see `fit_closed_form`): no earlier image is needed, nothing
            is forgotten, and no order of the tasks gives another head, but for the strength of its penalty, which the
            last task's images choose. A run that goes on reads the images of finished tasks again, for the sums.
        output_dir: The adapter folder, written anew after each task together with `continual.json`, which holds the
            result so far. If it holds an unfinished run with these settings, this goes on after the last task that was
            finished, to the same result as without the interruption.

    Returns:
        The accuracy matrix and what is computed from it.

    Raises:
        ConfigError: A setting is wrong, the method has no room for so many tasks, or `output_dir` holds another run.
        InputError: A label is not among its task's classes.
        CheckpointError: `output_dir` is damaged.
        BackboneMismatchError: `output_dir` holds a run on another backbone.
    """
    config = (config or TrainingConfig()).for_mode(model.task.masked)
    if config.output_dir is not None:
        raise ConfigError(
            "config: output_dir is for the checkpoints of one training; give fit_continual the folder itself"
        )
    if loss not in ("local", "seen"):
        raise ConfigError(f"loss: got {loss!r}, expected 'local' or 'seen'")
    if solver not in ("gradient", "closed_form"):
        raise ConfigError(f"solver: got {solver!r}, expected 'gradient' or 'closed_form'")
    head = model.task.require_head("fit_continual")
    if not isinstance(model.task.objective, SingleLabel):
        raise ConfigError(f"model: got a task of {model.task.problem_type}, expected one class an image")
    sums = FeatureSums(head) if solver == "closed_form" else None
    _check_classes(tasks, len(model.task.labels))
    tasks = [_checked(task, model, config) for task in tasks]
    if config.mixup_alpha or config.cutmix_alpha:
        raise ConfigError(
            "mixup_alpha, cutmix_alpha: they mix images of classes that the loss of a task tells apart; leave them out"
        )
    _rehearse(model, len(tasks))
    how = loss if solver == "gradient" else solver
    folder = None if output_dir is None else RunFolder(Path(output_dir), model, tasks, config, how)
    result = ContinualResult(
        classes=[list(task.classes) for task in tasks], eval_images=[len(task.eval_dataset) for task in tasks]
    )
    if folder is not None:
        result = folder.resume(model) or result
    if sums is not None:
        for task in tasks[: result.tasks_done]:
            sums.add(*read_features(model, task.train_dataset, config))
    for number in range(result.tasks_done, len(tasks)):
        _learn_task(model, tasks, number, config, loss, sums, result)
        if folder is not None:
            folder.save(model, result)
    return result


def _learn_task(
    model: TunedModel,
    tasks: Sequence[ContinualTask],
    number: int,
    config: TrainingConfig,
    loss: Literal["local", "seen"],
    sums: FeatureSums | None,
    result: ContinualResult,
) -> None:
    """Learn one task, test on all so far, and add that to the result."""
    start = time.perf_counter()
    config = replace(config, seed=config.seed + number)
    set_seed(config.seed)  # for what start_task draws
    start_task(model, number)
    seen = [each for task in tasks[: number + 1] for each in task.classes]
    if sums is None:
        loss_function = ClassCrossEntropy(
            tasks[number].classes if loss == "local" else seen, label_smoothing=config.label_smoothing_factor or 0.0
        )
        history = fit(model, tasks[number].train_dataset, config=config, compute_loss_func=loss_function).history
    else:
        features, labels = read_features(model, tasks[number].train_dataset, config)
        sums.add(features, labels)
        solved = solve_head(model.task.require_head("fit_continual"), sums, features, labels, model.task.objective)
        history = [{"loss": solved.loo_loss, "accuracy": solved.loo_score, "ridge": solved.ridge}]
    row = [evaluate(model, task.eval_dataset, config, classes=seen)["accuracy"] for task in tasks[: number + 1]]
    result.accuracy_matrix.append(row)
    result.histories.append(history)
    result.seconds += time.perf_counter() - start
    logger.info("task %d of %d: average accuracy %.4f, %s", number + 1, len(tasks), result.average_accuracy, row)


class ClassCrossEntropy:
    """Cross-entropy among some classes, as if the logits of all others were -inf; for `compute_loss_func` of `fit`.

    Args:
        classes: Indices of the classes; all labels are among them.
        label_smoothing: Share of the target that is spread over these classes.
    """

    def __init__(self, classes: Sequence[int], label_smoothing: float = 0.0) -> None:
        self._classes = torch.tensor(sorted(classes))
        self._smoothing = label_smoothing

    def __call__(self, outputs: ImageClassifierOutput, labels: Tensor) -> Tensor:
        """The mean loss of a batch."""
        assert outputs.logits is not None
        classes = self._classes.to(labels.device)
        places = torch.searchsorted(classes, labels)
        return cross_entropy(outputs.logits[:, classes], places, label_smoothing=self._smoothing)


def _rehearse(model: TunedModel, tasks: int) -> None:
    """Let copies of the adapters begin all tasks, so that an error comes now and not after hours."""
    for adapter in copy.deepcopy(list(model.task.adapters)):
        for number in range(tasks):
            adapter.start_task(number)


def _check_classes(tasks: Sequence[ContinualTask], labels: int) -> None:
    named = [each for task in tasks for each in task.classes]
    if not tasks or not all(task.classes for task in tasks):
        raise ConfigError(
            f"tasks: got {len(tasks)} tasks, of which one has no classes; expected one or more, with classes"
        )
    if twice := sorted({each for each in named if named.count(each) > 1}):
        raise ConfigError(f"tasks: the classes {twice} stand in them twice; each class belongs to one task")
    if outside := [each for each in named if not 0 <= each < labels]:
        raise ConfigError(
            f"tasks: got the classes {outside}, expected indices from 0 to {labels - 1}, the model's labels"
        )


def _checked(task: ContinualTask, model: TunedModel, config: TrainingConfig) -> ContinualTask:
    """The task, with data sets whose labels are its classes: checked now where that takes no image, else later."""
    train, evaluation = (_of_classes(each, task, model, config) for each in (task.train_dataset, task.eval_dataset))
    return replace(task, train_dataset=train, eval_dataset=evaluation)


def _of_classes(dataset: Any, task: ContinualTask, model: TunedModel, config: TrainingConfig) -> Any:
    if not isinstance(dataset, datasets.Dataset):
        return _CheckedLabels(dataset, task.classes, LabelReader(model.task.labels, class_names(dataset)))
    items = make_items(model, dataset, config)
    if isinstance(items, ImageDataset) or dataset.format["type"] != "custom":
        _check_labels(set(items.labels()), task.classes)
    return dataset


class _CheckedLabels(Dataset):
    """A data set of items that refuses labels of other classes."""

    def __init__(self, dataset: Any, classes: Sequence[int], reader: LabelReader) -> None:
        self._dataset = dataset
        self._classes = classes
        self._reader = reader

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        item = self._dataset[index]
        label = item.get("labels", item.get("label")) if isinstance(item, Mapping) else None
        if label is not None:
            _check_labels({self._reader(label, f"item {index}")}, self._classes)
        return item


def _check_labels(labels: set[int], classes: Sequence[int]) -> None:
    if others := sorted(labels.difference(classes, [IGNORED])):
        raise InputError(f"labels: got {others} in the data of the task of the classes {sorted(classes)}")
