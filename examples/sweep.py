"""Search for settings on folders of images: VTAB-1k's protocol, on Optuna (docs/sweep.md).

    python examples/sweep.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --train_dir pets/train --test_dir pets/test --output_dir pets-sweep --method memory --masked \\
        --trunk_cache cache --search learning_rate=log:1e-4:1e-1 weight_decay=log:1e-3:10 memory.tokens=1,2,4,8

`--search` names settings: NAME=LOW:HIGH, NAME=log:LOW:HIGH for a logarithmic scale, or NAME=A,B,C for choices. A folder
has one folder of images for each class. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

import datasets
from accelerate import PartialState
from datasets import Dataset, load_dataset
from optuna.distributions import FloatDistribution
from transformers import AutoImageProcessor, AutoModelForImageClassification

import memtune
from memtune.methods.registry import method_names, read_config


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = memtune.TrainingConfig()
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, help="the backbone: a folder, or a model on the Hub")
    add("--method", default="memory", choices=method_names(), help="what is trained")
    add("--method_config", type=json.loads, default={}, help="settings of the method as JSON, as '{\"tokens\": 8}'")
    add("--masked", action="store_true", help="train in the task stream; the backbone's own answer stays as it is")
    add = parser.add_argument_group("search").add_argument
    add("--search", nargs="+", type=parse_range, required=True, metavar="NAME=RANGE", help="what is searched")
    add("--train_dir", required=True, help="a folder with a folder of images for each class")
    add("--test_dir", help="the same; measured by the best setting alone")
    add("--validation", type=float, default=0.2, help="share of the training images that trials are measured on")
    add("--n_trials", type=int, default=20, help="settings to try (%(default)s)")
    add("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the runs with the best setting")
    add("--output_dir", required=True, help="where the search and its results go")
    add = parser.add_argument_group("training").add_argument
    for name in ("num_train_epochs", "warmup_ratio"):
        add(f"--{name}", type=float, default=getattr(defaults, name), help="%(default)s")
    for name in ("learning_rate", "weight_decay", "label_smoothing_factor"):
        add(f"--{name}", type=float, help="by default that of the mode")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "max_steps", "dataloader_num_workers"):
        add(f"--{name}", type=int, default=getattr(defaults, name), help="%(default)s")
    add("--seed", type=int, default=defaults.seed, help="of the trials, the images held out and the search")
    add("--image_size", type=int, help="height and width in pixels, in place of the processor's")
    add("--mixed_precision", choices=["no", "bf16", "fp16"], help="by default what accelerate launch was told, or no")
    add("--trunk_cache", help="a folder for what the trunk makes of each image, computed once (--masked)")
    add("--trunk_cache_dtype", default=defaults.trunk_cache_dtype, help="%(default)s")
    add("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    return parser.parse_args()


def parse_range(text: str) -> tuple[str, Any]:
    """A setting's name and what `memtune.sweep` takes for it."""
    name, given, ranges = text.partition("=")
    try:
        if not (name and given):
            raise ValueError("no name, or no range")
        if ranges.startswith("log:"):
            low, high = map(float, ranges.removeprefix("log:").split(":"))
            return name, FloatDistribution(low, high, log=True)
        if ":" in ranges:
            low, high = map(json.loads, ranges.split(":"))
            return name, (low, high)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; expected NAME=LOW:HIGH or NAME=A,B,C") from error
    return name, [parse_choice(each) for each in ranges.split(",")]


def parse_choice(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def load_folder(path: str | None) -> Dataset | None:
    return None if path is None else load_dataset("imagefolder", data_dir=path, data_files="**", split="train")


def main() -> None:
    args = parse_arguments()
    state = PartialState(cpu=args.cpu)
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.ERROR)
    if not state.is_main_process:
        datasets.disable_progress_bars()
    with state.main_process_first():
        train, test = load_folder(args.train_dir), load_folder(args.test_dir)
    names = memtune.TrainingConfig.__dataclass_fields__
    training = {name: value for name, value in vars(args).items() if name in names and name != "output_dir"}
    result = memtune.sweep(
        AutoModelForImageClassification.from_pretrained(args.model_name_or_path),
        read_config({"method": args.method} | args.method_config),
        dict(args.search),
        train,
        test,
        training=memtune.TrainingConfig(**training),
        n_trials=args.n_trials,
        seeds=args.seeds,
        validation=args.validation,
        masked=args.masked,
        processor=AutoImageProcessor.from_pretrained(args.model_name_or_path),
        output_dir=args.output_dir,
    )
    if state.is_main_process:
        print(result)


if __name__ == "__main__":
    main()
