"""Class-incremental learning from the command line: `memtune continual`, and examples/continual.py."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..continual import ContinualResult, class_order, fit_continual, split_by_class
from ..data import load_folder
from ..errors import ConfigError
from ..methods import MemoryConfig, method_names, read_config
from ..models import TunedModel, wrap
from ..preparation import TrainingConfig, add_training_arguments, read_training_arguments
from ..tasks import RandomFeatures
from .common import begin, load_model

logger = logging.getLogger(__name__)

PAPER: dict[str, dict[str, float]] = {
    "coda_prompts": {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.0, "label_smoothing_factor": 0.0},
    "full": {"learning_rate": 5e-5, "weight_decay": 0.0, "label_smoothing_factor": 0.0},
}
"""Settings of the CODA paper for its method and its baseline, in place of TrainingConfig's."""

_BASELINES = ("head", "full", "closed_form")
_OF_ONE_RUN = ("output_dir", "early_stopping_patience", "load_best_model_at_end", "save_strategy", "save_steps")
_OF_ONE_RUN += ("save_total_limit", "image_column", "label_column")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a sequence of tasks to a parser."""
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, help="the backbone: a folder, or a model on the Hub")
    add("--method", default="coda_prompts", choices=[*_BASELINES, *method_names()], help="what is trained")
    add("--method_config", type=json.loads, default={}, help="settings of the method as JSON, as '{\"pool_size\": 50}'")
    add("--random_features", type=int, help="number of random features that the head reads in place of the feature")
    add("--masked", action="store_true", help="train in the task stream; the backbone's own answer stays as it is")
    add("--attn_implementation", help="the backbone's attention kernel: sdpa, eager, flash_attention_2 ...")
    add = parser.add_argument_group("sequence").add_argument
    add("--data_dir", required=True, help="a folder with train/ and test/, each with a folder of images for each class")
    add("--tasks", type=int, default=10, help="number of tasks that the classes are split over")
    add("--class_order_seed", type=int, default=0, help="order of the classes; 0 for the natural one")
    words = "classes in the cross-entropy: the task's, or all so far"
    add("--loss", default="local", choices=["local", "seen"], help=words)
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", required=True, help="where the adapter and the results go")
    group.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    add_training_arguments(group, leave_out=_OF_ONE_RUN, warmup_ratio=None)


def run(args: argparse.Namespace, command: Sequence[str]) -> ContinualResult | None:
    """Learn one task after the other as the arguments say.

    Args:
        args: The arguments.
        command: The command line, to be recorded.

    Returns:
        What was measured; None in processes that are not the main one.

    Raises:
        MemtuneError: A setting, a data set or the folder is wrong.
    """
    if args.method == "full" and args.masked:
        raise ConfigError("--method full: it trains the backbone, which --masked leaves as it is")
    state = begin(cpu=args.cpu)
    with state.main_process_first():
        train, evaluation = (load_folder(Path(args.data_dir, split)) for split in ("train", "test"))
    labels = train.features["label"].names
    tasks = split_by_class(train, evaluation, args.tasks, class_order(len(labels), args.class_order_seed))
    logger.info("%d tasks, %d images to train on, %d to test on", len(tasks), len(train), len(evaluation))
    set_seed(args.seed)
    model = _build_model(args, labels)
    output = Path(args.output_dir)
    result = fit_continual(
        model,
        tasks,
        _training(args),
        loss=args.loss,
        solver="closed_form" if args.method == "closed_form" else "gradient",
        output_dir=None if args.method == "full" else output,
    )
    if not state.is_main_process:
        return None
    output.mkdir(parents=True, exist_ok=True)
    summary = {
        **result.metrics(),
        **result.to_dict(),
        "trainable_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "command": " ".join(command),
        "torch": torch.__version__,
    }
    (output / "all_results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    result.plot(output / "accuracy.png")
    return result


def describe(result: ContinualResult) -> str:
    """What a person is told at the end."""
    return "\n".join(f"{name:25} {100 * value:6.2f} %" for name, value in result.metrics().items())


def _build_model(args: argparse.Namespace, labels: list[str]) -> TunedModel:
    backbone, processor = load_model(args.model_name_or_path, args.attn_implementation)
    if args.method in _BASELINES:
        config: Any = MemoryConfig(tokens=0, class_token=False)
    else:
        sequence = {"num_tasks": args.tasks} if args.method == "coda_prompts" else {}
        config = read_config({"method": args.method} | sequence | args.method_config)
    head: Any = "linear" if args.random_features is None else RandomFeatures(args.random_features)
    model = wrap(backbone, config, labels=labels, head=head, masked=args.masked, processor=processor)
    if args.method == "full":
        backbone.requires_grad_(True)
    return model


def _training(args: argparse.Namespace) -> TrainingConfig:
    """The settings that were given, the paper's where none was, or those of the mode."""
    paper: dict[str, Any] = {each.name: each.default for each in fields(TrainingConfig)} | PAPER.get(args.method, {})
    missing = {name: paper[name] for name in PAPER["coda_prompts"] if getattr(args, name) is None}
    return read_training_arguments(args, output_dir=None, **missing)
