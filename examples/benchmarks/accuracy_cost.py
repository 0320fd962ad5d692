"""Accuracy against the cost of one more task: masked adapters, and unmasked ones of the last blocks alone.

    python examples/benchmarks/accuracy_cost.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --train_dir pets/train --validation_dir pets/test --output_dir accuracy-cost

Each variant is trained with the recipe of its mode. Its cost is what `MultiTaskModel.plan()` counts beside one pass of
the backbone. `results.json` in the output folder is written after each variant, and a new call goes on from there;
`accuracy_cost.png` is the chart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import matplotlib.pyplot as plt
from folders import make_parser
from transformers import AutoImageProcessor, AutoModelForImageClassification

import memtune
from memtune import LoraConfig, MemoryConfig


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True)
    add("--num_train_epochs", type=float, default=10)
    add("--max_steps", type=int, default=-1)
    add("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    return parser.parse_args()


def variants(depth: int) -> Iterator[tuple[str, Any, bool]]:
    """Name, configurations and mode."""
    yield "head", MemoryConfig(tokens=0, class_token=False), False
    yield "masked memory", MemoryConfig(4), True
    for rank in (4, 8, 16):
        yield f"masked LoRA, rank {rank}", LoraConfig(r=rank), True
        yield f"masked memory and LoRA, rank {rank}", [MemoryConfig(4), LoraConfig(r=rank)], True
    for first in (depth - 2, depth - 4, depth - 6, depth - 8, 0):
        yield f"unmasked LoRA from block {first}", LoraConfig(r=8, blocks=range(first, depth)), False


def train(args: argparse.Namespace, name: str, config: Any, masked: bool, splits: Any) -> dict[str, Any]:
    backbone = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path, attn_implementation=args.attn_implementation
    )
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    labels = splits[0].features["label"].names
    model = memtune.wrap(backbone, config, labels=labels, masked=masked, processor=processor)
    names = memtune.TrainingConfig.__dataclass_fields__
    settings = memtune.TrainingConfig(**{key: value for key, value in vars(args).items() if key in names})
    memtune.fit(model, splits[0], config=settings)
    accuracy = memtune.evaluate(model, splits[1], settings)["accuracy"]
    plan = memtune.combine(backbone, {name: model}).plan()
    cost = plan.lanes[0].multiply_adds / plan.multiply_adds
    values = model.trainable_parameters()["total"]
    return {"name": name, "masked": masked, "accuracy": accuracy, "cost": cost, "trained_values": values}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5))
    for masked, marker in ((True, "o"), (False, "s")):
        points = [each for each in results if each["masked"] == masked]
        costs, accuracies = ([each[key] * 100 for each in points] for key in ("cost", "accuracy"))
        axes.scatter(costs, accuracies, marker=marker, label="masked" if masked else "unmasked")
        for cost, accuracy, each in zip(costs, accuracies, points, strict=True):
            side = {"ha": "right", "xytext": (-6, -3)} if cost > 10 else {"xytext": (4, 3)}
            axes.annotate(each["name"], (cost, accuracy), fontsize=7, textcoords="offset points", **side)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel("multiply-adds of one more task, % of the backbone's pass")
    axes.set_ylabel("accuracy, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    args = parse_arguments()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else []
    done = {each["name"] for each in results}
    folders = (args.train_dir, args.validation_dir)
    splits = [
        datasets.load_dataset("imagefolder", data_dir=folder, data_files="**", split="train") for folder in folders
    ]
    config = AutoModelForImageClassification.from_pretrained(args.model_name_or_path).config
    for name, adapters, masked in variants(config.num_hidden_layers):
        if name not in done:
            results.append(train(args, name, adapters, masked, splits))
            path.write_text(json.dumps(results, indent=2) + "\n")
    draw(results, args.output_dir / "accuracy_cost.png")
    print("| variant | accuracy | one more task | trained values |\n| --- | ---: | ---: | ---: |")
    for each in results:
        print(
            f"| {each['name']} | {100 * each['accuracy']:.1f} % | {100 * each['cost']:.2f} % "
            f"| {each['trained_values']:,} |"
        )


if __name__ == "__main__":
    main()
