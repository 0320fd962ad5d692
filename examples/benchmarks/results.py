"""The accuracy of every method on several tasks, each a folder of images, and the search for a recipe.

    python examples/benchmarks/results.py --model_name_or_path google/vit-base-patch16-224 \\
        --data_dir tasks --methods closed_form "memory and side" --seeds 0 1 2 --output_dir results

    python examples/benchmarks/results.py ... --heldout --settings '{"learning_rate": 2e-3}' '{"weight_decay": 0.3}'

A task is a folder of `--data_dir` with `{train,test}/<class>/*`. Of its training images `--images` are used, as evenly
over the classes as there are. `--heldout` tests on a fifth of them, and trains on the others: the test images are for
the last look. Each run is a line of `results.jsonl` in the output folder as soon as it has ended; runs that are there
are not done again. The table at the end is of all that is there.

Masked methods train from a trunk cache with `--versions` versions of each image (RandAugment), which is deleted after
each task; the others see as many images, each changed anew.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import peft_lora
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

import memtune
from memtune import LoraConfig, MemoryConfig, SideNetworkConfig

ALONE = MemoryConfig(tokens=0, class_token=False)

METHODS: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "head": (ALONE, False, {}),
    "closed form": (ALONE, False, {}),
    "closed form, random features": (ALONE, False, {"head": memtune.RandomFeatures()}),
    "masked memory": (MemoryConfig(4), True, {}),
    "masked memory and LoRA": ([MemoryConfig(4), LoraConfig(r=8)], True, {}),
    "masked memory and side": ([MemoryConfig(4), SideNetworkConfig()], True, {}),
    "masked memory, LoRA and side": ([MemoryConfig(4), LoraConfig(r=8), SideNetworkConfig()], True, {}),
    "masked side": (SideNetworkConfig(), True, {}),
    "masked memory and side 16": ([MemoryConfig(4), SideNetworkConfig(16)], True, {}),
    "masked memory and side 48": ([MemoryConfig(4), SideNetworkConfig(48)], True, {}),
    "side, pooled": (SideNetworkConfig(readout="pool"), True, {}),
    "memory": (MemoryConfig(4), False, {}),
    "LoRA": (LoraConfig(r=8), False, {}),
    "full fine-tuning": (ALONE, False, {}),
    "PEFT's LoRA": (None, False, {}),
}
"""Of each the adapter's configuration, whether it is masked, and what else `wrap` gets."""

