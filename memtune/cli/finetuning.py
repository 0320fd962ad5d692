"""Fine-tuning an adapter from the command line: `memtune finetune`, and `accelerate launch examples/finetune.py`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import set_seed

from ..backbones import Backbone
from ..data import class_names, find_columns, held_out, load_folder, load_splits, make_reader
from ..errors import ConfigError, InputError
from ..evaluation import evaluate, inspect_data
from ..methods import AdapterConfig, MemoryConfig, method_names, read_config
from ..models import TunedModel, wrap
from ..preparation import add_training_arguments, read_training_arguments
from ..tasks import SingleLabel, find_objective
from ..training import fit
from .common import add_problem_type, begin, label_names, load_model

logger = logging.getLogger(__name__)

RESULTS_NAME = "all_results.json"

_LOOKED_AT = 10_000
"""Images of each part that are looked at before training."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of fine-tuning to a parser."""
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, help="the frozen backbone: a folder, or a model on the Hub")
    add("--base_model_name", help="the backbone's name to record where --model_name_or_path is a folder")
    kinds = ["head", *method_names()]
    add("--method", nargs="+", default=["memory"], choices=kinds, help="one or more; head: nothing beside the head")
    add("--tokens", type=int, default=4, help="memory tokens in each block, for --method memory")
    add("--method_config", type=json.loads, default={}, help='settings as JSON, as \'{"lora": {"r": 16}}\'')
    add("--masked", action="store_true", help="train in the task stream; the backbone's own answer stays as it is")
    add_problem_type(parser)
    add("--attn_implementation", help="the backbone's attention kernel: sdpa, eager, flash_attention_2 ...")
    add = parser.add_argument_group("data").add_argument
    add("--train_dir", help="a folder with one folder of images for each class")
    add("--validation_dir", help="the same, for evaluation")
    add("--dataset_name", help="a data set of the Hub, in place of folders")
    add("--dataset_config_name", help="its configuration")
    add("--image_column_name", help="the column of images; by default image, or the only one of that type")
    add("--label_column_name", help="the column of labels; by default label, or the only one of that type")
    add("--train_val_split", type=float, default=0.15, help="share to evaluate on where there is no such split")
    add("--max_train_samples", type=int, help="train on so many images, chosen by the seed")
    add("--max_eval_samples", type=int, help="evaluate on so many images, chosen by the seed")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--output_dir", required=True, help="where the adapter goes, with its card and all_results.json")
    text = "go on from a folder checkpoint-<step>, or without a value from the last one in --output_dir"
    add("--resume_from_checkpoint", nargs="?", const=True, default=None, help=text)
    add("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    add("--num_processes", type=int, default=1, help="with --cpu: processes to start on this machine")
    add_training_arguments(group, leave_out=["output_dir", "image_column", "label_column"], save_total_limit=2)
    add = parser.add_argument_group("sharing").add_argument
    add("--push_to_hub", action="store_true", help="push the adapter to the Hub at the end")
    add("--hub_model_id", help="where to; by default the name of --output_dir")


def run(args: argparse.Namespace, command: Sequence[str]) -> dict[str, Any] | None:
    """Train, evaluate and save as the arguments say.

    Args:
        args: The arguments.
        command: The command line, to be recorded.

    Returns:
        What `all_results.json` has; None in processes that are not the main one.

    Raises:
        MemtuneError: A setting, an image, a checkpoint, or the Hub refused.
    """
    if args.cpu and args.num_processes > 1 and "LOCAL_RANK" not in os.environ:
        _start_processes(args.num_processes)
    state = begin(cpu=args.cpu)
    columns = {"image_column": args.image_column_name, "label_column": args.label_column_name}
    config = read_training_arguments(args, **columns)
    with state.main_process_first():
        train, evaluation = load_data(args)
    set_seed(args.seed)
    label_column = find_columns(train, args.image_column_name, args.label_column_name)[1]
    model = build_model(args, label_names(train, label_column, args.problem_type))
    if state.is_main_process:
        report = inspect_data(train, validation=evaluation, model=model, config=config, max_images=_LOOKED_AT)
        for line in [*report.problems, *report.notes]:
            logger.warning("%s", line)
    result = fit(model, train, evaluation, config, resume_from_checkpoint=args.resume_from_checkpoint)
    # where there was no epoch, the model as it is gets measured, as in transformers' own examples
    measured = result.scores or evaluate(model, evaluation, config)
    if not state.is_main_process:
        return None
    scores = {f"eval_{name}": value for name, value in measured.items()}
    card: dict[str, Any] = {
        "base_model_name": args.base_model_name,
        "results": {name: value for name, value in measured.items() if name != "loss"},
        "training": config.for_mode(model.task.masked),
    }
    model.save_pretrained(args.output_dir, **card)
    summary = {
        **scores,
        "train_samples": len(train),
        "eval_samples": len(evaluation),
        "train_runtime": round(result.seconds, 1),
        "image_size": " x ".join(map(str, model.task.image_size or Backbone(model.backbone).image_size)) + " px",
        "num_processes": state.num_processes,
        "trainable_parameters": model.trainable_parameters(),
        "command": " ".join(command),
        "torch": torch.__version__,
        "history": result.history,
    }
    folder = Path(args.output_dir)
    (folder / RESULTS_NAME).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(_settings(args), sort_keys=False), encoding="utf-8")
    (folder / "summary.md").write_text(_in_markdown(summary, args), encoding="utf-8")
    if result.history:
        result.to_csv(folder / "history.csv")
        if find_spec("matplotlib"):
            result.plot(folder / "learning_curves.png")
    if args.push_to_hub:
        model.push_to_hub(args.hub_model_id or folder.name, **card)
    return summary


