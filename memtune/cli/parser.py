"""The command line: `memtune COMMAND ...`, also `python -m memtune`.

Results go to standard output, as text or with `--json` as JSON; progress and errors go to standard error. Exit codes:
0 for success, 1 for an error that memtune names, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import MemtuneError
from .terminal import visible

_HELP = """Small trained adapters for one frozen Hugging Face vision model and many tasks.

examples:
  memtune finetune --model_name_or_path google/vit-base-patch16-224-in21k --train_dir pets/train --method memory lora \
      --masked --output_dir pets-lora
  memtune inspect pets-lora
  memtune predict photos --adapter pets=pets-lora --adapter signs=me/vit-signs-memory --sheet sheet.png
  memtune evaluate pets-lora --data pets/test
  memtune combine both --adapter pets=pets-lora --adapter signs=me/vit-signs-memory
  memtune push pets-lora me/vit-pets-lora
  memtune zoo google/vit-base-patch16-224-in21k

An adapter is a folder, or the id of a repository on the Hub."""


_FINETUNE = """The images are in one folder for each class, or in a data set of the Hub. The adapter, its card, its
learning curves and all_results.json go to --output_dir, with checkpoints to go on from.
Several GPUs: accelerate launch -m memtune finetune ..."""

_SWEEP = """Each setting is trained on one part of the training images and measured on the other; the best one is
trained on all of them, with each seed, and measured on --test_dir. The same command again goes on where it was stopped.
--search learning_rate=log:1e-4:1e-1 weight_decay=0:1 memory.tokens=1,2,4,8"""

_CONTINUAL = """The adapter and the state of the run go to --output_dir after each task: the same command again goes on
where it was stopped. At the end all_results.json and accuracy.png join them. --method head trains the head alone, full
the whole backbone, closed_form solves the head from sums over the images."""

_INSPECT = "A folder that cannot be loaded is reported with what is wrong with it, and the exit code is 1."

_INSPECT_DATA = """Prints counts, sizes, and what is wrong: images that cannot be read, that are there twice or in two
parts, and labels that are none. The exit code is 1 if something would stop a training or make its figures wrong."""

_PREDICT = """Prints a line for each image and task: the best labels with their probabilities. Images that cannot be
read are named, and the exit code is 1; the others are answered all the same."""

_EVALUATE = """With --report also by class and by pair of classes, how well the probabilities are calibrated, and the
worst errors."""

_EXPORT = "A graph has the backbone's pass once, and an output for each task; the batch may have any size."

_CACHE = """ls: what is there, by backbone and settings, the newest first. verify: read all entries; the exit code is 1
if one is not whole. prune: delete what is old; no run may be using it."""

_COMBINE = "Prints what the tasks share, and what they cost beside a pass of the backbone."

_NEWLINE = chr(10)


def build_parser(arguments: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        arguments: What it is to parse, if that is known: what takes seconds to import is left out where it is not asked
            for.
    """
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="memtune", description=_HELP, formatter_class=text)
    parser.add_argument("--version", action="version", version=f"memtune {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, summary: str, more: str = "") -> Any:
        description = f"{summary[0].upper()}{summary[1:]}.\n\n{more}".strip()
        added = subparsers.add_parser(name, help=summary, description=description, formatter_class=text)
        added.set_defaults(function=name)
        added.add_argument("--json", action="store_true", help="print the result as JSON")
        return added

    def backbone(add: Any) -> None:
        add("--backbone", help="the frozen model: a folder or a name on the Hub; by default the one that is recorded")

    summary = "train an adapter on a folder of images or a data set of the Hub"
    finetuning = command("finetune", summary, _FINETUNE)
    summary = "search for settings on folders of images, over one trunk cache in masked mode"
    searching = command("sweep", summary, _SWEEP)
    summary = "learn classes that come in tasks, one after the other"
    learning = command("continual", summary, _CONTINUAL)
    for name, parser_of, module in (
        ("finetune", finetuning, "finetuning"),
        ("sweep", searching, "sweeping"),
        ("continual", learning, "sequences"),
    ):
        if arguments is None or name in arguments:
            import_module(f".{module}", __package__).add_arguments(parser_of)
    add = command("inspect", "show what an adapter is, or what is wrong with its folder", _INSPECT).add_argument
    add("adapter", help="the adapter")
    add = command("inspect-data", "look at a folder of images before training on it", _INSPECT_DATA).add_argument
    add("folder", help="a folder with one folder of images for each class, or with such folders for its splits")
    add("--validation_dir", help="a folder of the images to evaluate on")
    add("--adapter", help="an adapter whose labels the classes must be")
    backbone(add)
    add("--max_images", type=int, help="read at most so many images of each part, evenly spread")
    add("--picture", help="draw a few images as the adapter's model sees them into this PNG")
    add = command("predict", "classify images by one or more adapters, in one pass", _PREDICT).add_argument
    add("images", nargs="+", help="image files, folders, or patterns such as 'photos/*.jpg'")
    _adapters(add)
    backbone(add)
    add("--top_k", type=int, default=1, help="answers for each image and task (%(default)s)")
    add("--batch_size", type=int, default=16, help="images a pass (%(default)s)")
    add("--image_size", type=int, help="height and width in pixels, in place of the processor's")
    add("--device", help="where to run: cpu, cuda, cuda:1 ...; by default a GPU, if there is one")
    add("--output", metavar="FILE.csv", help="write the answers into this file as they come, and print none")
    add("--sheet", help="also draw a contact sheet with the first 60 images and their answers into this PNG")
    add = command("evaluate", "measure an adapter, or each of many, on a folder of images", _EVALUATE).add_argument
    add("adapter", help="the adapter, or a folder of `memtune combine`")
    add(
        "--data",
        action="append",
        required=True,
        metavar="[TASK=]FOLDER",
        type=_named,
        help="a folder with one folder of images for each class, named by the labels; may be repeated for many tasks",
    )
    add("--report", metavar="FOLDER", help="write report.html, with pictures, report.json and predictions.csv there")
    backbone(add)
    add("--image_size", type=int, help="height and width in pixels, in place of the processor's")
    add = command(
        "combine", "put adapters into one folder that answers every task from one pass", _COMBINE
    ).add_argument
    add("output", help="the folder to write")
    _adapters(add)
    backbone(add)
    add = command(
        "merge", "write an adapter into its backbone's weights, as a plain model of transformers"
    ).add_argument
    add("adapter", help="an unmasked LoRA adapter, or a head alone")
    add("output", help="the folder to write")
    backbone(add)
    add = command("export", "write a model as ONNX or for torch.export", _EXPORT).add_argument
    add("adapter", help="the adapter, or a folder of `memtune combine`")
    add("output", help="the file to write: .onnx or .pt2")
    backbone(add)
    add("--image_size", type=int, help="height and width in pixels; by default those that it was trained at")
    add = command("explain", "draw what a model looks at in an image").add_argument
    add("image", help="the image")
    add("adapter", help="the adapter, or a folder of `memtune combine`")
    add("output", help="the picture to write")
    add("--task", help="the task, where there are several")
    backbone(add)
    add = command("cache", "show, check or clear the folder of a trunk cache", _CACHE).add_argument
    add("action", choices=["ls", "verify", "prune"], help="what to do")
    add("folder", help="the folder, as it was given by --trunk_cache")
    add("--days", type=float, help="prune what was written so many days ago")
    add("--max_gb", type=float, help="prune the oldest until the rest takes so many gigabytes")
    add = command(
        "push", "share an adapter on the Hugging Face Hub", "You must be logged in (`hf auth login`)."
    ).add_argument
    add("adapter", help="the adapter's folder")
    add("repo_id", help="user/name on the Hub")
    backbone(add)
    add("--private", action="store_true", default=None, help="make a new repository private")
    add("--revision", help="the branch to commit to")
    add("--commit_message", help="first line of the commit's message")
    add("--create_pr", action="store_true", help="open a pull request")
    add = command("zoo", "list the adapters on the Hub for a backbone").add_argument
    add("backbone", help="the backbone's name on the Hub")
    return parser


def _adapters(add: Any) -> None:
    add(
        "--adapter",
        action="append",
        required=True,
        metavar="[NAME=]ADAPTER",
        type=_named,
        help="a task, by default named as its folder is; or a folder of `memtune combine` for all tasks in it; may be "
        "repeated",
    )


def _named(value: str) -> tuple[str, str]:
    name, found, source = value.partition("=")
    if not found or Path(value).exists():
        return "", value
    if not (name and source):
        raise argparse.ArgumentTypeError(f"got {value!r}, expected NAME=PATH, such as pets=pets-lora, or a path")
    return name, source


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser(arguments).parse_args(arguments)
    options.command = ["memtune", *arguments]
    try:
        result = getattr(import_module(".commands", __package__), options.function.replace("-", "_"))(options)
    except MemtuneError as error:
        print(f"memtune: {visible(str(error), keep=_NEWLINE)}", file=sys.stderr)  # noqa: T201
        return 1
    if result.text:
        text = json.dumps(result.values, indent=2) if options.json else visible(result.text, keep=_NEWLINE + "\t")
        print(text)  # noqa: T201
    return result.exit_code
