"""What training in less memory costs in accuracy: SlimFit and TokenTune on a folder of images, against neither.

    python examples/benchmarks/memory_accuracy.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --train_dir pets/train --validation_dir pets/test

Unmasked memory and LoRA, each trained by `memtune.fit` with the same settings and seed; only the callbacks differ.
`examples/benchmarks/memory.py` measures the memory.
"""

from __future__ import annotations

import argparse
from typing import Any

import datasets
from folders import make_parser
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

import memtune
from memtune.callbacks import SlimFit, TokenTune
from memtune.training.callbacks import TrainingCallback

METHODS: dict[str, memtune.AdapterConfig] = {"memory": memtune.MemoryConfig(4), "LoRA": memtune.LoraConfig(r=8)}

WAYS = ("neither", "TokenTune", "SlimFit", "both")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--num_train_epochs", type=int, default=5)
    add("--learning_rate", type=float, help="by default that of the mode")
    add("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    add("--selected", type=int, default=16, help="tokens of each image that have gradients with TokenTune")
    add("--freezing_rate", type=float, default=0.75, help="of SlimFit")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    return parser.parse_args()


def callbacks(args: argparse.Namespace, way: str) -> list[TrainingCallback]:
    chosen: list[TrainingCallback] = []
    if way in ("SlimFit", "both"):
        chosen.append(SlimFit(freezing_rate=args.freezing_rate))
    if way in ("TokenTune", "both"):
        chosen.append(TokenTune(tokens=args.selected))
    return chosen


def accuracy(args: argparse.Namespace, train: Any, test: Any, method: str, way: str) -> float:
    backbone = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path, attn_implementation=args.attn_implementation
    )
    set_seed(args.seed)
    labels = train.features["label"].names
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    model = memtune.wrap(backbone, METHODS[method], labels=labels, processor=processor)
    settings = {} if args.learning_rate is None else {"learning_rate": args.learning_rate}
    config = memtune.TrainingConfig(
        num_train_epochs=args.num_train_epochs,
        image_size=args.image_size,
        mixed_precision=args.mixed_precision,
        seed=args.seed,
        disable_tqdm=True,
        **settings,
    )
    memtune.fit(model, train, config=config, callbacks=callbacks(args, way))
    return memtune.evaluate(model, test, config)["accuracy"]


def main() -> None:
    args = parse_arguments()
    train, test = (
        datasets.load_dataset("imagefolder", data_dir=folder, data_files="**", split="train")
        for folder in (args.train_dir, args.validation_dir)
    )
    print(f"{len(train)} and {len(test)} images, {args.num_train_epochs} epochs, seed {args.seed}\n")
    print("| trained | with | accuracy |")
    print("| --- | --- | ---: |")
    for method in args.methods:
        for way in args.ways:
            print(f"| {method} | {way} | {100 * accuracy(args, train, test, method, way):.1f} % |", flush=True)


if __name__ == "__main__":
    main()
