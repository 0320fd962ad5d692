"""Adapters trained apart answer together: one pass over an image, a picture of the answers, and the time it takes.

Train two masked adapters, each on a folder of images of its own, then combine them:

    python examples/combine.py --model_name_or_path google/vit-base-patch16-224 \\
        --data pets=pets --data flowers=flowers --output_dir combined

Combine adapters that were trained before, by examples/finetune.py or by the command above:

    python examples/combine.py --model_name_or_path google/vit-base-patch16-224 \\
        --adapter pets=combined/pets --adapter flowers=combined/flowers --images photos --output_dir combined

A data set is a folder with `{train,test}/<class>/*`. Trained adapters go to folders in `--output_dir`, named by their
tasks, and the picture to `combine.png` there. It also has what the backbone's own head says, if there is one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, set_seed
from transformers.utils import logging

import memtune
from memtune.drawing import draw_sheet

BACKBONE = "backbone"
"""The name that the backbone's own answer has beside the tasks'."""


def named(value: str) -> tuple[str, str]:
    name, found, folder = value.partition("=")
    if not (name and found and folder) or name == BACKBONE:
        raise argparse.ArgumentTypeError(f"got {value!r}, expected NAME=FOLDER, such as pets=folder/of/pets")
    return name, folder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = memtune.TrainingConfig()
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="the frozen backbone: a folder, or a model on the Hub")
    kind: Any = {"action": "append", "default": [], "type": named, "metavar": "NAME=FOLDER"}
    add("--adapter", **kind, help="an adapter and the name its task shall have; may be repeated")
    add("--images", nargs="+", default=[], help="image files, or folders of them; by default test images of --data")
    add("--output_dir", required=True, help="where the picture goes, and adapters that are trained")
    add("--batch_size", type=int, default=8, help="images in a pass (%(default)s)")
    add("--pairs", type=int, default=7, help="pairs of times to measure (%(default)s)")
    add = parser.add_argument_group("training").add_argument
    add("--train", action="store_true", help="train an adapter for each --data; the default without --adapter")
    add("--data", **kind, help="a data set to train a task on; may be repeated")
    add("--tokens", type=int, default=4, help="memory tokens in each block (%(default)s)")
    add("--r", type=int, default=8, help="rank of the LoRA that is trained with them, 0 for none (%(default)s)")
    add("--num_train_epochs", type=float, default=3, help="%(default)s")
    for name in ("max_steps", "per_device_train_batch_size", "seed"):
        add(f"--{name}", type=int, default=getattr(defaults, name), help="%(default)s")
    add("--learning_rate", type=float, help="by default that of masked mode")
    add("--max_eval_samples", type=int, help="evaluate on so many images, chosen by the seed")
    args = parser.parse_args()
    args.train = args.train or not args.adapter
    names = [name for name, _ in args.adapter + args.data * args.train]
    if len(names) < 2 or len(set(names)) < len(names):
        parser.error(f"got the tasks {names}; give two or more, by --adapter or --data, each a name of its own")
    if not (args.images or args.data):
        parser.error("give --images")
    return args


def load_split(folder: str, split: str) -> datasets.Dataset:
    # Without data_files, a class that is named as a split would be taken for the whole of it.
    return datasets.load_dataset("imagefolder", data_dir=str(Path(folder) / split), data_files="**", split="train")


def load_backbone(name: str) -> tuple[PreTrainedModel, bool]:
    """The backbone, and whether its head was trained: a checkpoint may have none, and then gets random values."""
    backbone, info = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True)
    return backbone, not info["missing_keys"]


def train(args: argparse.Namespace, backbone: PreTrainedModel, processor: Any, name: str, folder: str) -> Path:
    """Train a masked adapter, which knows nothing of the others; gives its folder."""
    images, test = load_split(folder, "train"), load_split(folder, "test")
    if args.max_eval_samples:
        test = test.shuffle(seed=args.seed).select(range(min(args.max_eval_samples, len(test))))
    set_seed(args.seed)
    adapters: list[Any] = [memtune.MemoryConfig(args.tokens)]
    if args.r:
        adapters.append(memtune.LoraConfig(r=args.r))
    labels = images.features["label"].names
    model = memtune.wrap(backbone, adapters, labels=labels, masked=True, processor=processor)
    names = memtune.TrainingConfig.__dataclass_fields__
    config = memtune.TrainingConfig(**{key: value for key, value in vars(args).items() if key in names})
    result = memtune.fit(model, images, config=config)
    accuracy = 100 * memtune.evaluate(model, test)["accuracy"]
    output = Path(args.output_dir) / name
    model.save_pretrained(output)
    print(
        f"{name}: {len(images)} images, {len(labels)} classes, {result.steps} steps in {result.seconds:.0f} s; "
        f"accuracy {accuracy:.1f} % of {len(test)} images; the adapter is in {output}",
        flush=True,
    )
    return output


def find_images(args: argparse.Namespace, most: int = 4) -> list[str]:
    """Paths of the images to answer: those that were given, or some test images of each data set.

    Raises:
        SystemExit: There are none.
    """
    known = Image.registered_extensions()
    paths = [Path(path) for path in args.images]
    if not paths:
        for _, folder in args.data:
            found = sorted(Path(folder, "test").glob("*/*"))
            paths += found[:: -(-len(found) // most)]
    files = [file for path in paths for file in (_files(path, known) if path.is_dir() else [path])]
    if not files:
        raise SystemExit(f"--images: no image was found in {args.images}")
    return [str(file) for file in files]


def _files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)


def read_images(paths: list[str], processor: Any) -> Tensor:
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return processor(images=images, return_tensors="pt").pixel_values


def best(logits: Tensor, labels: Any) -> list[tuple[str, float]]:
    """The best label with its probability."""
    probability, place = logits.softmax(dim=-1).max(dim=-1)
    label = labels[int(place)].split(",")[0]  # ImageNet's labels name synonyms
    return [(label if len(label) < 25 else label[:23] + "...", float(probability))]


def caption(tasks: dict[str, list[tuple[str, float]]]) -> str:
    return "\n".join(f"{name}: {label} ({probability:.0%})" for name, [(label, probability)] in tasks.items())


def answer(model: memtune.MultiTaskModel, paths: list[str], processor: Any, batch: int, head: bool) -> list[Any]:
    """For each image its path and the best answer of each task, in the form that a contact sheet takes."""
    answers = []
    for start in range(0, len(paths), batch):
        chosen = paths[start : start + batch]
        output = model(read_images(chosen, processor))
        for row, path in enumerate(chosen):
            tasks = {name: best(each.logits[row], model.tasks[name]) for name, each in output.items()}
            if head:
                tasks[BACKBONE] = best(output.base.logits[row], model.backbone.config.id2label)
            answers.append({"image": path, "tasks": tasks})
    return answers


@torch.no_grad()
def compare(model: memtune.MultiTaskModel, folders: dict[str, Path], images: Tensor, pairs: int, head: bool) -> str:
    """One pass for all against a pass for each task (and the backbone's own): times measured in turn, and answers."""
    backbone = model.backbone
    separate = {name: partial(memtune.load(folder, backbone=backbone), images) for name, folder in folders.items()}
    if head:
        separate[BACKBONE] = partial(backbone, pixel_values=images)
    runs = [lambda: model(images), lambda: {name: run() for name, run in separate.items()}]
    together, apart = (run() for run in runs)  # not counted
    difference = max(float((together[name].logits - apart[name].logits).abs().max()) for name in folders)
    times: list[list[float]] = [[], []]
    for number in range(pairs):
        for which in (0, 1) if number % 2 else (1, 0):  # the first of a pair in turn
            start = time.perf_counter()
            runs[which]()
            times[which].append(1000 * (time.perf_counter() - start))
    one, several = map(statistics.median, times)
    return (
        f"one pass over {len(images)} images: {one:.1f} ms; separate passes for {', '.join(separate)}: "
        f"{several:.1f} ms (medians of {pairs} pairs), {several / one:.2f} times as long\n"
        f"largest difference between the logits of the two: {difference:.1e}"
    )


def main() -> None:
    args = parse_arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    backbone, head = load_backbone(args.model_name_or_path)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    folders = {name: Path(folder) for name, folder in args.adapter}
    if args.train:
        folders |= {name: train(args, backbone, processor, name, folder) for name, folder in args.data}
    model = memtune.combine(backbone, folders)
    print(model.plan())
    paths = find_images(args)
    answers = answer(model, paths, processor, args.batch_size, head)
    for each in answers:
        tasks = [f"{name} {label} ({probability:.0%})" for name, [(label, probability)] in each["tasks"].items()]
        print(f"{each['image']}: {', '.join(tasks)}")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    picture = Path(args.output_dir) / "combine.png"
    captions = [
        "\n".join(f"{name}: {label} ({part:.0%})" for name, [(label, part)] in each["tasks"].items())
        for each in answers
    ]
    draw_sheet([(Image.open(path), text) for path, text in zip(paths, captions, strict=True)], picture)
    print(f"picture: {picture}")
    print(compare(model, folders, read_images(paths[: args.batch_size], processor), args.pairs, head))


if __name__ == "__main__":
    main()
