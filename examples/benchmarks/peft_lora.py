"""The accuracy of PEFT's own LoRA on a folder of images, trained as `examples/finetune.py` trains.

    python examples/benchmarks/peft_lora.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --train_dir pets/train --validation_dir pets/test

The data, the order of the images, the optimizer, the schedule and the number of steps are those of `memtune.fit` with
the same settings; model, adapter and head are transformers' and PEFT's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import datasets
import peft
import torch
from folders import make_parser
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, get_scheduler, set_seed

from memtune.data.augmentation import Augmentation, Changes
from memtune.data.images import Collator, ImageDataset


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--r", type=int, default=8)
    add("--target_modules", nargs="+", default=["q_proj", "v_proj"])
    add("--num_train_epochs", type=int, default=10)
    add("--batch_size", type=int, default=32)
    add("--learning_rate", type=float, default=5e-3)
    add("--weight_decay", type=float, default=0.01)
    add("--label_smoothing_factor", type=float, default=0.0)
    add("--randaugment_ops", type=int, default=0, help="RandAugment's operations on each training image")
    add("--randaugment_magnitude", type=int, default=9)
    add("--mixed_precision", default="no", choices=["no", "bf16"])
    return parser.parse_args()


def load(args: argparse.Namespace, data: datasets.Dataset, processor: object, *, train: bool) -> DataLoader:
    augment = None
    if train and args.randaugment_ops:
        augment = Augmentation(
            Changes(operations=args.randaugment_ops, magnitude=args.randaugment_magnitude), args.seed
        )
    items = ImageDataset(data, processor, image_size=args.image_size, augment=augment)
    order = torch.Generator().manual_seed(args.seed)
    collator = Collator(len(data.features["label"].names))
    return DataLoader(items, args.batch_size, train, generator=order, collate_fn=collator)


def build(args: argparse.Namespace, labels: list[str]) -> torch.nn.Module:
    model = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path,
        attn_implementation=args.attn_implementation,
        num_labels=len(labels),
        ignore_mismatched_sizes=True,
    )
    config = peft.LoraConfig(r=args.r, target_modules=args.target_modules, modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


def run(args: argparse.Namespace, splits: Sequence[datasets.Dataset]) -> tuple[float, int, float]:
    """Train on one split and test on the other: the accuracy, the number of trained values, the seconds of training."""
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    train, test = (load(args, split, processor, train=number == 0) for number, split in enumerate(splits))
    set_seed(args.seed)
    model = build(args, splits[0].features["label"].names)
    steps = len(train) * args.num_train_epochs
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, args.learning_rate, weight_decay=args.weight_decay)
    schedule = get_scheduler("cosine", optimizer, -(-steps // 10), steps)

    def logits(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            size = {"interpolate_pos_encoding": args.image_size is not None}
            return model(pixel_values=batch["pixel_values"], **size).logits.float()

    start = time.perf_counter()
    for epoch in range(args.num_train_epochs):
        model.train()
        train.dataset.set_epoch(epoch)
        for batch in tqdm(train, desc=f"epoch {epoch + 1}", leave=False):
            loss = cross_entropy(logits(batch), batch["labels"], label_smoothing=args.label_smoothing_factor)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        right = sum((logits(batch).argmax(1) == batch["labels"]).sum().item() for batch in test)
    return right / len(test.dataset), sum(p.numel() for p in trained), seconds


def main() -> None:
    args = parse_arguments()
    splits = [
        datasets.load_dataset("imagefolder", data_dir=folder, data_files="**", split="train")
        for folder in (args.train_dir, args.validation_dir)
    ]
    accuracy, count, seconds = run(args, splits)
    print(f"accuracy {100 * accuracy:.2f} % with {count:,} trained values, {seconds:.0f} s of training")


if __name__ == "__main__":
    main()