FULL = {"learning_rate": 1e-4, "weight_decay": 0.01}
"""The recipe of full fine-tuning."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True)
    add("--data_dir", type=Path, required=True, help="a folder with a folder for each task")
    add("--output_dir", type=Path, required=True)
    add("--tasks", nargs="+", help="by default all folders")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--images", type=int, default=1000, help="most training images of a task; 0 for all")
    add("--num_train_epochs", type=int, default=20)
    add("--versions", type=int, default=4)
    add("--image_size", type=int)
    add("--heldout", action="store_true")
    add("--settings", nargs="+", type=json.loads, default=[{}], help="settings of training as JSON, a run for each")
    add("--trunk_cache", type=Path, help="by default a folder in the output folder")
    return parser.parse_args()


def load(folder: Path) -> datasets.Dataset:
    # Without data_files, a class named "train" or "test" would be taken for the whole split.
    return datasets.load_dataset("imagefolder", data_dir=str(folder), data_files="**", split="train")


def evenly(data: datasets.Dataset, images: int) -> datasets.Dataset:
    """As many images, one class after the other in turn, those of a class in an order drawn once for all."""
    if not images or len(data) <= images:
        return data
    of_class = defaultdict(list)
    for index, label in enumerate(data["label"]):
        of_class[label].append(index)
    generator = random.Random(0)
    for each in of_class.values():
        generator.shuffle(each)
    rounds = (each[number] for number in range(len(data)) for each in of_class.values() if number < len(each))
    return data.select(sorted(next(rounds) for _ in range(images)))


def splits_of(args: argparse.Namespace, task: str) -> list[datasets.Dataset]:
    train = evenly(load(args.data_dir / task / "train"), args.images)
    if not args.heldout:
        return [train, load(args.data_dir / task / "test")]
    parts = train.train_test_split(0.2, seed=0, stratify_by_column="label")
    return [parts["train"], parts["test"]]


def run_peft(args: argparse.Namespace, splits: list[datasets.Dataset], seed: int, given: dict[str, Any]) -> Any:
    settings = {"learning_rate": 1e-3, "weight_decay": 0.01, "label_smoothing_factor": 0.0, "r": 8} | given
    options = {
        "model_name_or_path": args.model_name_or_path,
        "attn_implementation": None,
        "image_size": args.image_size,
        "seed": seed,
        "target_modules": ["q_proj", "v_proj"],
        "num_train_epochs": args.num_train_epochs,
        "batch_size": 32,
        "randaugment_ops": 2 if args.versions > 1 else 0,
        "randaugment_magnitude": 9,
        "mixed_precision": "no",
    }
    return peft_lora.run(Namespace(**options | settings), splits)


def run(args: argparse.Namespace, splits: list[datasets.Dataset], method: str, seed: int, given: dict[str, Any]) -> Any:
    """The accuracy, the number of trained values beside the head, and the seconds of training."""
    if method == "PEFT's LoRA":
        return run_peft(args, splits, seed, given)
    adapter, masked, options = METHODS[method]
    backbone = AutoModelForImageClassification.from_pretrained(args.model_name_or_path)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    set_seed(seed)
    labels = splits[0].features["label"].names
    model = memtune.wrap(backbone, adapter, labels=labels, masked=masked, processor=processor, **options)
    from_cache = model.reads_trunk and method != "full fine-tuning"
    settings: dict[str, Any] = {"seed": seed, "num_train_epochs": args.num_train_epochs, "disable_tqdm": True}
    settings |= {"image_size": args.image_size}
    if from_cache:
        settings["trunk_cache"] = args.trunk_cache
    if args.versions > 1:
        settings |= {"randaugment_ops": 2} | ({"trunk_cache_versions": args.versions} if from_cache else {})
    if method == "full fine-tuning":
        backbone.requires_grad_(True)
        settings |= FULL
    config = memtune.TrainingConfig(**settings | given)
    start = time.perf_counter()
    if method.startswith("closed form"):
        memtune.fit_closed_form(model, splits[0], config)
        seconds = time.perf_counter() - start
    else:
        seconds = sum(epoch["seconds"] for epoch in memtune.fit(model, splits[0], config=config).history)
    accuracy = memtune.evaluate(model, splits[1], config)["accuracy"]
    counts = model.trainable_parameters()
    return accuracy, counts["total"] - counts["head"], seconds


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    tasks = args.tasks or sorted(each.name for each in args.data_dir.iterdir() if (each / "train").is_dir())
    for task in tasks:
        for seed in args.seeds:
            for method in args.methods:
                for given in args.settings:
                    yield task, method, seed, given


def print_table(results: list[dict[str, Any]]) -> None:
    tasks = sorted({each["task"] for each in results})
    rows: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in results:
        name = " ".join([each["method"], *(f"{key}={value}" for key, value in each["settings"].items())])
        rows[name, each["heldout"]][each["task"]].append(100 * each["accuracy"])
    print(f"| method | {' | '.join(tasks)} | mean |\n| --- | {'---: | ' * len(tasks)}---: |")
    for (name, heldout), row in rows.items():
        cells = []
        for task in tasks:
            values = row.get(task, [])
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}" if values else "")
        means = [statistics.fmean(values) for values in row.values()]
        mean = f"{statistics.fmean(means):.1f}" if len(means) == len(tasks) else ""
        print(f"| {name}{' (held out)' * heldout} | {' | '.join(cells)} | {mean} |")


def main() -> None:
    args = parse_arguments()
    datasets.disable_progress_bars()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.trunk_cache = args.trunk_cache or args.output_dir / "trunk_cache"
    path = args.output_dir / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    same = {"images": args.images, "epochs": args.num_train_epochs, "versions": args.versions, "heldout": args.heldout}
    last: str | None = None
    for task, method, seed, given in jobs(args):
        key = {"task": task, "method": method, "seed": seed, "settings": given, "size": args.image_size, **same}
        if any(key.items() <= each.items() for each in results):
            continue
        if task != last:
            shutil.rmtree(args.trunk_cache, ignore_errors=True)
            last, splits = task, splits_of(args, task)
        accuracy, values, seconds = run(args, splits, method, seed, given)
        entry = key | {"accuracy": accuracy, "trained_values": values, "seconds": round(seconds, 1)}
        results.append(entry)
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{task}, {method}, seed {seed} {given or ''}: {100 * accuracy:.2f} %, {seconds:.0f} s", flush=True)
    shutil.rmtree(args.trunk_cache, ignore_errors=True)
    print_table(results)


if __name__ == "__main__":
    main()
