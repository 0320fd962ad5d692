"""Train the quickstart's small vision transformer from scratch.

One plain PyTorch loop over 32-pixel images of several tasks, taken together as one
classification problem. The result is a standard Hugging Face ``ViTForImageClassification``
stored in half precision, with its image processor and a model card:

    python examples/pretrain_backbone.py --bf16

The data lie as ``<data_dir>/<task>/{train,test}/<class>/<image>``; class ``apple`` of the
task ``cifar100`` gets the label ``cifar100/apple``.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    get_cosine_schedule_with_warmup,
)

IMAGE_SIZE = 32
PATCH_SIZE = 4
CROP_PADDING = 4

ORIGINS = {
    "cifar100": "CIFAR-100 (half of the official train split; test images of the official test split)",
    "gtsrb": "German traffic sign recognition benchmark (split by track: no frame of a sign is on both sides)",
}

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
---
# A small ViT for 32-pixel images

A `ViTForImageClassification` with {parameters:,} parameters ({layers} blocks of width {width}, {heads} heads, patch
{patch}, {size} x {size} pixels, mean = std = 0.5), trained from scratch and stored in half precision. It is the frozen
backbone of memtune's quickstart, small enough to live in the repository; it is no strong classifier.

## Data

{classes} classes, the train splits of, at 32 pixels:

{origins}

## Training

{epochs} epochs of AdamW with random crops and mirrored images (traffic signs are not mirrored):

    {command}

The order of floating-point sums depends on the CPU and its threads, so another run does not give the same bits.

## Accuracy

Test images, weights loaded from the stored file, all {classes} classes as candidates:

{table}
"""


class Images(NamedTuple):
    """Images of all tasks, held in memory."""

    pixels: torch.Tensor  # (images, 3, 32, 32), uint8
    labels: torch.Tensor  # (images,), int64


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small ViT from scratch.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", default="../shared/data", help="folder with one folder for each task")
    add("--tasks", nargs="+", default=["cifar100", "gtsrb"], help="tasks to train on, as one problem")
    add("--no_flip_tasks", nargs="*", default=["gtsrb"], help="tasks whose images must not be mirrored")
    add("--output_dir", default="examples/assets/backbone", help="where the model, processor and card go")
    add("--hidden_size", type=int, default=128, help="width of the model")
    add("--num_hidden_layers", type=int, default=6, help="number of blocks")
    add("--num_attention_heads", type=int, default=4, help="attention heads of a block")
    add("--num_train_epochs", type=int, default=28, help="passes over the training images")
    add("--batch_size", type=int, default=128, help="images of one optimizer step")
    add("--learning_rate", type=float, default=1.5e-3, help="peak learning rate of AdamW")
    add("--weight_decay", type=float, default=0.05, help="decay of the weight matrices")
    add("--warmup_ratio", type=float, default=0.1, help="share of the steps spent on warm-up")
    add("--label_smoothing", type=float, default=0.1, help="probability mass spread over all classes")
    add("--bf16", action="store_true", help="bfloat16 autocast: twice as fast on CPUs with AMX")
    add("--seed", type=int, default=0, help="seed of the initial weights, the order and the crops")
    return parser.parse_args()


def class_names(data_dir: Path, tasks: list[str]) -> list[str]:
    """Labels of the joint problem, ``<task>/<class>``, in a fixed order."""
    return [f"{task}/{folder.name}" for task in tasks for folder in sorted((data_dir / task / "train").iterdir())]


def load_split(data_dir: Path, names: list[str], split: str) -> Images:
    """Reads every image of a split.

    Args:
        data_dir: Folder with one folder for each task.
        names: Labels ``<task>/<class>``; the index is the class number.
        split: ``"train"`` or ``"test"``.

    Returns:
        The images, resized to 32 pixels where they are not, and their class numbers.
    """
    pixels, labels = [], []
    for label, name in enumerate(names):
        task, folder = name.split("/", 1)
        for path in sorted((data_dir / task / split / folder).iterdir()):
            with Image.open(path) as image:
                image = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
            pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            labels.append(label)
    return Images(torch.stack(pixels), torch.tensor(labels))


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Maps bytes to [-1, 1], as the saved processor does (mean = std = 0.5)."""
    return pixels.float() / 127.5 - 1.0


def augment(pixels: torch.Tensor, may_flip: torch.Tensor) -> torch.Tensor:
    """Crops at random from a zero-padded image and mirrors half of the images.

    Args:
        pixels: (batch, 3, height, width), any type.
        may_flip: (batch,), true where an image means the same when mirrored.

    Returns:
        Images of the same shape and type.
    """
    batch, _, height, width = pixels.shape
    padded = F.pad(pixels, [CROP_PADDING] * 4)
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, batch, 1))
    rows = top + torch.arange(height)  # (batch, height)
    columns = left + torch.arange(width)  # (batch, width)
    flip = may_flip & (torch.rand(batch) < 0.5)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None]
    cropped = padded[index, :, rows[:, :, None], columns[:, None, :]]  # (batch, height, width, 3)
    return cropped.permute(0, 3, 1, 2)


def build_model(args: argparse.Namespace, names: list[str]) -> ViTForImageClassification:
    """A fresh ViT with a linear head on the class token.

    Attention is written out with matrix products ("eager"): the fused kernel's bfloat16 backward
    pass is several times slower on CPUs.
    """
    config = ViTConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=4 * args.hidden_size,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        encoder_stride=PATCH_SIZE,
        id2label=dict(enumerate(names)),
        label2id={name: label for label, name in enumerate(names)},
    )
    return AutoModelForImageClassification.from_config(config, attn_implementation="eager")


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays weight matrices and the patch projection, nothing else."""
    groups = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.ndim in (2, 4)].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": args.weight_decay}, {"params": groups[False], "weight_decay": 0.0}],
        lr=args.learning_rate,
        fused=True,
    )


