"""How much memory a training step takes: growth of the peak over the idle process, a process for each kind.

    python examples/benchmarks/memory.py

The idle process has the libraries, the model and the batch, and has run one forward pass without gradients on one
image. Then it takes two training steps on the whole batch; the growth of its peak resident memory is reported, beside
that of PEFT's LoRA. Linux only (`/proc/self/status`); weights are random and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from speed import CLASSES, create_backbone, create_lora, create_tuned, forward, parse_arguments, training_step

KINDS = {
    "forward": "forward pass of the frozen backbone",
    "masked": "masked memory, training step",
    "lora": "PEFT LoRA, training step",
    "unmasked": "unmasked memory, training step",
    "full": "full fine-tuning, training step",
}


def peak() -> int:
    """Peak resident memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def resident() -> int:
    """Resident memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def measure(kind: str, args: argparse.Namespace) -> int:
    """Growth of this process's peak by training steps of one kind, in bytes."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    create = {"lora": create_lora, "forward": create_backbone, "full": create_backbone}.get(kind)
    model = create(args) if create else create_tuned(args, masked=kind == "masked")
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    labels = torch.randint(CLASSES, (args.batch_size,))
    forward(model, images[:1])
    idle = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    if kind == "forward":
        forward(model, images)
    else:
        step = training_step(model, images, labels)
        step(), step()
    return peak() - idle


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in KINDS:
        kind = sys.argv.pop(1)
        print(measure(kind, parse_arguments()))
        return
    args = parse_arguments()
    growth = {}
    for kind in KINDS:
        command = [sys.executable, __file__, kind, *sys.argv[1:]]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
        growth[kind] = statistics.median(int(run) for run in runs)
    print(
        f"ViT-{args.size.capitalize()}/{args.patch_size}, {args.image_size} px, batch {args.batch_size}, on the CPU\n"
    )
    print("| peak memory over the idle process | MB | of PEFT LoRA's |")
    print("| --- | ---: | ---: |")
    for kind, name in KINDS.items():
        print(f"| {name} | {growth[kind] / 1e6:.0f} | {growth[kind] / growth['lora']:.3f} |")


if __name__ == "__main__":
    main()
