"""Adapt a small frozen vision transformer to handwritten digits in four ways, save an adapter, use it elsewhere.

    python examples/quickstart.py
    python examples/quickstart.py --model_name_or_path google/vit-base-patch16-224-in21k   # any supported model

The digits are scikit-learn's: 1,797 real scans of 8 x 8 pixels. Without a flag the backbone is the one in
`examples/assets/backbone`, trained from scratch by `examples/pretrain_backbone.py`, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging

import memtune

matplotlib.use("Agg")
from matplotlib import pyplot

BACKBONE = Path(__file__).parent / "assets" / "backbone"
LABELS = [str(digit) for digit in range(10)]

VARIANTS = {
    "head only": ({"config": memtune.MemoryConfig(tokens=0, class_token=False)}, 1e-2),
    "masked memory": ({"config": memtune.MemoryConfig(tokens=4), "masked": True}, 2e-2),
    "unmasked memory": ({"config": memtune.MemoryConfig(tokens=4)}, 2e-2),
}
"""What is trained beside full fine-tuning, with its learning rate."""


def digits(train_images: int) -> tuple[Dataset, Dataset]:
    """The first images for training and the last 797 for testing, as RGB images with labels."""
    bunch = load_digits()
    scans = (bunch.images * (255 / 16)).astype("uint8")
    images = [PILImage.fromarray(scan).convert("RGB") for scan in scans]
    features = Features({"image": Image(), "label": Value("int64")})
    whole = Dataset.from_dict({"image": images, "label": bunch.target.tolist()}, features=features)
    return whole.select(range(train_images)), whole.select(range(1000, len(whole)))


def load_backbone(name: str) -> AutoModelForImageClassification:
    return AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)


def fine_tune_fully(name: str, processor, train: Dataset, test: Dataset, args: argparse.Namespace) -> tuple[float, int]:
    """The usual way, for comparison: every weight of the backbone is trained. Returns accuracy and trained values."""
    torch.manual_seed(args.seed)
    model = AutoModelForImageClassification.from_pretrained(
        name, dtype=torch.float32, num_labels=10, ignore_mismatched_sizes=True
    )
    batches = {
        split: processor(list(data["image"]), return_tensors="pt").pixel_values
        for split, data in (("train", train), ("test", test))
    }
    labels = {"train": torch.tensor(train["label"]), "test": torch.tensor(test["label"])}
    steps = args.num_train_epochs * -(-len(train) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-4, total_steps=steps)
    model.train()
    for _ in range(args.num_train_epochs):
        for chosen in torch.randperm(len(train)).split(32):
            loss = model(batches["train"][chosen], labels=labels["train"][chosen]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(images).logits for images in batches["test"].split(64)])
    return (logits.argmax(-1) == labels["test"]).float().mean().item(), model.num_parameters()


def compare(args: argparse.Namespace) -> None:
    """Train each variant, print the table, save the unmasked adapter."""
    train, test = digits(args.train_images)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, backend="pil")
    backbone = load_backbone(args.model_name_or_path)
    frozen = sum(parameter.numel() for parameter in backbone.parameters())
    print(f"{frozen:,} frozen parameters; {len(train)} training images, {len(test)} test images\n")
    print("| trained | trained values | accuracy | seconds |\n| --- | ---: | ---: | ---: |", flush=True)
    for name, (options, learning_rate) in VARIANTS.items():
        start = time.perf_counter()
        torch.manual_seed(args.seed)
        model = memtune.wrap(backbone, labels=LABELS, processor=processor, **options)
        config = memtune.TrainingConfig(
            num_train_epochs=args.num_train_epochs,
            per_device_train_batch_size=32,
            learning_rate=learning_rate,
            seed=args.seed,
            disable_tqdm=True,
        )
        memtune.fit(model, train, config=config)
        accuracy = memtune.evaluate(model, test)["accuracy"]
        row(name, model.trainable_parameters()["total"], accuracy, time.perf_counter() - start)
    model.save_pretrained(args.output_dir)
    start = time.perf_counter()
    accuracy, parameters = fine_tune_fully(args.model_name_or_path, processor, train, test, args)
    row("full fine-tuning", parameters, accuracy, time.perf_counter() - start)
    size = sum(path.stat().st_size for path in Path(args.output_dir).iterdir())
    print(f"\nThe unmasked adapter is in {args.output_dir} ({size / 1000:.0f} kB). In a new process:", flush=True)


def row(name: str, parameters: int, accuracy: float, seconds: float) -> None:
    print(f"| {name} | {parameters:,} | {100 * accuracy:.1f} % | {seconds:.0f} |", flush=True)


def predict(args: argparse.Namespace) -> None:
    """Load the saved adapter and draw its answers to the last test images."""
    _, test = digits(args.train_images)
    model = memtune.load(args.output_dir, backbone=load_backbone(args.model_name_or_path))
    shown = test.select(range(len(test) - 24, len(test)))
    pixel_values = model.processor(list(shown["image"]), return_tensors="pt").pixel_values
    with torch.no_grad():
        answers = model(pixel_values).logits.argmax(-1).tolist()
    figure, axes = pyplot.subplots(3, 8, figsize=(8, 3.6))
    for axis, image, label, answer in zip(axes.flat, shown["image"], shown["label"], answers, strict=True):
        axis.imshow(image)
        axis.set_title(LABELS[answer], color="green" if answer == label else "red")
        axis.axis("off")
    figure.suptitle("Answers of the loaded adapter (red: wrong)")
    figure.tight_layout()
    picture = Path(args.output_dir) / "predictions.png"
    figure.savefig(picture, dpi=120)
    right = sum(answer == label for answer, label in zip(answers, shown["label"], strict=True))
    print(f"{right} of {len(answers)} right; picture: {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", default=str(BACKBONE), help="a folder, or a model on the Hub")
    add("--output_dir", default="quickstart-output", help="where the adapter and the picture go")
    add("--num_train_epochs", type=int, default=5, help="passes over the training images")
    add("--train_images", type=int, default=1000, help="number of training images, at most 1,000")
    add("--seed", type=int, default=0, help="of the initial values and the order of images")
    add("--predict", action="store_true", help="only load the saved adapter and draw its answers")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.predict:
        predict(args)
        return
    compare(args)
    subprocess.run([sys.executable, __file__, "--predict", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
