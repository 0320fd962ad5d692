"""How many kernels a pass launches: on a GPU each costs its launch, however little it computes.

    python examples/benchmarks/launches.py
    python examples/benchmarks/launches.py --tasks 1 16 --batch_size 8

Counted are ATen's operations that are no views, by a `TorchDispatchMode`, as any machine can do it; and beside them the
multiply-adds. What one operation does inside, a copy for a layout that its kernel needs, say, is not seen. Each row is
also given as so many times the bare backbone's pass over the same images. Weights are random.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from combine import create_peft
from speed import CLASSES, add_backbone_arguments, create_backbone
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import memtune
from memtune import LoraConfig, MemoryConfig, SideNetworkConfig

MASKED = {
    "memory": MemoryConfig(4),
    "memory and LoRA": [MemoryConfig(4), LoraConfig(r=4)],
    "memory and side network": [MemoryConfig(4), SideNetworkConfig()],
    "side network, pooled": SideNetworkConfig(readout="pool"),
}

_VIEWS = {"aten::_unsafe_view", "aten::_reshape_alias", "aten::promote_types"}
"""Operations that launch nothing, though torch does not call them views."""


class Launches(TorchDispatchMode):
    """Counts the operations that are no views.

    Attributes:
        counts: How often each was called, by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name not in _VIEWS:
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], object]) -> tuple[Counter[str], int]:
    """The kernels that something launches, by name, and its multiply-adds; after one run that is not counted."""
    run()
    with FlopCounterMode(display=False) as flops:
        run()
    with Launches() as launches:
        run()
    return launches.counts, flops.get_total_flops() // 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser)
    add = parser.add_argument
    add("--batch_size", type=int, default=8)
    add("--tasks", type=int, nargs="+", default=[1, 4, 16, 64])
    add("--rank", type=int, default=8, help="of PEFT's LoRA")
    add("--device", default="cpu")
    return parser.parse_args()


def run_combined(args: argparse.Namespace, images: torch.Tensor, config: Any, number: int, *, mixed: bool) -> Any:
    """What runs a pass of several tasks: all of them for each image, or one for each image in turn."""
    backbone = create_backbone(args)
    sources = {str(task): memtune.wrap(backbone, config, num_labels=CLASSES, masked=True) for task in range(number)}
    model = memtune.combine(backbone, sources)
    rows = [str(image % number) for image in range(len(images))] if mixed else None
    return partial(model, images, rows=rows)


def cached_step(args: argparse.Namespace, images: torch.Tensor, config: Any) -> Callable[[], object]:
    """What runs forward and backward over a pass of the trunk that is there already."""
    model = memtune.wrap(create_backbone(args), config, num_labels=CLASSES, masked=True).train()
    trunk, labels = model.trunk_pass(images), torch.zeros(len(images), dtype=torch.long, device=images.device)

    def run() -> None:
        model(trunk=trunk, labels=labels).loss.backward()
        model.zero_grad()

    return run


def run_peft(args: argparse.Namespace, images: torch.Tensor) -> Callable[[], object]:
    """What runs a pass of one adapter of PEFT."""
    model, _ = create_peft(args, 1)
    return torch.no_grad()(partial(model, pixel_values=images))


def rows(args: argparse.Namespace, images: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is counted, by its name: what makes it."""
    found: dict[str, Callable[[], Any]] = {}
    for name, config in MASKED.items():
        for number in args.tasks:
            found[f"{number} of {name}"] = partial(run_combined, args, images, config, number, mixed=False)
    for name, config in MASKED.items():
        number = min(max(args.tasks), len(images))
        found[f"mixed batch, {number} of {name}"] = partial(run_combined, args, images, config, number, mixed=True)
    for name, config in MASKED.items():
        found[f"cached training step, {name}"] = partial(cached_step, args, images, config)
    return found | {"PEFT's LoRA": partial(run_peft, args, images)}


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    bare, adds = count(torch.no_grad()(partial(create_backbone(args), images)))
    print(f"ViT-{args.size}/{args.patch_size}, {args.image_size} px, {args.batch_size} images, {args.device}\n")
    print("| | kernels | of a bare pass | multiply-adds, G | of a bare pass |\n| --- | ---: | ---: | ---: | ---: |")
    print(f"| the bare backbone | {bare.total()} | 1 | {adds / 1e9:.2f} | 1 |")
    for name, create in rows(args, images).items():
        own, own_adds = count(create())
        print(
            f"| {name} | {own.total()} | {own.total() / bare.total():.2f} | {own_adds / 1e9:.2f} "
            f"| {own_adds / adds:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