def describe(summary: dict[str, Any], output_dir: str) -> str:
    """What a person is told at the end."""
    scores = {name.removeprefix("eval_"): value for name, value in summary.items() if name.startswith("eval_")}
    return (
        f"{in_words(scores)} of {scores['samples']} images, trained on "
        f"{summary['train_samples']} in {len(summary['history'])} epochs at {summary['image_size']}; the adapter is in "
        f"{output_dir}"
    )


def in_words(scores: Mapping[str, float]) -> str:
    """The scores of an evaluation but the loss, for people."""
    if "accuracy" in scores:
        return f"accuracy {100 * scores['accuracy']:.2f} %"
    shown = {name: value for name, value in scores.items() if name not in ("loss", "samples")}
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown.items())


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given or are by default, as YAML takes them."""
    left_out = ("function", "json", "command")
    values = {name: value for name, value in vars(args).items() if name not in left_out and value is not None}
    return json.loads(json.dumps(values, default=str))


def _in_markdown(summary: dict[str, Any], args: argparse.Namespace) -> str:
    """A page for people: what was trained, how well it does, and the last epochs."""
    methods = f"{' + '.join(args.method)}, {'masked' if args.masked else 'unmasked'}"
    lines = ["# Training run", "", f"{methods}: {describe(summary, '.')}.", ""]
    lines += ["| score | value |", "| --- | ---: |"]
    lines += [f"| {name.removeprefix('eval_')} | {value:.4f} |" for name, value in summary.items() if _is_score(name)]
    if history := summary["history"][-10:]:
        names = ["epoch", "task_loss", "learning_rate", *(name for name in history[-1] if _is_score(name))]
        lines += ["", f"| {' | '.join(names)} |", "|" + " ---: |" * len(names)]
        lines += ["| " + " | ".join(f"{entry[name]:.4g}" for name in names) + " |" for entry in history]
    return "\n".join([*lines, "", "```", summary["command"], "```", ""])


def _is_score(name: str) -> bool:
    return name.startswith("eval_") and name != "eval_samples"


def _start_processes(number: int) -> None:
    """Become `number` processes that run this program, each with the rank that torch's launcher gives it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    program = ["-m", "memtune"] if Path(sys.argv[0]).name == "__main__.py" else [sys.argv[0]]
    os.execv(sys.executable, [sys.executable, *launcher, *program, *sys.argv[1:]])


def load_data(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The images to train and to evaluate on.

    Raises:
        ConfigError: The arguments name no data, or a share that leaves none.
        InputError: It cannot be loaded, or has fewer than two classes.
    """
    splits = _load_splits(args)
    evaluation = next((splits[name] for name in ("validation", "test") if name in splits), None)
    train = splits["train"]
    label_column = find_columns(train, args.image_column_name, args.label_column_name)[1]
    problem_type = getattr(args, "problem_type", SingleLabel.problem_type)
    names = label_names(train, label_column, problem_type)
    if evaluation is None:
        reader = make_reader(find_objective(problem_type), names, class_names(train, label_column))
        labels = [reader(label, f"image {index}") for index, label in enumerate(train.with_format(None)[label_column])]
        places = held_out(labels, args.train_val_split, args.seed)
        evaluation = train.select(places)
        train = train.select(sorted(set(range(len(train))) - set(places)))
    return _sample(train, args.max_train_samples, args.seed), _sample(evaluation, args.max_eval_samples, args.seed)


def _load_splits(args: argparse.Namespace) -> dict[str, Dataset]:
    if args.dataset_name:
        try:
            found: Any = load_dataset(args.dataset_name, args.dataset_config_name)
        except (OSError, ValueError, DatasetsError) as error:
            raise InputError(f"--dataset_name: {args.dataset_name} cannot be loaded: {error}") from error
        if "train" not in found:
            raise InputError(f"--dataset_name: {args.dataset_name} has the splits {list(found)}, and no train")
        return dict(found)
    if not args.train_dir:
        raise ConfigError("got no data to train on; give --train_dir, or --dataset_name")
    splits = load_splits(args.train_dir)
    return splits | ({"validation": load_folder(args.validation_dir)} if args.validation_dir else {})


def _sample(split: Dataset, limit: int | None, seed: int) -> Dataset:
    return split if limit is None else split.shuffle(seed=seed).select(range(min(limit, len(split))))


def build_model(args: argparse.Namespace, labels: Sequence[str]) -> TunedModel:
    """The backbone with new adapters.

    Raises:
        ConfigError: The backbone cannot be loaded, or the settings do not fit it.
    """
    backbone, processor = load_model(args.model_name_or_path, args.attn_implementation)
    settings = args.method_config
    if not isinstance(settings, dict) or settings.keys() - set(args.method):
        raise ConfigError(
            f"--method_config: got {settings!r}, expected settings as JSON by the names that --method has, such as "
            f'{{"{args.method[0]}": {{...}}}}'
        )
    configs = [_read_method(args, name) for name in args.method]
    masked = args.masked and args.method != ["head"]  # a head alone leaves the backbone as it is in either mode
    return wrap(backbone, configs, labels=labels, masked=masked, processor=processor, problem_type=args.problem_type)


def _read_method(args: argparse.Namespace, name: str) -> AdapterConfig:
    if name == "head":
        return MemoryConfig(tokens=0, class_token=False)
    tokens = {"tokens": args.tokens} if name == "memory" else {}
    return read_config({"method": name} | tokens | args.method_config.get(name, {}))
