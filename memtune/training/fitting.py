"""One training loop on Accelerate: a CPU, a GPU or many, by how the program is launched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size, set_seed

from ..backbones import Backbone
from ..errors import ConfigError, MemtuneError
from ..evaluation import MetricsFunction, check_metrics
from ..models import TunedModel
from ..preparation import TrainingConfig, borrowed_state, check_folders, make_accelerator, sharded
from ..storage import sized
from ..tasks import Objective, Regression, SingleLabel
from ..trunk_cache import check_cacheable
from .averaging import score_to_compare
from .callbacks import TrainingCallback
from .result import TrainingResult
from .run import LossFunction, TrainingRun

logger = logging.getLogger(__name__)


def fit(
    model: TunedModel,
    train_dataset: Any,
    eval_dataset: Any = None,
    config: TrainingConfig | None = None,
    *,
    compute_loss_func: LossFunction | None = None,
    compute_metrics: MetricsFunction | None = None,
    callbacks: Sequence[TrainingCallback] = (),
    resume_from_checkpoint: bool | str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> TrainingResult:
    """Train a model's adapter.

    Example:
        >>> model = memtune.wrap(backbone, memtune.MemoryConfig(4), labels=["cat", "dog"], processor=processor)
        >>> config = memtune.TrainingConfig(num_train_epochs=2, disable_tqdm=True)
        >>> result = memtune.fit(model, train_dataset, eval_dataset, config)
        >>> result.steps
        2

    Args:
        model: The model; it is left in evaluation mode, on the device it was trained on (with FSDP and with stage 3 of
            DeepSpeed's ZeRO where it was).
        train_dataset: A `datasets.Dataset` of images and labels, whose images go through the model's processor; or any
            indexable data set of `{"pixel_values": (channels, height, width), "labels": index}`, of pictures and
            labels, or of pairs of them (docs/data.md). Where it has names of classes (ClassLabel, texts, torchvision's
            `classes`), its labels are found among the model's by name. Images labelled -100 are left out. Of one that
            can only be iterated over the images of `max_steps` batches are read, undecoded, before the first step.
        eval_dataset: The same; evaluated after each epoch, or as `eval_strategy` says.
        config: The settings.
        compute_loss_func: The loss in training, `f(outputs, labels)`, in place of cross-entropy (of several classes an
            image binary cross-entropy, of numbers the squared error) with label smoothing and class weights; what the
            methods add to it is still added.
        compute_metrics: Makes further scores of all logits and labels of an evaluation, `f(EvalPrediction)`, as for
            transformers' Trainer; `metric_for_best_model` may name one.
        callbacks: What is to be done at each step.
        resume_from_checkpoint: A folder `checkpoint-<step>` to go on from, or True for the last one in
            `config.output_dir` (where there is none yet, the run starts at its beginning). On one process the run ends
            with the values that it would have had without the interruption, bit for bit on a CPU, if a data set of
            items gives the same one for the same index and epoch (told by `set_epoch`, where it has that). More epochs
            or steps than the run had are trained on; the learning rate is then that of the longer schedule.
        image_column: As in `TrainingConfig`.
        label_column: The same.

    Raises:
        InputError: A data set, an image or a label is wrong.
        MemtuneError: The run has diverged: a loss or a value is no number any more.
        ConfigError: The settings do not go together, or not with the checkpoint's run.
        CheckpointError: The checkpoint is missing or damaged.
    """
    config = (config or TrainingConfig()).with_columns(image_column, label_column)
    check_objective(model.task.objective, config, compute_metrics)
    config = config.for_mode(model.task.masked)
    _check(model, config, eval_dataset, resume_from_checkpoint)
    call = partial(
        _run,
        model,
        train_dataset,
        eval_dataset,
        compute_loss_func=compute_loss_func,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
        resume=resume_from_checkpoint or False,
    )
    return _with_room(call, model, config) if config.auto_find_batch_size else call(config)


def _run(
    model: TunedModel,
    train_dataset: Any,
    eval_dataset: Any,
    config: TrainingConfig,
    *,
    compute_loss_func: LossFunction | None,
    compute_metrics: MetricsFunction | None,
    callbacks: Sequence[TrainingCallback],
    resume: bool | str | Path,
) -> TrainingResult:
    """One run, with settings that have been checked."""
    set_seed(config.seed)
    with torch.inference_mode(False), torch.enable_grad(), borrowed_state():
        accelerator = make_accelerator(config, tracking=True)
        with sharded(accelerator, model) as trained:
            run = TrainingRun(accelerator, trained, config, compute_loss_func, callbacks, compute_metrics)
            try:
                run.prepare(train_dataset, eval_dataset, resume)
                _record_size(model, trained, run.image_size, config)
                run.train()
            finally:
                run.close()
        return run.result()


def _with_room(call: Callable[[TrainingConfig], TrainingResult], model: TunedModel, config: TrainingConfig) -> Any:
    """A run, begun anew with half as many images a pass, and twice as many passes a step, while memory is too small.

    Raises:
        MemtuneError: Not one image fits.
    """
    before = {key: tensor.clone() for key, tensor in model.task.tensors().items()}
    whole = config.per_device_train_batch_size * config.gradient_accumulation_steps

    def attempt(batch_size: int) -> TrainingResult:
        if batch_size < config.per_device_train_batch_size:
            logger.warning("out of memory: begun anew with per_device_train_batch_size=%d", batch_size)
            model.task.load_tensors(before)
        passes = max(1, round(whole / batch_size))
        return call(replace(config, per_device_train_batch_size=batch_size, gradient_accumulation_steps=passes))

    largest = config.per_device_train_batch_size
    halves = iter([largest >> times for times in range(1, largest.bit_length() + 1)])  # the last is 0
    find: Any = find_executable_batch_size(attempt, largest, reduce_batch_size_fn=lambda: next(halves))
    try:
        return find()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise MemtuneError("auto_find_batch_size: not even one image at a time fits into memory") from error


def _record_size(model: TunedModel, trained: TunedModel, size: tuple[int, int], config: TrainingConfig) -> None:
    """Let the size of the images travel with what is trained on them."""
    own = None if size == Backbone(model.backbone).image_size else size
    model.task.image_size = trained.task.image_size = own
    if config.image_size is not None and model.processor is not None:
        model.processor = trained.processor = sized(model.processor, config.image_size)


def _check(model: TunedModel, config: TrainingConfig, eval_dataset: Any, resume: Any) -> None:
    """Raise `ConfigError` if a setting needs what is not there."""
    check_folders(config)
    if config.trunk_cache is not None:
        check_cacheable(model)
    evaluates = eval_dataset is not None and config.eval_strategy != "no"
    if not evaluates and (config.load_best_model_at_end or config.early_stopping_patience):
        raise ConfigError(
            "load_best_model_at_end, early_stopping_patience: they go by evaluations; pass eval_dataset, and leave "
            "eval_strategy='no' out"
        )
    model.task.require_head("fit")
    model.require_adapter("fit")
    classes = len(model.task.labels)
    weights = config.class_weights
    if weights is not None and weights != "balanced" and len(weights) != classes:
        raise ConfigError(f"class_weights: got {len(weights)} weights, expected one for each of {classes}")
    if config.auto_find_batch_size and (resume or PartialState().num_processes > 1):
        what = "a run that goes on" if resume else "several processes"
        raise ConfigError(
            f"auto_find_batch_size: got it for {what}; set per_device_train_batch_size to what it found before, which "
            "the log has"
        )
    if resume and config.output_dir is None:
        raise ConfigError("resume_from_checkpoint: set output_dir, where the run's checkpoints are")


def check_objective(
    objective: Objective, config: TrainingConfig, compute_metrics: MetricsFunction | None = None
) -> None:
    """Raise `ConfigError` if a setting means nothing for what the labels are."""
    metric = score_to_compare(config, objective)
    if compute_metrics is None and metric not in objective.metrics:
        raise ConfigError(
            f"metric_for_best_model: got {config.metric_for_best_model!r}, expected one of {objective.metrics}, or one "
            "that compute_metrics gives"
        )
    check_metrics(objective)
    if isinstance(objective, SingleLabel):
        return
    if config.mixup_alpha or config.cutmix_alpha:
        raise ConfigError(f"mixup_alpha, cutmix_alpha: not for {objective.problem_type}; leave them out")
    if config.class_weights == "balanced" or config.balanced_sampling:
        raise ConfigError(
            f"class_weights='balanced', balanced_sampling: not for {objective.problem_type}; give numbers as "
            "class_weights, or leave them out"
        )
    if isinstance(objective, Regression) and (config.label_smoothing_factor or config.class_weights is not None):
        raise ConfigError("label_smoothing_factor, class_weights: numbers have no classes; leave them out")
