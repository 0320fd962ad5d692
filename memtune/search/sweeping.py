"""Search for settings by VTAB-1k's protocol, on Optuna.

Each setting is trained on one part of the training images and measured on the rest; the best is trained on all of them,
with several seeds, and measured once on the test images (https://arxiv.org/abs/1910.04867, section 3: 800, 200 and
1,000 images).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, set_seed
from transformers import PreTrainedModel

from ..backbones import Backbone, fingerprint
from ..data import as_items, class_names, digest, held_out, select
from ..drawing import new_figure
from ..errors import ConfigError, MemtuneError
from ..evaluation import evaluate
from ..methods import AdapterConfig, as_config
from ..models import TunedModel, wrap
from ..preparation import TrainingConfig, make_accelerator, make_augmentation, make_mixing
from ..tasks import IGNORED, check_label_names, find_objective
from ..training import check_objective, describe_run, fit, is_better_greater, score_to_compare
from ..trunk_cache import check_cacheable
from .folder import Sampler, SweepFolder, digest_of_numbers
from .result import FinalRun, SweepResult
from .space import Space, find_optuna

logger = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")


def sweep(
    backbone: PreTrainedModel,
    config: AdapterConfig | Sequence[AdapterConfig],
    space: Mapping[str, Any],
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    output_dir: str | Path,
    training: TrainingConfig | None = None,
    n_trials: int = 20,
    seeds: Sequence[int] = (0, 1, 2),
    validation: float | Sequence[int] = 0.2,
    labels: Sequence[str] | None = None,
    masked: bool = False,
    problem_type: str | None = None,
    processor: Any = None,
    sampler: Sampler = None,
) -> SweepResult:
    """Search for settings, then train the best on all training images and measure it on the test images.

    Trials are compared by a score on images that are held out, and all have the seed `training.seed`. The score is
    `training.metric_for_best_model`; by default the accuracy, the mean average precision of several classes an image,
    or R2 of numbers. With `training.trunk_cache`, in masked mode, the trunk is computed once for all of them.

    Example:
        >>> result = memtune.sweep(
        ...     backbone,
        ...     memtune.MemoryConfig(4),
        ...     {"learning_rate": [1e-3, 1e-2]},
        ...     train_dataset,
        ...     output_dir="search",
        ...     training=memtune.TrainingConfig(max_steps=2, disable_tqdm=True),
        ...     n_trials=2,
        ...     seeds=(),
        ...     processor=processor,
        ... )
        >>> best = result.best.values

    Args:
        backbone: The model; it is as it was afterwards.
        config: The method's settings, or one for each of several methods, as `wrap` takes them.
        space: What is searched: "learning_rate" and other settings of `TrainingConfig`
            (`memtune.sweep_space.TRAINING_SETTINGS`), "memory.tokens" for a setting of a method. Each has one of
            Optuna's distributions, a list of choices, or a tuple (low, high).
        train_dataset: The training images, as `fit` takes them.
        eval_dataset: The test images; nothing is chosen by them.
        output_dir: The folder of the search (docs/sweep.md). If it holds this search already, it goes on where it was
            stopped.
        training: The settings that are not searched.
        n_trials: Settings to try in all, those in the folder included.
        seeds: Of the final runs; their adapters are saved as `seed-<n>`.
        validation: Share of the training images that is held out, by class; or the places of these images.
        labels: Names of the classes; by default those of the data set.
        masked: Train in the task stream.
        problem_type: What the labels of an image are, as `wrap` takes it.
        processor: The image processor.
        sampler: A sampler of Optuna, or a function of the keyword `seed` that gives one (such as a sampler's class),
            which is called for each trial. By default `optuna.samplers.TPESampler`.

    Raises:
        ConfigError: A setting is wrong, or `output_dir` holds another search. Nothing has been trained.
        InputError: A data set is wrong.
        BackboneMismatchError: `output_dir` holds a search on another backbone.
        CheckpointError: `output_dir` is damaged.
        MemtuneError: Optuna or matplotlib is not installed, or as many settings as `n_trials` could not be trained:
            a setting that diverges or for which there is not enough memory on a device is left out.
    """
    find_optuna()
    new_figure()  # both are asked for now, and not after hours
    training = (training or TrainingConfig()).for_mode(masked)
    objective = find_objective(problem_type)
    metric = score_to_compare(training, objective)
    check_objective(objective, training)
    _check_counts(n_trials, seeds)
    several = config if isinstance(config, Sequence) and not isinstance(config, str) else [config]
    chosen = Space(space, training, [as_config(each) for each in several])
    names = labels if labels is not None else class_names(train_dataset, training.label_column)
    columns = {"image_column": training.image_column, "label_column": training.label_column}
    options = {"channels": Backbone(backbone).channels, "objective": objective, **columns}
    items = as_items(train_dataset, processor, None, "skip", labels=names, **options)
    classes = items.labels()
    names = check_label_names(names, None if names is not None else _count(classes))
    _check_training(training, len(names))
    places = held_out(classes, validation, training.seed)
    wrapping = {"labels": names, "masked": masked, "problem_type": problem_type, "processor": processor}
    runs = _Runs(backbone, chosen, metric, wrapping)
    settings = runs.rehearse() | {
        "space": chosen.to_dict(),
        "validation_images": len(places),
        "validation": digest_of_numbers(places),
        "train_images": len(classes),
        "train_data": [digest_of_numbers(classes), digest(items)],
        "transform": items.transform(),
        "eval_images": None if eval_dataset is None else len(eval_dataset),
        "eval_data": None
        if eval_dataset is None
        else digest(as_items(eval_dataset, processor, None, "skip", labels=names, **options)),
        "dtype": str(backbone.dtype),
    }
    make_accelerator(training)  # which finds the other processes, where there are some
    path, weights = Path(output_dir), fingerprint(Backbone(backbone))
    greater = is_better_greater(metric, training.greater_is_better)
    comparing = {"metric": metric, "greater_is_better": greater}
    search = _Search(
        runs, path, lambda: SweepFolder(path, chosen, settings, weights, sampler, training.seed, **comparing)
    )
    try:
        search.try_settings(train_dataset, places, n_trials, training.seed)
        return search.train_best(train_dataset, eval_dataset, seeds)
    finally:
        search.close()


class _Runs:
    """Trains settings on one backbone.

    Args:
        backbone: The model.
        space: What is searched.
        metric: The score that they are compared by.
        options: Further ones of `wrap`.
    """

    def __init__(self, backbone: PreTrainedModel, space: Space, metric: str, options: dict[str, Any]) -> None:
        self._backbone = backbone
        self._space = space
        self._metric = metric
        self._options = options

    def rehearse(self) -> dict[str, Any]:
        """Make a model of each extreme of the space, so that what does not fit the backbone is known now.

        Returns:
            The settings that are not searched, as JSON values.
        """
        settings = {}
        for values in ({}, *self._space.extremes()):
            training, configs = self._space.settings(values)
            try:
                model = wrap(self._backbone, configs, **self._options)
            except MemtuneError as error:
                raise type(error)(f"space: with {values}: {error}" if values else str(error)) from error
            try:
                if training.trunk_cache is not None:
                    check_cacheable(model)
                make_augmentation(training)
                make_mixing(training, len(model.task.labels))
                settings = settings or describe_run(model, training)
            finally:
                model.detach()
        return settings

    def run(
        self, values: Mapping[str, Any], seed: int, train: Any, test: Any, folder: Path | None = None
    ) -> dict[str, float]:
        """Train a setting and measure it: its `score` and `loss` (nothing without test images), and `seconds`."""
        start = time.perf_counter()
        training, configs = self._space.settings(values)
        training = dataclasses.replace(training, seed=seed)
        set_seed(seed)  # for what the adapters start with
        model = wrap(self._backbone, configs, **self._options)
        try:
            fit(model, train, config=training)
            scores = {} if test is None else evaluate(model, test, training)
            if folder is not None:
                _save(model, folder, scores, training)
        finally:
            model.detach()
        kept = {"score": scores[self._metric], "loss": scores["loss"]} if scores else {}
        return {**kept, "seconds": time.perf_counter() - start}


class _Search:
    """A search in its folder, which the main process alone reads and writes."""

    def __init__(self, runs: _Runs, path: Path, open_folder: Callable[[], SweepFolder]) -> None:
        self._runs = runs
        self._path = path
        self._folder: Any = None
        self._folder = _from_main(open_folder, share=False)

    def close(self) -> None:
        """Let other processes work on the folder."""
        if self._folder is not None:
            self._folder.close()

    def try_settings(self, dataset: Any, places: Sequence[int], n_trials: int, seed: int) -> None:
        """Run trials until there are enough."""
        held = set(places)
        train = select(dataset, [place for place in range(len(dataset)) if place not in held])
        validation = select(dataset, places)
        while (values := _from_main(lambda: self._folder.ask(n_trials))) is not None:
            trials = _from_main(lambda: self._folder.result().trials)
            same = next((each for each in trials if each.values == values), None)
            if same is None:
                try:
                    scores: dict[str, Any] = self._runs.run(values, seed, train, validation)
                except (MemtuneError, torch.OutOfMemoryError) as error:
                    self._give_up(values, error, n_trials)
                    continue
            else:  # the seed is the same, so the outcome would be
                first = same.number if same.same_as is None else same.same_as
                scores = {"score": same.score, "loss": same.loss, "seconds": 0.0, "same_as": first}
            _from_main(lambda scores=scores: self._keep_trial(scores))
            logger.info("trial %d of %d: score %.4f with %s", len(trials) + 1, n_trials, scores["score"], values)

    def _give_up(self, values: Mapping[str, Any], error: Exception, most: int) -> None:
        """Go on after a setting that cannot be trained, unless as many as there are trials cannot."""
        logger.warning("a setting is left out, as it cannot be trained: %s: %s", values, error)
        if _from_main(lambda: self._folder.give_up()) >= most:  # noqa: PLW0108 - only the main process has a folder
            raise MemtuneError(f"{most} settings could not be trained; the last was {dict(values)}: {error}") from error

    def train_best(self, train: Any, test: Any, seeds: Sequence[int]) -> SweepResult:
        """Run the best setting with each seed that it has not been run with, and give the result."""
        result = _from_main(lambda: self._folder.result())  # noqa: PLW0108 - only the main process has a folder
        done = {run.seed for run in result.finals}
        for seed in seeds:
            if seed in done:
                continue
            scores = self._runs.run(result.best.values, seed, train, test, self._path / f"seed-{seed}")
            run = FinalRun(seed, **scores)
            _from_main(lambda run=run: self._folder.add_final(result.best.values, run))
            logger.info("seed %d: %s", seed, scores)
        result = _from_main(lambda: self._folder.result())  # noqa: PLW0108 - only the main process has a folder
        result.finals = [run for seed in seeds for run in result.finals if run.seed == seed]
        _from_main(lambda: self._folder.write(result, picture=True))
        return result

    def _keep_trial(self, scores: Mapping[str, Any]) -> None:
        self._folder.tell(**scores)
        self._folder.write(self._folder.result())


def _from_main(make: Callable[[], ValueT], *, share: bool = True) -> ValueT:
    """What a function gives in the main process, in every process (None in the others unless `share`).

    An error of memtune is raised in all of them, so that none waits for one that has gone.
    """
    state = PartialState()
    box: list[Any] = [None, None]
    if state.is_main_process:
        try:
            box[0] = make()
        except MemtuneError as error:
            box[1] = error
    if state.num_processes > 1:
        shared = [box[0] if share else None, box[1]]
        broadcast_object_list(shared)
        box = box if state.is_main_process else shared
    if box[1] is not None:
        raise box[1]
    return box[0]


def _save(model: TunedModel, folder: Path, scores: Mapping[str, float], training: TrainingConfig) -> None:
    state = PartialState()
    results = {name: value for name, value in scores.items() if name not in ("loss", "samples")}
    model.save_pretrained(folder, results=results, training=training, is_main_process=state.is_main_process)
    state.wait_for_everyone()


def _check_counts(n_trials: Any, seeds: Any) -> None:
    if type(n_trials) is not int or n_trials < 1:
        raise ConfigError(f"n_trials: got {n_trials!r}, expected a whole number, 1 or more")
    numbers = isinstance(seeds, Sequence) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not numbers or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: got {seeds!r}, expected different whole numbers, 0 or more, or none: ()")


def _count(labels: Sequence[Any]) -> int:
    """How many outputs a head has for labels without names."""
    first = next((label for label in labels if label != IGNORED), 0)
    if isinstance(first, Sequence):
        return len(first)
    return max(labels) + 1


def _check_training(training: TrainingConfig, classes: int) -> None:
    """Raise for settings that mean one run, or that choose by the evaluation after each epoch, which runs here lack."""
    for name, neutral in (("output_dir", None), ("early_stopping_patience", None), ("load_best_model_at_end", False)):
        if (value := getattr(training, name)) != neutral:
            raise ConfigError(f"training: got {name}={value!r}, which a search cannot have; leave it out")
    weights = training.class_weights
    if weights is not None and weights != "balanced" and len(weights) != classes:
        raise ConfigError(f"training: got {len(weights)} class_weights, expected one for each of {classes} classes")