def train(model: nn.Module, images: Images, may_flip: torch.Tensor, args: argparse.Namespace) -> None:
    """Trains in place with warm-up and a cosine decay to zero, and prints one line for each epoch.

    Args:
        model: A classifier of transformers.
        images: Training images.
        may_flip: (classes,), true for classes whose images may be mirrored.
        args: Command line.
    """
    steps = len(images.labels) // args.batch_size
    optimizer = build_optimizer(model, args)
    total = steps * args.num_train_epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, int(args.warmup_ratio * total), total)
    model.train()
    for epoch in range(args.num_train_epochs):
        start, loss_sum, correct = time.perf_counter(), 0.0, 0
        order = torch.randperm(len(images.labels))[: steps * args.batch_size]
        for index in order.view(steps, args.batch_size):
            labels = images.labels[index]
            pixels = normalize(augment(images.pixels[index], may_flip[labels]))
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                logits = model(pixel_values=pixels).logits.float()  # (batch, classes)
            loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss_sum += loss.item()
            correct += int((logits.argmax(-1) == labels).sum())
        speed, accuracy = len(order) / (time.perf_counter() - start), 100 * correct / len(order)
        line = f"epoch {epoch + 1:3d}  loss {loss_sum / steps:.3f}  train {accuracy:.1f} %  {speed:.0f} images/s"
        print(line, flush=True)


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, names: list[str], tasks: list[str]) -> dict[str, float]:
    """Top-1 accuracy of each task in percent, every class of every task being a candidate."""
    model.eval()
    logits = torch.cat([model(pixel_values=normalize(part)).logits for part in images.pixels.split(256)])
    correct = logits.argmax(-1) == images.labels
    accuracies = {}
    for task in tasks:
        of_task = torch.tensor([name.startswith(f"{task}/") for name in names])[images.labels]
        accuracies[task] = 100 * correct[of_task].float().mean().item()
    return accuracies


def save(model: ViTForImageClassification, output_dir: Path) -> None:
    """Writes weights in half precision, the configuration and the image processor."""
    model.half().save_pretrained(output_dir)
    half = [0.5, 0.5, 0.5]
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ViTImageProcessor(size=size, resample=2, image_mean=half, image_std=half).save_pretrained(output_dir)


def report(accuracies: dict[str, float]) -> str:
    """A Markdown table of the accuracies."""
    rows = [f"| {task} | {accuracy:.1f} |" for task, accuracy in accuracies.items()]
    return "\n".join(["| task | top-1, % |", "|---|---|", *rows])


def write_card(output_dir: Path, config: ViTConfig, parameters: int, epochs: int, table: str) -> None:
    """Writes the model card beside the weights."""
    tasks = dict.fromkeys(name.split("/")[0] for name in config.id2label.values())
    card = CARD.format(
        parameters=parameters,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        patch=config.patch_size,
        size=config.image_size,
        classes=len(config.id2label),
        origins="\n".join(f"- {task}: {ORIGINS.get(task, 'a folder of images')}" for task in tasks),
        epochs=epochs,
        command=shlex.join(["python", *sys.argv]),
        table=table,
    )
    (output_dir / "README.md").write_text(card)


def main() -> None:
    """Trains, saves, loads again and reports."""
    args = parse_args()
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    data_dir, output_dir = Path(args.data_dir), Path(args.output_dir)
    names = class_names(data_dir, args.tasks)
    may_flip = torch.tensor([name.split("/")[0] not in args.no_flip_tasks for name in names])
    train_images, test_images = (load_split(data_dir, names, split) for split in ("train", "test"))
    print(f"{len(names)} classes, {len(train_images.labels)} / {len(test_images.labels)} images", flush=True)
    model = build_model(args, names)
    print(f"{model.num_parameters():,} parameters", flush=True)
    train(model, train_images, may_flip, args)
    save(model, output_dir)
    model = AutoModelForImageClassification.from_pretrained(output_dir, dtype=torch.float32)
    table = report(evaluate(model, test_images, names, args.tasks))
    print(f"{table}\n{(time.perf_counter() - start) / 60:.1f} minutes")
    write_card(output_dir, model.config, model.num_parameters(), args.num_train_epochs, table)


if __name__ == "__main__":
    main()
