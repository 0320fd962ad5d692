"""How many bytes of gradients the processes of one step exchange: what is trained, and nothing of the frozen backbone.

    python examples/benchmarks/communication.py
    python examples/benchmarks/communication.py --sizes tiny base
    python examples/benchmarks/communication.py --quick                   # two small blocks, 32 px

Starts two processes on the CPU (gloo), prepares each model by Accelerate as `memtune.fit` does, and counts in a
communication hook of torch's DistributedDataParallel what each step gives to be summed over the processes. Beside it
stands the number of trained values in float32. Weights are random and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from speed import CLASSES, SIZES
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import ViTConfig, ViTForImageClassification

import memtune


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", "--size", choices=SIZES, nargs="+", default=["base"], help="vision transformers, with 12 blocks")
    add("--processes", type=int, default=2)
    add("--batch_size", type=int, default=1, help="of each process")
    add("--steps", type=int, default=3)
    add("--tokens", type=int, default=4, help="memory tokens in each block")
    add("--rank", type=int, default=8, help="of LoRA on queries and values")
    add("--quick", action="store_true", help="two blocks, images of 32 px")
    return parser.parse_args()


def start_processes(number: int) -> None:
    """Become `number` processes that run this program."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def create_backbone(size: str, args: argparse.Namespace) -> ViTForImageClassification:
    """A vision transformer with random weights, the same in each process."""
    shape: dict[str, Any] = SIZES[size] | {"image_size": 32 if args.quick else 224}
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(num_hidden_layers=2 if args.quick else 12, patch_size=16, num_labels=CLASSES, **shape)
    )


def create_models(size: str, args: argparse.Namespace) -> dict[str, Callable[[], torch.nn.Module]]:
    """What to train, by name."""

    def tuned(config: memtune.AdapterConfig, masked: bool) -> torch.nn.Module:
        return memtune.wrap(create_backbone(size, args), config, num_labels=CLASSES, masked=masked)

    memory, lora = memtune.MemoryConfig(args.tokens), memtune.LoraConfig(args.rank)
    return {
        "masked memory": lambda: tuned(memory, masked=True),
        "unmasked memory": lambda: tuned(memory, masked=False),
        "LoRA": lambda: tuned(lora, masked=False),
        "full fine-tuning": lambda: create_backbone(size, args),
    }


def count_step(accelerator: Accelerator, model: torch.nn.Module, args: argparse.Namespace) -> list[int]:
    """Bytes that each step of a model sums over the processes."""
    sent: list[int] = []

    def count(state, bucket):  # without types, which torch would read, and as text refuse
        sent[-1] += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    prepared, optimizer = accelerator.prepare(model.train(), torch.optim.SGD(trained, 0.01))
    prepared.register_comm_hook(None, count)
    side = 32 if args.quick else 224
    images = torch.randn(args.batch_size, 3, side, side)
    labels = torch.randint(CLASSES, (args.batch_size,))
    for _ in range(args.steps):
        sent.append(0)
        accelerator.backward(prepared(pixel_values=images, labels=labels).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.free_memory()
    return sent


def main() -> None:
    args = parse_arguments()
    if "LOCAL_RANK" not in os.environ:
        start_processes(args.processes)
    accelerator = Accelerator(cpu=True)
    for size in args.sizes:
        accelerator.print(
            f"{accelerator.num_processes} processes, {accelerator.distributed_type.value}, gloo, float32\n"
        )
        accelerator.print(f"| ViT-{size.title()}/16, one step | bytes | trained values x 4 | of full fine-tuning's |")
        accelerator.print("| --- | ---: | ---: | ---: |")
        rows = {}
        for name, create in create_models(size, args).items():
            model = create()
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            rows[name] = set(count_step(accelerator, model, args)), 4 * trained
        (full,), _ = rows["full fine-tuning"]
        for name, (each, expected) in rows.items():
            (sent,) = each  # every step the same
            accelerator.print(f"| {name} | {sent:,} | {expected:,} | {sent / full:.4%} |")
        accelerator.print()
    accelerator.end_training()


if __name__ == "__main__":
    main()
