"""What many tasks cost beside one frozen pass of the backbone: memtune's and PEFT's ways, measured in turn.

    python examples/benchmarks/combine.py
    python examples/benchmarks/combine.py --threads 1 --repeats 7
    python examples/benchmarks/combine.py --quick                        # fewer tasks, images and pairs

Two kinds of work are measured, each against a pass of the bare backbone over the same images: every task for every
image of a batch, and a mixed batch in which each image has a task of its own. Ratios are medians over pairs that ran
one after the other, by the time that passed and by processor time (which other programs on the machine disturb less).
Weights are random, since time does not depend on their values; nothing is downloaded.

PEFT has no masked mode: its tasks are LoRA on query and value in every block, as are memtune's unmasked ones. A pass of
memtune also has the backbone's own answer, unless `base=False` leaves it out.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from pairs import compare
from speed import CLASSES, add_backbone_arguments, create_backbone, forward

import memtune
from memtune import LoraConfig, MemoryConfig, SideNetworkConfig

Create = Callable[[], Callable[[], object]]
"""Builds a model, and gives what runs it."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser)
    add = parser.add_argument
    add("--batch_size", type=int, default=8, help="images that all tasks answer")
    add("--mixed_images", type=int, default=64, help="images of the mixed batch, each with a task of its own")
    add("--tasks", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of masked tasks")
    add("--tokens", type=int, default=4, help="memory tokens in each block")
    add("--rank", type=int, default=8, help="of unmasked LoRA, memtune's and PEFT's")
    add("--masked_rank", type=int, help="of masked LoRA; by default that of the mode")
    add("--repeats", type=int, default=11, help="pairs of each kind; fewer for what takes long")
    add("--threads", type=int, default=2)
    add("--device", default="cpu")
    add("--only", default="", help="only the rows that have this in their names")
    add("--quick", action="store_true", help="1 and 4 masked tasks, mixed batches of 8, 3 pairs")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(tasks=[1, 4], mixed_images=8, repeats=3)
    return parser.parse_args()


def masked_kinds(args: argparse.Namespace) -> dict[str, Any]:
    memory, lora = MemoryConfig(args.tokens), LoraConfig(r=args.masked_rank).for_mode(masked=True)
    side = SideNetworkConfig()
    return {
        "memory": memory,
        "LoRA": lora,
        "memory and LoRA": [memory, lora],
        "memory and side network": [memory, side],
    }


def random_images(args: argparse.Namespace, number: int) -> torch.Tensor:
    return torch.randn(number, 3, args.image_size, args.image_size, device=args.device)


def run_memtune(
    args: argparse.Namespace,
    images: torch.Tensor,
    config: Any,
    number: int,
    *,
    masked: bool,
    mixed: bool = False,
    base: bool = True,
) -> Callable[[], object]:
    """A pass of a model with tasks of one kind: all of them for each image, or a mixed batch."""
    backbone = create_backbone(args)
    model = memtune.MultiTaskModel(backbone)
    sources = {str(task): memtune.wrap(backbone, config, num_labels=CLASSES, masked=masked) for task in range(number)}
    model.add_tasks(sources)
    return partial(model, images, rows=list(sources) if mixed else None, base=base)


def create_peft(args: argparse.Namespace, number: int) -> tuple[Any, list[str]]:
    """A backbone with LoRA adapters of PEFT, each with a head of its own; and their names."""
    import peft

    names = [f"task{task}" for task in range(number)]
    config = partial(peft.LoraConfig, r=args.rank, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(create_backbone(args), config(), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config())
    return model.eval(), names


def run_peft_mixed(args: argparse.Namespace, images: torch.Tensor, number: int, copies: int) -> Callable[[], object]:
    """A pass of PEFT's mixed-batch inference: each image with its own adapter, or each image once for each of them."""
    model, names = create_peft(args, number)
    rows = [name for name in names for _ in range(len(images) * copies // number)]
    images = images.repeat(copies, 1, 1, 1)
    return torch.no_grad()(partial(model, pixel_values=images, adapter_names=rows))


def run_peft_in_turn(args: argparse.Namespace, images: torch.Tensor, number: int) -> Callable[[], object]:
    """A pass for each adapter of PEFT, made the active one in turn."""
    model, names = create_peft(args, number)

    @torch.no_grad()
    def run() -> None:
        for name in names:
            model.set_adapter(name)
            model(pixel_values=images)

    return run


def every_task_rows(args: argparse.Namespace, images: torch.Tensor) -> Iterator[tuple[str, int, Create]]:
    """Name, number of tasks and what to run where every task answers for every image."""
    for name, config in masked_kinds(args).items():
        for number in args.tasks:
            yield f"memtune, masked {name}", number, partial(run_memtune, args, images, config, number, masked=True)
    roles = ("query", "value")
    for where, blocks in (("all blocks", None), ("last two blocks", (-2, -1))):
        config = LoraConfig(r=args.rank, roles=roles, blocks=blocks)
        create = partial(run_memtune, args, images, config, 4, masked=False)
        yield f"memtune, unmasked LoRA, {where}", 4, create
        yield f"memtune, unmasked LoRA, {where}, `base=False`", 4, partial(create, base=False)
    yield "PEFT LoRA, `adapter_names`", 4, partial(run_peft_mixed, args, images, 4, copies=4)
    for number in [4] if args.quick else [4, 16]:
        yield "PEFT LoRA, `set_adapter` in turn", number, partial(run_peft_in_turn, args, images, number)


def mixed_rows(args: argparse.Namespace, images: torch.Tensor) -> Iterator[tuple[str, int, Create]]:
    """The same for a mixed batch."""
    number = len(images)
    for name, config in masked_kinds(args).items():
        create = partial(run_memtune, args, images, config, number, masked=True, mixed=True)
        yield f"memtune, masked {name}", number, create
    config = LoraConfig(r=args.rank, roles=("query", "value"))
    create = partial(run_memtune, args, images, config, number, masked=False, mixed=True)
    yield "memtune, unmasked LoRA, all blocks", number, create
    yield "PEFT LoRA, `adapter_names`", number, partial(run_peft_mixed, args, images, number, copies=1)


def report(args: argparse.Namespace, title: str, images: torch.Tensor, rows: Iterator[tuple[str, int, Create]]) -> None:
    """Measure and print one table."""
    bare = partial(forward, create_backbone(args), images)
    print(f"\n| {title} | tasks | ratio | ratio, processor time | ms | ms of the bare one in turn | pairs |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name, number, create in rows:
        if args.only not in name:
            continue
        measured = compare(create(), bare, args.repeats, args.device)
        gc.collect()  # a model's views refer to each other
        print(
            f"| {name} | {number} | {measured.wall:.3f} | {measured.processor:.3f} | {1000 * measured.seconds:.1f} "
            f"| {1000 * measured.reference_seconds:.1f} | {measured.pairs} |",
            flush=True,
        )


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    print(f"ViT-{args.size.capitalize()}/{args.patch_size}, {args.image_size} px, {args.device}")
    ranks = f"{masked_kinds(args)['LoRA'].r} masked and {args.rank} unmasked"
    print(f"{args.threads} threads, torch {torch.__version__}, {args.tokens} tokens a block, LoRA of rank {ranks}")
    images = random_images(args, args.batch_size)
    report(args, f"every task for {len(images)} images", images, every_task_rows(args, images))
    images = random_images(args, args.mixed_images)
    report(args, f"{len(images)} images, each with its own task", images, mixed_rows(args, images))


if __name__ == "__main__":
    main()
