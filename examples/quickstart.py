"""Two tasks trained apart on one frozen vision transformer, then answered from one pass over an image.

    python examples/quickstart.py
    python examples/quickstart.py --model_name_or_path google/vit-base-patch16-224-in21k   # any supported model

The images are handwritten numbers of two digits, from scikit-learn's 1,797 real scans; one task reads the tens, the
other the ones. Without a flag the backbone is the one in `examples/assets/backbone`, trained from scratch by
`examples/pretrain_backbone.py`, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import peft
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging

import memtune

matplotlib.use("Agg")
from matplotlib import pyplot

BACKBONE = Path(__file__).parent / "assets" / "backbone"
TASKS = ("tens", "ones")
LABELS = [str(digit) for digit in range(10)]

HEAD = {"config": memtune.MemoryConfig(tokens=0, class_token=False)}
ADAPTER = {"config": [memtune.MemoryConfig(tokens=4), memtune.SideNetworkConfig()], "masked": True}


def scans(train_images: int) -> tuple[Dataset, Dataset]:
    """Numbers of the first 1,000 scans to train on and of the last 797 to test, with labels for each task."""
    bunch = load_digits()
    drawn = np.random.default_rng(0)
    features = Features({"image": Image(), **{task: ClassLabel(names=LABELS) for task in TASKS}})

    def numbers(places: range, count: int) -> Dataset:
        tens, ones = (drawn.permutation(places)[:count] for _ in TASKS)
        images = [number(bunch.images[left], bunch.images[right]) for left, right in zip(tens, ones, strict=True)]
        labels = {"tens": bunch.target[tens].tolist(), "ones": bunch.target[ones].tolist()}
        return Dataset.from_dict({"image": images, **labels}, features=features)

    return numbers(range(1000), train_images), numbers(range(1000, len(bunch.target)), 797)


def number(tens: np.ndarray, ones: np.ndarray) -> PILImage.Image:
    """Two scans of 8 x 8 pixels side by side, in the middle of a square."""
    square = np.zeros((16, 16), dtype="uint8")
    square[4:12] = np.concatenate([tens, ones], axis=1) * (255 / 16)
    return PILImage.fromarray(square).convert("RGB")


def load_backbone(name: str) -> Any:
    return AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)


def train_apart(args: argparse.Namespace, backbone: Any, processor: Any) -> dict[str, memtune.TunedModel]:
    """Train each task by itself, a head alone for comparison, and print the table."""
    train, test = scans(args.train_images)
    print("| task | trained | trained values | accuracy | seconds |\n| --- | --- | ---: | ---: | ---: |", flush=True)
    adapters = {}
    for task in TASKS:
        for name, options in (("head only", HEAD), ("memory and side network", ADAPTER)):
            start = time.perf_counter()
            torch.manual_seed(args.seed)
            model = memtune.wrap(backbone, labels=LABELS, processor=processor, **options)
            with tempfile.TemporaryDirectory() as cache:  # the backbone runs once for each image, not in each epoch
                config = memtune.TrainingConfig(
                    num_train_epochs=args.num_train_epochs,
                    label_column=task,
                    trunk_cache=cache,
                    seed=args.seed,
                    disable_tqdm=True,
                )
                memtune.fit(model, train, config=config)
            accuracy = memtune.evaluate(model, test, label_column=task)["accuracy"]
            count, seconds = model.trainable_parameters()["total"], time.perf_counter() - start
            print(f"| {task} | {name} | {count:,} | {100 * accuracy:.1f} % | {seconds:.0f} |", flush=True)
        adapters[task] = model
    return adapters


def compare_passes(args: argparse.Namespace, both: memtune.MultiTaskModel, apart: dict[str, Any]) -> None:
    """Print how long all answers take from one pass, from separate passes, and from PEFT's."""
    processor = both.shared_processor()
    pixel_values = processor(scans(args.train_images)[1][:16]["image"], return_tensors="pt").pixel_values
    backbone = both.backbone
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
        in_turn: Any = peft.get_peft_model(load_backbone(args.model_name_or_path), lora, "tens").eval()
        in_turn.add_adapter("ones", lora)

    def separately() -> Iterator[Any]:
        yield backbone(pixel_values)
        for model in apart.values():
            yield model(pixel_values)

    def by_peft() -> Iterator[Any]:
        with in_turn.disable_adapter():
            yield in_turn(pixel_values)
        for name in TASKS:
            in_turn.set_adapter(name)
            yield in_turn(pixel_values)

    ways: dict[str, Callable[[], Any]] = {
        "memtune, one pass": lambda: both(pixel_values),
        "memtune, a pass for each": lambda: list(separately()),
        "PEFT's LoRA, a pass for each": lambda: list(by_peft()),
        "the backbone alone": lambda: backbone(pixel_values),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for number in range(8):
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                if number:  # the first is not counted
                    times[name].append(time.perf_counter() - start)
    print("\n| both tasks' answers and the backbone's own, for 16 images | ms |\n| --- | ---: |")
    for name, own in times.items():
        print(f"| {name} | {1000 * statistics.median(own):.0f} |")


def run(args: argparse.Namespace) -> None:
    """Train, combine, time and save."""
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, backend="pil")
    backbone = load_backbone(args.model_name_or_path)
    frozen = sum(parameter.numel() for parameter in backbone.parameters())
    print(f"{frozen:,} frozen parameters, {args.train_images} training images, 797 test images\n")
    adapters = train_apart(args, backbone, processor)
    both = memtune.combine(backbone, adapters)
    compare_passes(args, both, adapters)
    both.save_pretrained(args.output_dir)
    size = sum(path.stat().st_size for path in Path(args.output_dir).rglob("*") if path.is_file())
    print(f"\nBoth adapters are in {args.output_dir} ({size / 1000:.0f} kB). In a new process:", flush=True)


def predict(args: argparse.Namespace) -> None:
    """Load the saved adapters, and draw their answers to the last test images, from one pass."""
    _, test = scans(args.train_images)
    shown = test.select(range(len(test) - 24, len(test)))
    both = memtune.MultiTaskModel.from_pretrained(args.output_dir, load_backbone(args.model_name_or_path))
    answers = both.predict(list(shown["image"]), top_k=1)
    figure, axes = pyplot.subplots(3, 8, figsize=(9, 4.6))
    right = 0
    for axis, item, answer in zip(axes.flat, shown, answers, strict=True):
        told = {task: answer[task][0]["label"] for task in TASKS}
        true = all(told[task] == LABELS[item[task]] for task in TASKS)
        right += true
        axis.imshow(item["image"])
        axis.set_title(f"{told['tens']} {told['ones']}", color="green" if true else "red")
        axis.axis("off")
    figure.suptitle("Tens and ones: two adapters that were trained apart, one pass (red: one of them is wrong)")
    figure.tight_layout()
    picture = Path(args.output_dir) / "predictions.png"
    figure.savefig(picture, dpi=120)
    print(f"{right} of {len(answers)} right in both; picture: {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", default=str(BACKBONE), help="a folder, or a model on the Hub")
    add("--output_dir", default="quickstart-output", help="where the adapters and the picture go")
    add("--num_train_epochs", type=int, default=10, help="passes over the training images")
    add("--train_images", type=int, default=1000, help="number of training images, at most 1,000")
    add("--seed", type=int, default=0, help="of the initial values and the order of images")
    add("--predict", action="store_true", help="only load the saved adapters and draw their answers")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.predict:
        predict(args)
        return
    run(args)
    # A process of its own loads what was saved, as any later program will.
    subprocess.run([sys.executable, *sys.argv, "--predict"], check=True)


if __name__ == "__main__":
    main()
