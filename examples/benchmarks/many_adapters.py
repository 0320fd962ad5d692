"""A thousand masked adapters of one backbone held at once: size, time to load, time of a pass.

    python examples/benchmarks/many_adapters.py
    python examples/benchmarks/many_adapters.py --quick                  # 20 adapters of a tiny backbone

The adapters are folders on disk, each with values of its own, written to a temporary directory (some 200 MB for a
thousand). Times of passes are ratios to a pass of the bare backbone over the same images, measured in turn. Weights are
random, since neither time nor size depends on their values; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import safetensors.torch
import torch
from pairs import compare
from speed import CLASSES, add_backbone_arguments, create_backbone, forward

import memtune

WEIGHTS = "adapter_model.safetensors"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser, "base")
    add = parser.add_argument
    add("--adapters", type=int, default=1000)
    add("--tokens", type=int, default=4, help="memory tokens in each block")
    add("--mixed_images", type=int, default=64, help="images of the mixed batch, each with a task of its own")
    add("--repeats", type=int, default=7, help="pairs of each kind; fewer for what takes long")
    add("--threads", type=int, default=2)
    add("--quick", action="store_true", help="20 adapters of a tiny backbone, mixed batches of 8, 3 pairs")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(size="tiny", adapters=20, mixed_images=8, repeats=3)
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    if not 0 < args.mixed_images <= args.adapters:
        parser.error("--mixed_images: give at least one, and at most as many as --adapters")
    return args


def write_adapters(tuned: memtune.TunedModel, number: int, folder: Path) -> dict[str, Path]:
    """Folders of adapters by the names of their tasks: one that memtune saved, and copies of it with other values."""
    first = folder / "first"
    tuned.save_pretrained(first)
    tensors = safetensors.torch.load_file(first / WEIGHTS)
    folders = {}
    for name in (f"task{index}" for index in range(number)):
        folders[name] = shutil.copytree(first, folder / name, ignore=shutil.ignore_patterns(WEIGHTS))
        varied = {key: tensor + 0.02 * torch.randn_like(tensor) for key, tensor in tensors.items()}
        safetensors.torch.save_file(varied, folder / name / WEIGHTS, metadata={"format": "pt"})
    return folders


def resident() -> int:
    """Resident memory of this process in bytes."""
    gc.collect()
    return psutil.Process().memory_info().rss


def load(tuned: memtune.TunedModel, number: int) -> tuple[memtune.MultiTaskModel, float, int, int]:
    """A model with the adapters; seconds to load them, their bytes on disk, and by how much the process grew."""
    with tempfile.TemporaryDirectory() as directory:
        folders = write_adapters(tuned, number, Path(directory))
        stored = sum(file.stat().st_size for folder in folders.values() for file in folder.iterdir())
        memtune.combine(tuned.backbone, {"first": Path(directory) / "first"})  # what is set up once is not counted
        before, start = resident(), time.perf_counter()
        model = memtune.combine(tuned.backbone, folders)
        seconds = time.perf_counter() - start
        return model, seconds, stored, resident() - before


def passes(model: memtune.MultiTaskModel, args: argparse.Namespace) -> dict[str, tuple[torch.Tensor, Callable]]:
    """What is timed, and the images it is for."""
    images = torch.randn(args.mixed_images, 3, args.image_size, args.image_size)
    names = list(model.tasks)
    chosen = names[:: len(names) // len(images)][: len(images)]
    return {
        "one image, one task": (images[:1], partial(model, images[:1], tasks=[names[-1]])),
        "one image, all tasks": (images[:1], partial(model, images[:1])),
        f"{len(images)} images, one task": (images, partial(model, images, tasks=[names[-1]])),
        f"{len(images)} images, each with its own task": (images, partial(model, images, rows=chosen)),
    }


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    backbone = create_backbone(args)
    forward(backbone, torch.randn(1, 3, args.image_size, args.image_size))
    size = 4 * sum(parameter.numel() for parameter in backbone.parameters())
    config = memtune.MemoryConfig(args.tokens)
    tuned = memtune.wrap(backbone, config, num_labels=CLASSES, masked=True)
    number, values = args.adapters, 4 * tuned.trainable_parameters()["total"]
    model, seconds, stored, grown = load(tuned, number)
    print(
        f"ViT-{args.size.capitalize()}/{args.patch_size} ({size / 1e6:.0f} MB), {args.image_size} px, on the CPU, "
        f"{args.threads} threads, torch {torch.__version__}"
    )
    print(f"{number} masked adapters with {args.tokens} memory tokens a block and {CLASSES} classes\n")
    print("| measure | all | one adapter |\n| --- | ---: | ---: |")
    print(f"| trained values | {number * values / 1e6:.1f} MB | {values / 1e3:.1f} kB |")
    print(f"| on disk | {stored / 1e6:.1f} MB | {stored / number / 1e3:.1f} kB |")
    print(f"| resident memory | {grown / 1e6:.1f} MB | {grown / number / 1e3:.1f} kB |")
    print(f"| time to load | {seconds:.2f} s | {1000 * seconds / number:.2f} ms |\n")
    print("| pass | ratio to the bare backbone's | ratio, processor time | ms | pairs |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    for name, (images, run) in passes(model, args).items():
        measured = compare(run, partial(forward, backbone, images), args.repeats)
        print(
            f"| {name} | {measured.wall:.3f} | {measured.processor:.3f} | {1000 * measured.seconds:.1f} "
            f"| {measured.pairs} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
