"""One run of training: what Accelerate has prepared of it, how far it has come, and the loop over its steps."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from tqdm.auto import tqdm
from transformers.modeling_outputs import ImageClassifierOutput

from ..backbones import Backbone, fingerprint
from ..data import Items, digest, is_stream, take
from ..errors import CheckpointError, InputError, MemtuneError
from ..evaluation import MetricsFunction, measure, run_batch
from ..models import TunedModel
from ..preparation import (
    TrainingConfig,
    average_gradients,
    check_items,
    is_sharding,
    make_augmentation,
    make_items,
    make_loader,
    make_mixing,
    release,
    shard,
    whole,
)
from ..tasks import IGNORED
from .averaging import BestValues, MovingAverage, score_to_compare
from .callbacks import TrainingCallback
from .checkpoint import RunCheckpoints, check_optimizer, is_like
from .optimization import class_weights, make_optimizer, make_schedule, plain_loss
from .result import Progress, TrainingResult
from .run_settings import describe_run

logger = logging.getLogger(__name__)

LossFunction: TypeAlias = Callable[[ImageClassifierOutput, Tensor], Tensor]
"""The mean loss of a batch from the model's output, whose logits are float32, and the labels (batch,)."""


class TrainingRun:
    """One call of `fit`.

    Args:
        accelerator: Newly made for this run.
        model: The model.
        config: The settings, those of its mode filled in.
        compute_loss: The loss; None for the objective's, with the smoothing and the weights of the settings.
        callbacks: What is to be done at each step.
        compute_metrics: What makes further scores of an evaluation.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: TunedModel,
        config: TrainingConfig,
        compute_loss: LossFunction | None,
        callbacks: Sequence[TrainingCallback],
        compute_metrics: MetricsFunction | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.progress = Progress()
        self._tuned = model
        self._whole = partial(whole, accelerator, model.task)
        self._given_loss = compute_loss
        self._weights: Tensor | None = None
        self._gradient_norm: Any = None
        self._callbacks = callbacks
        self._begun: list[TrainingCallback] = []
        self._compute_metrics = compute_metrics
        self._objective = model.task.objective
        metric = score_to_compare(config, self._objective)
        self._best = BestValues(metric, greater_is_better=config.greater_is_better)
        self._average = None if config.ema_decay is None else MovingAverage(model.task, config.ema_decay)
        self._augmentation = make_augmentation(config)
        self._mixing = make_mixing(config, len(model.task.labels))
        self._checkpoints: RunCheckpoints | None = None
        self._bar = tqdm(disable=True)
        self._stopped = False
        self._clock = time.perf_counter()

    def prepare(self, train_dataset: Any, eval_dataset: Any, resume: bool | str | Path) -> None:
        """Make loaders, optimizer and schedule, and go on from a checkpoint if there is one to go on from."""
        config, accelerator, tuned = self.config, self.accelerator, self._tuned
        if is_stream(train_dataset):
            train_dataset = take(train_dataset, self._items_of_stream())
        train_items = make_items(tuned, train_dataset, config, self._augmentation)
        self.image_size = check_items(tuned, train_items, config)
        without = eval_dataset is None or config.eval_strategy == "no"
        eval_items = None if without else make_items(tuned, eval_dataset, config)
        if eval_items is not None:
            check_items(tuned, eval_items, config)
        self._weights = class_weights(config, train_items, len(tuned.task.labels), accelerator.device)
        weights = fingerprint(Backbone(tuned.backbone))  # now, while they are whole
        self._order = torch.Generator().manual_seed(config.seed)
        self.progress.order = self._order.get_state()
        evaluation = None if eval_items is None else make_loader(tuned, eval_items, config, accelerator)
        loader = make_loader(tuned, train_items, config, accelerator, order=self._order, augment=self._augmentation)
        shard(accelerator, tuned)
        prepared = accelerator.prepare(tuned, make_optimizer(tuned, config), loader)
        self.model, self._optimizer, self._loader = prepared
        self._eval_loader = None if evaluation is None else accelerator.prepare(evaluation)
        self.steps = _total_steps(len(self._loader), config)
        self._schedule = make_schedule(self._optimizer, config, self.steps)
        for callback in self._callbacks:
            callback.on_train_begin(tuned)
            self._begun.append(callback)
        if config.output_dir is not None and (resume or config.save_strategy != "no"):
            self._open_checkpoints(config.output_dir, train_items, weights, resume)
        if accelerator.log_with:
            plain = {each.name: getattr(config, each.name) for each in fields(config)}
            kept = {name: value for name, value in plain.items() if isinstance(value, (bool, int, float, str))}
            accelerator.init_trackers("memtune", config=kept)
        quiet = config.disable_tqdm or not accelerator.is_main_process
        # Not smoothed, so that the time left counts what evaluations and checkpoints take.
        self._bar = tqdm(total=self.steps, initial=self.progress.step, smoothing=0, disable=quiet, unit="step")
        seconds = self.progress.seconds
        self._count_time()
        self.progress.seconds = seconds  # what came before is of the run, but not of its first epoch

    def _items_of_stream(self) -> int:
        """How many items of a data set that can only be iterated over a run reads.

        Raises:
            InputError: Nothing says how many.
        """
        config = self.config
        if config.max_steps <= 0:
            raise InputError(
                "got a data set that can only be iterated over, whose length is unknown; set max_steps, of whose "
                "batches it is read, or pass a data set with a length"
            )
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return config.max_steps * batch * self.accelerator.num_processes

    def _open_checkpoints(self, folder: str | Path, items: Items, weights: Any, resume: bool | str | Path) -> None:
        settings = describe_run(
            self._tuned,
            self.config,
            backbone=weights,
            train_images=len(items),
            train_data=digest(items),
            transform=items.transform(),
            processes=self.accelerator.num_processes,
        )
        self._checkpoints = RunCheckpoints(folder, self.accelerator, settings, self.config.save_total_limit)
        place = self._checkpoints.find(resume)
        if place is None:
            self._checkpoints.set_aside()
            return
        in_parts = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        state = self._checkpoints.read(place, None if in_parts else self._tuned.task.state_dict(prefix="task."))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in trained]
        try:
            progress = Progress.from_state(state.get("progress"))
            if progress.step > self.steps or progress.batches > len(self._loader):
                raise CheckpointError(
                    f"it is at step {progress.step:,} and batch {progress.batches:,}, of {self.steps:,} and "
                    f"{len(self._loader):,}"
                )
            self._restore(place, state)
            fresh = self._optimizer.state_dict()
            self._checkpoints.load(place)
            if not in_parts:
                check_optimizer(self._optimizer, fresh["param_groups"])
        except Exception as error:  # of every kind, by what is wrong with which file
            with torch.no_grad():
                for parameter, values in zip(trained, before, strict=True):
                    parameter.copy_(values)
            why = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {str(error)[:200]}"
            raise CheckpointError(f"{place} is damaged: {why}; delete it, and go on from an earlier one") from error
        self.progress = progress
        if not self.accelerator.is_main_process:  # whose sums are those of all processes now
            self.progress.sums, self.progress.log_sums = torch.zeros(3), torch.zeros(3)

    def _restore(self, place: Path, state: dict[str, Any]) -> None:
        """Bring what Accelerate does not know of to where a checkpoint is."""
        if not is_like(state.get("schedule"), self._schedule.state_dict()):
            raise CheckpointError(f"the schedule's state is {str(state.get('schedule'))[:200]}")
        for name, part in self._parts().items():
            if name not in state and name.startswith("callback_"):
                logger.warning("%s: the run had no %s, which starts anew", place, type(part).__name__)
            else:
                part.load_state_dict(state[name])
        with self._whole():
            if self._best.tensors is not None:
                self._tuned.task.check_tensors(self._best.tensors)

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own beside the progress and what Accelerate saves."""
        parts: dict[str, Any] = {"schedule": self._schedule, "best": self._best}
        parts |= {f"callback_{number}": callback for number, callback in enumerate(self._callbacks)}
        return parts if self._average is None else parts | {"average": self._average}

    def train(self) -> None:
        """Train until the steps are done, or evaluations get no better; the model then has the values to keep."""
        while not self._is_over():
            self.model.train()
            self._train_epoch()
        task = self._tuned.task
        with self._whole():
            self._check_finite(torch.stack([tensor.float().sum() for tensor in task.tensors().values()]), "values")
            if self.config.load_best_model_at_end and self._best.tensors is not None:
                task.load_tensors(self._best.tensors)
            elif self._average is not None and self.progress.step:
                task.load_tensors(self._average.tensors())

    def _is_over(self) -> bool:
        """Whether the steps are done, evaluations got no better, or a callback wants the run to stop."""
        patience = self.config.early_stopping_patience
        waited = patience is not None and self._best.waited >= patience
        return self.progress.step >= self.steps or waited or self._stopped

    def _train_epoch(self) -> None:
        """Train until the data or the steps end, evaluate, and write it down."""
        for batch in self._batches():
            self._train_batch(batch)
            self.progress.batches += 1
            if self.accelerator.sync_gradients:
                self._end_step()
                if self._is_over():
                    break
        self._end_epoch()
        if {"epoch": True, "steps": self._is_over(), "no": False}[self.config.save_strategy]:
            self._save()

    def _batches(self) -> Iterable[dict[str, Any]]:
        """The batches of the present epoch that are not done yet."""
        self._order.set_state(self.progress.order)
        self._loader.iteration = len(self.progress.history)  # the epoch, of which Accelerate tells the data set
        done = self.progress.batches
        return self.accelerator.skip_first_batches(self._loader, done) if done else self._loader

    def _train_batch(self, batch: dict[str, Any]) -> None:
        """Forward and backward over one batch, and the optimizer's step when enough of them have come."""
        if self.accelerator.step % self.config.gradient_accumulation_steps == 0:
            self._call("on_step_begin")
        kept = self._objective.kept(batch["labels"])
        count = kept.sum()
        if self._mixing is not None and count:
            batch = {name: batch[name][kept] for name in ("pixel_values", "labels")}
            batch["pixel_values"], batch["labels"] = self._mixing(batch["pixel_values"], batch["labels"])
        with self.accelerator.accumulate(self.model):
            outputs = run_batch(self.model, batch, self.config)
            assert outputs.logits is not None
            # Of a batch without a label the mean is none, but other processes wait for its gradients.
            loss = self._loss(outputs, batch["labels"]) if count else outputs.logits.sum() * 0
            if (penalty := self._tuned.task.penalty()) is not None:
                loss = loss + penalty
            self._check_finite(loss.detach(), "loss")
            self.accelerator.backward(loss * self._group_scale())
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if self.accelerator.sync_gradients and is_sharding(self.accelerator):
                average_gradients(self.accelerator, trained)
            if self.accelerator.sync_gradients and self.config.max_grad_norm:
                self._gradient_norm = self.accelerator.clip_grad_norm_(trained, self.config.max_grad_norm)
            self._optimizer.step()
            self._optimizer.zero_grad()
        plain = self._objective.loss(outputs.logits.detach(), batch["labels"]) if count else loss.detach() * 0
        added = torch.stack([loss.detach().float() * count, count.float(), plain.float() * count])
        progress = self.progress
        progress.sums = progress.sums.to(loss.device) + added
        progress.log_sums = progress.log_sums.to(loss.device) + added

    def _loss(self, outputs: ImageClassifierOutput, labels: Tensor) -> Tensor:
        """The mean loss of a batch, without what the methods add."""
        if self._given_loss is not None:
            return self._given_loss(outputs, labels)
        assert outputs.logits is not None
        return plain_loss(self._objective, outputs.logits, labels, self.config, self._weights)

    def _group_scale(self) -> float:
        """What makes a batch's loss count as one of those of its step: the last step of an epoch may have fewer."""
        wanted, batches = self.config.gradient_accumulation_steps, len(self._loader)
        first = self.progress.batches - self.progress.batches % wanted
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED  # which counts on, over epochs
        return 1.0 if deepspeed else wanted / min(wanted, batches - first)

    def _check_finite(self, values: Tensor, what: str) -> None:
        """Raise `MemtuneError` if a run has diverged."""
        if not values.isfinite().all():
            raise MemtuneError(
                f"step {self.progress.step + 1}: the {what} of the run is no number any more: it has diverged, and is "
                f"stopped. Lower learning_rate (it is {self._learning_rate():.3g} at this step), set max_grad_norm to "
                "1, raise warmup_ratio, or look for images whose values are not finite"
            )

    def _end_step(self) -> None:
        progress = self.progress
        if not self._optimizer.step_was_skipped:
            self._schedule.step()
            if self._average is not None:
                with self._whole():
                    self._average.update(self._tuned.task)
        progress.step += 1
        self._call("on_step_end")
        self._bar.update()
        if progress.step % self.config.logging_steps == 0:
            self._log_step()
        self._stopped = self._is_asked_to_stop()
        config = self.config
        if config.eval_strategy == "steps" and (progress.step % config.eval_steps == 0 or self._is_over()):
            scores = self._evaluate()
            if scores:
                self._enter({"step": progress.step, "epoch": self._epoch()} | scores)
        # The last step is saved after the epoch.
        if config.save_strategy == "steps" and progress.step % config.save_steps == 0 and not self._is_over():
            self._save()

    def _is_asked_to_stop(self) -> bool:
        """Whether a callback of any process wants the run to stop."""
        asked = any(getattr(callback, "should_training_stop", False) for callback in self._begun)
        if not self._begun or self.accelerator.num_processes == 1:
            return asked
        total: Any = self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device))
        return bool(total > 0)

    def _evaluate(self) -> dict[str, float]:
        """Measure the present values, or their average: the scores as `eval_...`; nothing without an evaluation."""
        if self._eval_loader is None:
            return {}
        task = self._tuned.task
        with nullcontext() if self._average is None else self._average.in_place(task, self._whole):
            scores = measure(
                self.accelerator,
                self.model,
                self._eval_loader,
                self.config,
                self._objective,
                compute_metrics=self._compute_metrics,
            )
            with self._whole():
                self._best.update(scores, task)
        self._call("on_evaluate", scores)
        self.model.train()
        return {f"eval_{name}": value for name, value in scores.items()}

    def _epoch(self) -> float:
        return len(self.progress.history) + self.progress.batches / len(self._loader)

    def _log_step(self) -> None:
        progress = self.progress
        loss, images, _ = self._reduce(progress.log_sums)
        progress.log_sums = torch.zeros(3)
        entry = {
            "step": progress.step,
            "epoch": self._epoch(),
            "loss": loss / max(images, 1),
            "learning_rate": self._learning_rate(),
        }
        if self._gradient_norm is not None:
            entry["grad_norm"] = float(self._gradient_norm)
        self._enter(entry)
        self._bar.set_postfix({"epoch": f"{entry['epoch']:.2f}", "loss": f"{entry['loss']:.4g}"})
        self._call("on_log", entry)

    def _enter(self, entry: dict[str, float]) -> None:
        """Put an entry into the log, and into the trackers."""
        self.progress.log_history.append(entry)
        self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=self.progress.step)

    def _end_epoch(self) -> None:
        progress = self.progress
        loss, images, plain = self._reduce(progress.sums)
        if not images:
            raise InputError(f"no image of the epoch has a label to learn: all are skipped, or labelled {IGNORED}")
        self._count_time()
        entry = {
            "epoch": len(progress.history) + 1.0,
            "loss": loss / images,
            "task_loss": plain / images,
            "learning_rate": self._learning_rate(),
        }
        entry |= {"seconds": progress.seconds, "images_per_second": images / progress.seconds}
        if self.config.eval_strategy == "epoch":
            entry |= self._evaluate()
        entry["peak_memory_gb"] = _peak_memory(self.accelerator.device) / 1e9
        progress.history.append(entry)
        self._count_time()
        progress.batches, progress.seconds, progress.sums = 0, 0.0, torch.zeros(3)
        progress.order = self._order.get_state()
        self.accelerator.log(entry, step=progress.step)
        logger.info("%s", entry)
        self._call("on_epoch_end", entry)
        self._stopped = self._stopped or self._is_asked_to_stop()

    def _reduce(self, sums: Tensor) -> list[float]:
        """The sums of all processes: of losses, of images, and of losses as evaluations measure them."""
        reduced: Any = self.accelerator.reduce(sums.to(self.accelerator.device))
        return reduced.tolist()

    def _learning_rate(self) -> float:
        """The highest of the present learning rates."""
        return max(float(rate) for rate in self._schedule.get_last_lr())

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self.progress.all_seconds += now - self._clock
        self._clock = now

    def _save(self) -> None:
        """Write a checkpoint, where checkpoints are wanted."""
        if self._checkpoints is None:
            return
        self._count_time()
        sums = {name: torch.tensor(self._reduce(getattr(self.progress, name))) for name in ("sums", "log_sums")}
        state = {name: part.state_dict() for name, part in self._parts().items()}
        self._checkpoints.save(self.progress.step, state | {"progress": vars(self.progress) | sums})

    def _call(self, event: str, *values: Any) -> None:
        for callback in self._begun:
            getattr(callback, event)(self._tuned, *values)

    def result(self) -> TrainingResult:
        """What the run did so far."""
        result = self.progress.result()
        if self.config.load_best_model_at_end and self._best.scores:
            return replace(result, scores=dict(self._best.scores))
        evaluated = [each for each in (*result.history, *result.log_history) if any(map(_is_score, each))]
        last = evaluated[-1] if evaluated else {}
        scores = {name.removeprefix("eval_"): value for name, value in last.items() if _is_score(name)}
        return replace(result, scores=scores)

    def close(self) -> None:
        """End trackers and callbacks, and take off the model what Accelerate put on it."""
        self._count_time()
        self._bar.close()
        self._call("on_train_end")
        if self.accelerator.log_with:
            self.accelerator.end_training()
        release(self.accelerator, self._tuned)
        self._tuned.eval()


def _is_score(name: str) -> bool:
    return name.startswith("eval_")


def _total_steps(batches: int, config: TrainingConfig) -> int:
    an_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    return config.max_steps if config.max_steps > 0 else math.ceil(an_epoch * config.num_train_epochs)


def _peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what torch took there at most, else what this process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        memory: Any = psutil.Process().memory_info()
        return memory.peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
