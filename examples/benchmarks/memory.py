"""How much memory a training step takes: growth of the peak over the idle process, a process for each kind.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py --sizes tiny base --batch_size 32
    python examples/benchmarks/memory.py --sizes base --device cuda --batch_size 32
    python examples/benchmarks/memory.py --quick                          # one run of each kind

The idle process has the libraries, the model and the batch, and has run one forward pass without gradients on one
image. Then it takes two training steps on the whole batch; with SlimFit so many that each unit is trained once. The
growth of the peak is reported, beside that of PEFT's LoRA: on the CPU of resident memory (Linux only,
`/proc/self/status`), on CUDA of what torch has allocated. Beside it stands what the forward pass kept for the backward
pass, in the step that kept most, parameters apart: that does not depend on the allocator. Weights are random and
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed import CLASSES, SIZES, create_backbone, create_lora, create_tuned, forward, training_step

import memtune
from memtune.callbacks import SlimFit, TokenTune


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", "--size", choices=SIZES, nargs="+", default=["small"], help="vision transformers, with 12 blocks")
    add("--batch_size", type=int, default=16)
    add("--image_size", type=int, default=224)
    add("--patch_size", type=int, default=16)
    add("--tokens", type=int, default=4, help="memory tokens in each block")
    add("--rank", type=int, default=8, help="of LoRA on queries and values")
    add("--freezing_rate", type=float, default=0.75, help="of SlimFit")
    add("--selected", type=int, default=16, help="tokens of each image that have gradients with TokenTune")
    add("--repeats", type=int, default=3, help="processes of each kind, of which the median counts")
    add("--threads", type=int, default=2)
    add("--device", default="cpu")
    add("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    add("--quick", action="store_true", help="one process of each kind")
    return parser.parse_args()


@dataclass(frozen=True)
class Kind:
    """What a process does: the model that it trains, and how."""

    name: str
    create: Callable[[argparse.Namespace], Any]
    slimfit: bool = False
    tokentune: bool = False
    trains: bool = True


def create_head(args: argparse.Namespace) -> memtune.TunedModel:
    config = memtune.MemoryConfig(tokens=0, class_token=False)
    return memtune.wrap(create_backbone(args), config, num_labels=CLASSES)


def create_own_lora(args: argparse.Namespace) -> memtune.TunedModel:
    config = memtune.LoraConfig(args.rank, roles=("query", "value"))
    return memtune.wrap(create_backbone(args), config, num_labels=CLASSES)


_memory = partial(create_tuned, masked=False)

KINDS = {
    "forward": Kind("forward pass of the frozen backbone", create_backbone, trains=False),
    "head": Kind("head only", create_head),
    "masked": Kind("masked memory", partial(create_tuned, masked=True)),
    "unmasked": Kind("unmasked memory", _memory),
    "unmasked_slimfit": Kind("unmasked memory, SlimFit", _memory, slimfit=True),
    "unmasked_tokentune": Kind("unmasked memory, TokenTune", _memory, tokentune=True),
    "unmasked_both": Kind("unmasked memory, SlimFit and TokenTune", _memory, slimfit=True, tokentune=True),
    "own_lora": Kind("LoRA", create_own_lora),
    "own_lora_slimfit": Kind("LoRA, SlimFit", create_own_lora, slimfit=True),
    "own_lora_tokentune": Kind("LoRA, TokenTune", create_own_lora, tokentune=True),
    "own_lora_both": Kind("LoRA, SlimFit and TokenTune", create_own_lora, slimfit=True, tokentune=True),
    "lora": Kind("PEFT LoRA", create_lora),
    "lora_slimfit": Kind("PEFT LoRA, SlimFit", create_lora, slimfit=True),
    "full": Kind("full fine-tuning", create_backbone),
    "full_slimfit": Kind("full fine-tuning, SlimFit", create_backbone, slimfit=True),
}


def _status(field: str) -> int:
    """A number of bytes in this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def reset_peak(args: argparse.Namespace) -> int:
    """Let the peak start anew from what is there now, and give that, in bytes."""
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    idle = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return idle


def peak(args: argparse.Namespace) -> int:
    """The peak since, in bytes."""
    return torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else _status("VmHWM")


@contextmanager
def count_kept(model: torch.nn.Module, counts: list[int]) -> Iterator[None]:
    """Within, count the bytes of the distinct tensors that autograd keeps, parameters apart."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield
    counts.append(sum(sizes.values()))


def measure(kind: Kind, args: argparse.Namespace) -> tuple[int, int]:
    """Growth of this process's peak by the training steps of one kind, and the most that one kept, in bytes."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    model = kind.create(args)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.randint(CLASSES, (args.batch_size,), device=args.device)
    forward(model, images[:1])
    idle = reset_peak(args)
    if not kind.trains:
        forward(model, images)
        return peak(args) - idle, 0
    step = training_step(model, images, labels)
    callbacks: list[Any] = [SlimFit(args.freezing_rate)] if kind.slimfit else []
    callbacks += [TokenTune(args.selected)] if kind.tokentune else []
    counts: list[int] = []
    for _ in range(max(2, math.ceil(1 / (1 - args.freezing_rate))) if kind.slimfit else 2):
        for callback in callbacks:
            callback.on_step_begin(model)
        with count_kept(model, counts):
            step()
        for callback in callbacks:
            callback.on_step_end(model)
    return peak(args) - idle, max(counts)


def table(size: str, args: argparse.Namespace) -> None:
    """Measure each kind in processes of its own, and print the table of one size."""
    print(
        f"{args.image_size} px, batch {args.batch_size}, {args.device}, torch {torch.__version__}; SlimFit freezes "
        f"{args.freezing_rate:.0%}, TokenTune selects {args.selected} tokens\n"
    )
    growth, kept = {}, {}
    for kind in args.kinds:
        command = [sys.executable, __file__, *sys.argv[1:], "--sizes", size, "--kinds", kind, "--repeats", "0"]
        runs = [
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for _ in range(1 if args.quick else args.repeats)
        ]
        growth[kind], kept[kind] = (
            statistics.median(each) for each in zip(*(map(int, run.split()) for run in runs), strict=True)
        )
    print(f"| ViT-{size.capitalize()}/{args.patch_size}, training step | MB | of PEFT LoRA's | kept, MB |")
    print("| --- | ---: | ---: | ---: |")
    for kind, value in growth.items():
        ratio = f"{value / growth['lora']:.3f}" if "lora" in growth else ""
        print(f"| {KINDS[kind].name} | {value / 1e6:.0f} | {ratio} | {kept[kind] / 1e6:.0f} |")
    print(flush=True)


def main() -> None:
    args = parse_arguments()
    if args.repeats == 0:  # a process that measures
        args.size = args.sizes[0]
        print(*measure(KINDS[args.kinds[0]], args))
        return
    for size in args.sizes:
        table(size, args)


if __name__ == "__main__":
    main()
