"""How much time memory tokens add: a table of ratios, each of medians of pairs measured in turn in one process.

    python examples/benchmarks/speed.py
    python examples/benchmarks/speed.py --size base --device cuda --batch_size 64

Weights are random, since time does not depend on their values; nothing is downloaded. A ratio is of the medians of two
things that ran one after the other, pair by pair, so that a busy machine slows both. On a very busy one, threads wait
for each other most of the time; then `--threads 1 --processor_time` counts only the time in which the process ran.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

import memtune

SIZES = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24},
}
CLASSES = 10


def add_backbone_arguments(parser: argparse.ArgumentParser, size: str = "small") -> None:
    """Add the options that say what `create_backbone` makes."""
    parser.add_argument("--size", choices=SIZES, default=size, help="the vision transformer")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4, help="memory tokens in each block")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA of PEFT to compare with")
    parser.add_argument("--pairs", type=int, default=15, help="pairs measured of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor_time", action="store_true", help="not the time that passed")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def create_backbone(args: argparse.Namespace) -> ViTForImageClassification:
    """A vision transformer with random weights, in evaluation mode; in the type that the arguments name, if they do."""
    config = ViTConfig(image_size=args.image_size, patch_size=args.patch_size, num_labels=CLASSES, **SIZES[args.size])
    return ViTForImageClassification(config).eval().to(args.device, getattr(args, "dtype", None))


def create_tuned(args: argparse.Namespace, *, masked: bool) -> memtune.TunedModel:
    """A backbone of its own with memory tokens."""
    config = memtune.MemoryConfig(tokens=args.tokens)
    return memtune.wrap(create_backbone(args), config, num_labels=CLASSES, masked=masked)


def create_lora(args: argparse.Namespace) -> torch.nn.Module:
    """A backbone of its own with PEFT's LoRA on queries and values, and a trained head."""
    import peft

    config = peft.LoraConfig(r=args.rank, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(create_backbone(args), config)


def forward(model: Callable[..., Any], images: torch.Tensor) -> None:
    """A forward pass without gradients."""
    with torch.no_grad():
        model(pixel_values=images)


def training_step(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A function that takes one step of AdamW on all that is trainable."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(run: Callable[[], None], args: argparse.Namespace) -> float:
    """The time that one call takes."""
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    clock = time.process_time if args.processor_time else time.perf_counter
    synchronize()
    start = clock()
    run()
    synchronize()
    return clock() - start


def compare(run: Callable[[], None], reference: Callable[[], None], args: argparse.Namespace) -> tuple[float, ...]:
    """Ratio of the medians of `run` and `reference`, and both medians in seconds."""
    for _ in range(2):
        run(), reference()
    pairs = []
    for index in range(args.pairs):  # the first of a pair in turn, so that neither always follows the other
        order = (run, reference) if index % 2 else (reference, run)
        times = [seconds(each, args) for each in order]
        pairs.append(times if index % 2 else times[::-1])
    median, reference_median = (statistics.median(times) for times in zip(*pairs, strict=True))
    return median / reference_median, median, reference_median


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.randint(CLASSES, (args.batch_size,), device=args.device)
    bare = partial(forward, create_backbone(args), images)
    unmasked, masked = (create_tuned(args, masked=mode) for mode in (False, True))
    rows = {
        "unmasked memory, forward pass": partial(forward, unmasked.eval(), images),
        "masked memory, forward pass": partial(forward, masked.eval(), images),
    }
    # one at a time, since each keeps the gradients and the optimizer's moments of its own model
    steps = {
        "masked memory, training step": lambda: create_tuned(args, masked=True),
        "unmasked memory, training step": lambda: create_tuned(args, masked=False),
        f"PEFT LoRA (r = {args.rank}, query and value), training step": lambda: create_lora(args),
        "full fine-tuning, training step": lambda: create_backbone(args),
    }
    print(
        f"ViT-{args.size.capitalize()}/{args.patch_size}, {args.image_size} px, batch {args.batch_size}, {args.device}"
    )
    print(f"with {args.threads} threads, torch {torch.__version__}, {args.pairs} pairs, {args.tokens} tokens a block\n")
    print("| against a forward pass of the bare backbone | ratio | ms | ms of the bare one in turn |")
    print("| --- | ---: | ---: | ---: |")
    for name, run in rows.items():
        report(name, compare(run, bare, args))
    for name, create in steps.items():
        report(name, compare(training_step(create(), images, labels), bare, args))


def report(name: str, measured: tuple[float, ...]) -> None:
    ratio, median, reference = measured
    print(f"| {name} | {ratio:.3f} | {1000 * median:.1f} | {1000 * reference:.1f} |", flush=True)


if __name__ == "__main__":
    main()
