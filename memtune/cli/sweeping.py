"""The search for settings from the command line: `memtune sweep`, and examples/sweep.py."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..data import find_columns, load_folder
from ..errors import ConfigError
from ..methods import method_names, read_config
from ..preparation import add_training_arguments, read_training_arguments
from ..search import find_optuna, sweep
from ..search.result import SweepResult
from .common import add_problem_type, begin, label_names, load_model

_OF_ONE_RUN = ("output_dir", "early_stopping_patience", "load_best_model_at_end")
_OF_ONE_RUN += ("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit")
"""Settings that mean one run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a search to a parser."""
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, help="the backbone: a folder, or a model on the Hub")
    add("--method", default="memory", choices=method_names(), help="what is trained")
    add("--method_config", type=json.loads, default={}, help="settings of the method as JSON, as '{\"tokens\": 8}'")
    add("--masked", action="store_true", help="train in the task stream; the backbone's own answer stays as it is")
    add_problem_type(parser)
    add = parser.add_argument_group("search").add_argument
    add("--search", nargs="+", type=_parse_range, required=True, metavar="NAME=RANGE", help="what is searched")
    add("--train_dir", required=True, help="a folder with a folder of images for each class")
    add("--test_dir", help="the same; measured by the best setting alone")
    add("--validation", type=float, default=0.2, help="share of the training images that trials are measured on")
    add("--n_trials", type=int, default=20, help="settings to try (%(default)s)")
    add("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the runs with the best setting")
    add("--output_dir", required=True, help="where the search and its results go")
    add("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    add_training_arguments(parser.add_argument_group("training"), leave_out=_OF_ONE_RUN)


def run(args: argparse.Namespace) -> SweepResult | None:
    """Search as the arguments say.

    Returns:
        What was found; None in processes that are not the main one.

    Raises:
        MemtuneError: A setting, a data set or the folder is wrong, or Optuna is not installed.
    """
    state = begin(cpu=args.cpu)
    if not isinstance(args.method_config, dict):
        raise ConfigError(f"--method_config: got {args.method_config!r}, expected settings as JSON")
    config = read_config({"method": args.method} | args.method_config)
    with state.main_process_first():
        train, test = load_folder(args.train_dir), None if args.test_dir is None else load_folder(args.test_dir)
    names = label_names(train, args.label_column or find_columns(train, args.image_column, None)[1], args.problem_type)
    backbone, processor = load_model(args.model_name_or_path)
    result = sweep(
        backbone,
        config,
        dict(args.search),
        train,
        test,
        training=read_training_arguments(args, output_dir=None),
        n_trials=args.n_trials,
        seeds=args.seeds,
        validation=args.validation,
        labels=names,
        masked=args.masked,
        problem_type=args.problem_type,
        processor=processor,
        output_dir=args.output_dir,
    )
    return result if state.is_main_process else None


def _parse_range(text: str) -> tuple[str, Any]:
    """A setting's name and what `memtune.sweep` takes for it."""
    name, given, ranges = text.partition("=")
    try:
        if not (name and given):
            raise ValueError("no name, or no range")
        if ranges.startswith("log:"):
            find_optuna()
            from optuna.distributions import FloatDistribution

            low, high = map(float, ranges.removeprefix("log:").split(":"))
            return name, FloatDistribution(low, high, log=True)
        if ":" in ranges:
            low, high = map(json.loads, ranges.split(":"))
            return name, (low, high)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; expected NAME=LOW:HIGH or NAME=A,B,C") from error
    return name, [_parse_choice(each) for each in ranges.split(",")]


def _parse_choice(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
