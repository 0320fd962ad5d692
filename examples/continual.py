"""Class-incremental learning: classes come in tasks, one after the other, and earlier images do not come again.

    python examples/continual.py --model_name_or_path google/vit-base-patch16-224 --data_dir cifar100 \\
        --output_dir cifar100-coda --method coda_prompts --tasks 10

The folder of images is `{train,test}/<class>/*`. The adapter and the state of the run go to `--output_dir` after each
task: the same command again goes on where it was stopped. At the end, `all_results.json` and `accuracy.png` join them.

Baselines: `--method head` trains the head alone, `--method full` the whole backbone (which cannot be resumed), and
`--method closed_form` solves the head from sums over the images: it needs no training, and forgets nothing. With
`--random_features 10000` it is RanPAC (https://arxiv.org/abs/2307.02251).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

import memtune
from memtune.continual.protocol import class_order, fit_continual, split_by_class
from memtune.methods.registry import method_names, read_config

PAPER: dict[str, dict[str, float]] = {
    "coda_prompts": {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.0, "label_smoothing_factor": 0.0},
    "full": {"learning_rate": 5e-5, "weight_decay": 0.0, "label_smoothing_factor": 0.0},
}
"""Settings of the CODA paper for its method and its baseline, in place of TrainingConfig's."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = memtune.TrainingConfig()
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, help="the backbone: a folder, or a model on the Hub")
    add(
        "--method",
        default="coda_prompts",
        choices=["head", "full", "closed_form", *method_names()],
        help="what is trained",
    )
    add("--method_config", type=json.loads, default={}, help="settings of the method as JSON, as '{\"pool_size\": 50}'")
    add("--random_features", type=int, help="number of random features that the head reads in place of the feature")
    add("--masked", action="store_true", help="train in the task stream; the backbone's own answer stays as it is")
    add("--attn_implementation", help="the backbone's attention kernel: sdpa, eager, flash_attention_2 ...")
    add("--image_size", type=int, help="height and width in pixels, in place of the processor's")
    add = parser.add_argument_group("sequence").add_argument
    add("--data_dir", required=True, help="a folder with train/ and test/, each with a folder of images for each class")
    add("--tasks", type=int, default=10, help="number of tasks that the classes are split over")
    add("--class_order_seed", type=int, default=0, help="order of the classes; 0 for the natural one")
    add(
        "--loss",
        default="local",
        choices=["local", "seen"],
        help="classes in the cross-entropy: the task's, or all so far",
    )
    add = parser.add_argument_group("training").add_argument
    add("--output_dir", required=True, help="where the adapter and the results go")
    for name in ("num_train_epochs", "learning_rate", "weight_decay", "momentum", "warmup_ratio", "max_grad_norm"):
        add(
            f"--{name}",
            type=float,
            help="of each task; by default that of TrainingConfig, or the paper's for the method",
        )
    add("--label_smoothing_factor", type=float, help="the same")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        add(f"--{name}", type=int, default=getattr(defaults, name), help="%(default)s")
    for name in ("max_steps", "dataloader_num_workers", "seed"):
        add(f"--{name}", type=int, default=getattr(defaults, name), help="%(default)s")
    add("--lr_scheduler_type", default=defaults.lr_scheduler_type, help="%(default)s")
    add("--optim", default=defaults.optim, choices=["adamw", "sgd"], help="%(default)s")
    add("--mixed_precision", choices=["no", "bf16", "fp16"], help="by default what accelerate launch was told, or no")
    add("--trunk_cache", help="a folder for what the backbone makes of each image, where nothing changes it")
    add("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    args = parser.parse_args()
    if args.method == "full" and args.masked:
        parser.error("--method full trains the backbone, which --masked leaves as it is")
    return args


def load_split(data_dir: str, split: str) -> Dataset:
    # Without data_files, a class named "train" or "test" (CIFAR-100 has one) would be taken for the whole split.
    return load_dataset("imagefolder", data_dir=str(Path(data_dir) / split), data_files="**", split="train")


def build_model(args: argparse.Namespace, labels: list[str]) -> memtune.TunedModel:
    backbone = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path, attn_implementation=args.attn_implementation
    )
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    if args.method in ("head", "full", "closed_form"):
        config: Any = memtune.MemoryConfig(tokens=0, class_token=False)
    else:
        sequence = {"num_tasks": args.tasks} if args.method == "coda_prompts" else {}
        config = read_config({"method": args.method} | sequence | args.method_config)
    head: Any = "linear" if args.random_features is None else memtune.RandomFeatures(args.random_features)
    model = memtune.wrap(backbone, config, labels=labels, head=head, masked=args.masked, processor=processor)
    if args.method == "full":
        backbone.requires_grad_(True)
    return model


def training_config(args: argparse.Namespace) -> memtune.TrainingConfig:
    given = {name: value for name, value in vars(args).items() if value is not None}
    names = memtune.TrainingConfig.__dataclass_fields__.keys() - {"output_dir"}  # which is that of the whole sequence
    chosen = {name: value for name, value in given.items() if name in names}
    return memtune.TrainingConfig(**PAPER.get(args.method, {}) | chosen)


def main() -> None:
    args = parse_arguments()
    state = PartialState(cpu=args.cpu)
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.ERROR)
    if not state.is_main_process:
        datasets.disable_progress_bars()
    with state.main_process_first():
        train, evaluation = load_split(args.data_dir, "train"), load_split(args.data_dir, "test")
    labels = train.features["label"].names
    tasks = split_by_class(train, evaluation, args.tasks, class_order(len(labels), args.class_order_seed))
    logging.info("%d tasks, %d images to train on, %d to test on", len(tasks), len(train), len(evaluation))
    set_seed(args.seed)
    model = build_model(args, labels)
    output = Path(args.output_dir)
    result = fit_continual(
        model,
        tasks,
        training_config(args),
        loss=args.loss,
        solver="closed_form" if args.method == "closed_form" else "gradient",
        output_dir=None if args.method == "full" else output,
    )
    if not state.is_main_process:
        return
    output.mkdir(parents=True, exist_ok=True)
    summary = result.metrics() | result.to_dict() | {
        "trainable_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "command": " ".join(["examples/continual.py", *sys.argv[1:]]),
        "torch": torch.__version__,
    }  # fmt: skip
    (output / "all_results.json").write_text(json.dumps(summary, indent=2) + "\n")
    result.plot(output / "accuracy.png")
    for name, value in result.metrics().items():
        print(f"{name:25} {100 * value:6.2f} %")


if __name__ == "__main__":
    main()
