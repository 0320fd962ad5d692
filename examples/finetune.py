"""Fine-tune an adapter on a folder of images or a data set of the Hub.

    python examples/finetune.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --train_dir pets/train --validation_dir pets/test --output_dir pets-memory --method memory --tokens 4

    accelerate launch --num_processes 8 examples/finetune.py ...         # 8 GPUs
    python examples/finetune.py --cpu --num_processes 2 ...              # 2 processes without a GPU

(`accelerate launch --cpu --num_processes 2` starts one process where MPI is not set up, so this script starts them.)

A folder has one folder of images for each class. The adapter, its card and `all_results.json` go to `--output_dir`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

import memtune
import memtune.training
from memtune.registry import method_names, read_config
from memtune.trunk_cache import DTYPES


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = memtune.TrainingConfig()
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, help="the frozen backbone: a folder, or a model on the Hub")
    add("--base_model_name", help="the backbone's name to record where --model_name_or_path is a folder")
    kinds = ["head", *method_names()]
    add("--method", nargs="+", default=["memory"], choices=kinds, help="one or more; head: nothing beside the head")
    add("--tokens", type=int, default=4, help="memory tokens in each block, for --method memory")
    add("--method_config", type=json.loads, default={}, help='settings as JSON, as \'{"lora": {"r": 16}}\'')
    add("--masked", action="store_true", help="train in the task stream; the backbone's own answer stays as it is")
    add("--attn_implementation", help="the backbone's attention kernel: sdpa, eager, flash_attention_2 ...")
    add("--image_size", type=int, help="height and width in pixels, in place of the processor's")
    add = parser.add_argument_group("data").add_argument
    add("--train_dir", help="a folder with one folder of images for each class")
    add("--validation_dir", help="the same, for evaluation")
    add("--dataset_name", help="a data set of the Hub, in place of folders")
    add("--dataset_config_name", help="its configuration")
    add("--image_column_name", default="image", help="the column of images")
    add("--label_column_name", default="label", help="the column of labels")
    add("--train_val_split", type=float, default=0.15, help="share to evaluate on where there is no such split")
    add("--max_train_samples", type=int, help="train on so many images, chosen by the seed")
    add("--max_eval_samples", type=int, help="evaluate on so many images, chosen by the seed")
    add("--on_error", default="raise", choices=["raise", "skip"], help="what to do with an unreadable image")
    add = parser.add_argument_group("training").add_argument
    add("--output_dir", required=True, help="where the adapter goes")
    for name in memtune.training.RECIPES["masked"]:
        add(f"--{name}", type=float, help="by default that of the mode (memtune.training.RECIPES)")
    for name in ("num_train_epochs", "momentum", "warmup_ratio", "max_grad_norm"):
        add(f"--{name}", type=float, default=getattr(defaults, name), help="%(default)s")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        add(f"--{name}", type=int, default=getattr(defaults, name), help="%(default)s")
    for name in ("max_steps", "dataloader_num_workers", "seed"):
        add(f"--{name}", type=int, default=getattr(defaults, name), help="%(default)s")
    add("--lr_scheduler_type", default=defaults.lr_scheduler_type, help="%(default)s")
    add("--optim", default=defaults.optim, choices=["adamw", "sgd"], help="%(default)s")
    add("--mixed_precision", default="no", choices=["no", "bf16", "fp16"], help="%(default)s")
    add("--trunk_cache", help="with --masked: folder to keep what the backbone makes of each image")
    add("--trunk_cache_dtype", default=defaults.trunk_cache_dtype, choices=[*DTYPES], help="%(default)s")
    add("--trunk_cache_max_gb", type=float, help="most gigabytes in that folder; by default all that the disk has left")
    add("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    add("--num_processes", type=int, default=1, help="with --cpu: processes to start on this machine")
    add("--push_to_hub", action="store_true", help="push the adapter to the Hub at the end")
    add("--hub_model_id", help="where to; by default the name of --output_dir")
    args = parser.parse_args()
    if not (args.train_dir or args.dataset_name):
        parser.error("give --train_dir, or --dataset_name")
    return args


def start_processes(number: int) -> None:
    """Become `number` processes that run this script, each with the rank that torch's launcher gives it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def load_data(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The images to train and to evaluate on, in the columns `image` and `label`."""
    if args.dataset_name:
        splits = load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        splits = {
            name: load_dataset("imagefolder", data_dir=folder, data_files="**", split="train")
            for name, folder in folders.items()
            if folder
        }
    evaluation = next((splits[name] for name in ("validation", "test") if name in splits), None)
    train = splits["train"]
    if evaluation is None:
        halves = train.train_test_split(args.train_val_split, seed=args.seed)
        train, evaluation = halves["train"], halves["test"]
    return tuple(
        _sample(_rename(split, args), limit, args.seed)
        for split, limit in ((train, args.max_train_samples), (evaluation, args.max_eval_samples))
    )


def _rename(split: Dataset, args: argparse.Namespace) -> Dataset:
    names = {args.image_column_name: "image", args.label_column_name: "label"}
    return split.rename_columns({old: new for old, new in names.items() if old != new})


def _sample(split: Dataset, limit: int | None, seed: int) -> Dataset:
    return split if limit is None else split.shuffle(seed=seed).select(range(min(limit, len(split))))


def read_method(args: argparse.Namespace, name: str) -> memtune.AdapterConfig:
    if name == "head":
        return memtune.MemoryConfig(tokens=0, class_token=False)
    tokens = {"tokens": args.tokens} if name == "memory" else {}
    return read_config({"method": name} | tokens | args.method_config.get(name, {}))


def build_model(args: argparse.Namespace, labels: list[str]) -> memtune.TunedModel:
    backbone = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path, attn_implementation=args.attn_implementation
    )
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    configs = [read_method(args, name) for name in args.method]
    return memtune.wrap(backbone, configs, labels=labels, masked=args.masked, processor=processor)


def main() -> None:
    args = parse_arguments()
    if args.cpu and args.num_processes > 1 and "LOCAL_RANK" not in os.environ:
        start_processes(args.num_processes)
    state = PartialState(cpu=args.cpu)
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.ERROR)
    if not state.is_main_process:
        datasets.disable_progress_bars()
    with state.main_process_first():
        train, evaluation = load_data(args)
    set_seed(args.seed)
    model = build_model(args, train.features["label"].names)
    names = memtune.TrainingConfig.__dataclass_fields__
    config = memtune.TrainingConfig(**{name: value for name, value in vars(args).items() if name in names})
    result = memtune.fit(model, train, evaluation, config)
    if not state.is_main_process:
        return
    card: dict[str, Any] = {
        "base_model_name": args.base_model_name,
        "results": {"accuracy": result.history[-1]["eval_accuracy"]},
        "training": config.for_mode(args.masked),
    }
    model.save_pretrained(args.output_dir, **card)
    summary = {
        "eval_accuracy": result.history[-1]["eval_accuracy"],
        "eval_loss": result.history[-1]["eval_loss"],
        "train_samples": len(train),
        "eval_samples": len(evaluation),
        "train_runtime": round(result.seconds, 1),
        "num_processes": state.num_processes,
        "trainable_parameters": model.trainable_parameters(),
        "command": " ".join(["examples/finetune.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "history": result.history,
    }
    (Path(args.output_dir) / "all_results.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"accuracy {100 * summary['eval_accuracy']:.2f} %; the adapter is in {args.output_dir}")
    if args.push_to_hub:
        model.push_to_hub(args.hub_model_id or Path(args.output_dir).name, **card)


if __name__ == "__main__":
    main()
