"""The tables of docs/benchmarks.md on one GPU, in bf16, within six minutes; resumable.

    python examples/benchmarks/gpu.py --output_dir gpu
    python examples/benchmarks/gpu.py --output_dir gpu --device cpu --quick      # that it runs, on any machine

Everything is self-contained: weights are random, nothing is downloaded. Each measurement is a line of `results.jsonl`
in the output folder as soon as it is there, and is not done again; `--seconds` ends the script before a machine is
taken away. `tables.md` is made of what there is, with the device's name.

- forward passes of 1 to 64 masked tasks over batches of 1, 8 and 64 images, over a bare pass of the same kind: eager,
  and captured in a CUDA graph, in which a launch costs nothing;
- training steps: masked from a trunk pass that is there already, PEFT's LoRA, and the peak of memory of each;
- what a process of its own is for (NCCL, FSDP2) is in tests/training, which `accelerate launch` runs on GPUs as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from combine import create_peft
from launches import MASKED, cached_step, run_combined
from speed import create_backbone

Run = Callable[[], object]

BATCHES = (1, 8, 64)
TASKS = (1, 4, 16, 64)
TRAINED = 64
"""Images of a training step."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True)
    add("--device", default="cuda")
    add("--seconds", type=float, default=330, help="begin nothing new after these")
    add("--quick", action="store_true", help="the smallest of everything")
    args = parser.parse_args()
    args.sizes = ["tiny"] if args.quick else ["small", "base", "large"]
    args.batches, args.tasks = ((1,), (1, 2)) if args.quick else (BATCHES, TASKS)
    args.trained = 2 if args.quick else TRAINED
    args.dtype = torch.bfloat16
    args.image_size, args.patch_size, args.rank = 32 if args.quick else 224, 16, 8
    return args


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def milliseconds(run: Run, device: str, rounds: int = 20, most: float = 1.0) -> float:
    """The median of some rounds, after three that are not counted; fewer where these would take more than `most` s."""
    times: list[float] = []
    begin = time.perf_counter()
    for number in range(3 + rounds):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        if number >= 3:
            times.append(1000 * (time.perf_counter() - start))
        if times and time.perf_counter() - begin > most:
            break
    return statistics.median(times)


def captured(run: Run) -> Run:
    """The same as a CUDA graph, which is launched at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        run()
    return graph.replay


def images_of(args: argparse.Namespace, number: int) -> torch.Tensor:
    shape = number, 3, args.image_size, args.image_size
    return torch.randn(shape, device=args.device, dtype=args.dtype)


def passes(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], Run]]]:
    """What is measured of forward passes: its description, and what makes it."""
    for size in args.sizes:
        own = argparse.Namespace(**vars(args) | {"size": size})
        for batch in args.batches:
            images = images_of(args, batch)
            yield {"size": size, "batch": batch, "what": "bare", "tasks": 0}, partial(bare, own, images)
            for name, config in MASKED.items():
                for number in args.tasks:
                    described = {"size": size, "batch": batch, "what": name, "tasks": number}
                    yield described, partial(run_combined, own, images, config, number, mixed=False)


def bare(args: argparse.Namespace, images: torch.Tensor) -> Run:
    return torch.no_grad()(partial(create_backbone(args), images))


def steps(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], Run]]]:
    """What is measured of training."""
    for size in args.sizes[:2]:
        own = argparse.Namespace(**vars(args) | {"size": size})
        images = images_of(args, args.trained)
        described = {"size": size, "batch": args.trained, "tasks": 1}
        for name, config in MASKED.items():
            yield described | {"what": f"cached step, {name}"}, partial(cached_step, own, images, config)
        yield described | {"what": "step of PEFT's LoRA"}, partial(peft_step, own, images)


def peft_step(args: argparse.Namespace, images: torch.Tensor) -> Run:
    model, _ = create_peft(args, 1)
    model.to(args.dtype).train()
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def run() -> None:
        model(pixel_values=images, labels=labels).loss.backward()
        model.zero_grad()

    return run


def measure(args: argparse.Namespace, described: dict[str, Any], create: Callable[[], Run]) -> dict[str, Any]:
    """A line of results; what cannot be run has a problem in place of times."""
    cuda = args.device.startswith("cuda")
    found = dict(described)
    try:
        run = create()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        found["ms"] = milliseconds(run, args.device)
        if cuda:
            found["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
            if "step" not in described["what"]:
                found["captured_ms"] = milliseconds(captured(run), args.device)
    except RuntimeError as error:  # out of memory, or what cannot be captured
        found["problem"] = f"{type(error).__name__}: {error}"[:300]
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found


def tables(results: list[dict[str, Any]], device: str) -> str:
    """What was measured, for people."""
    bare = {(each["size"], each["batch"]): each for each in results if each["what"] == "bare"}
    lines = [f"{device}, torch {torch.__version__}, bf16", ""]
    lines += ["| ViT | images | | tasks | ms | of a bare pass | captured, ms | of a bare one | peak, MB |"]
    lines += ["| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]

    def ratio(each: dict[str, Any], name: str) -> str:
        other = bare.get((each["size"], each["batch"]), {}).get(name)
        return f"{each[name]:.2f} | {each[name] / other:.2f}" if name in each and other else f"{each.get(name, '')} |"

    for each in results:
        times = f"{ratio(each, 'ms')} | {ratio(each, 'captured_ms')} | {each.get('peak_mb', 0):.0f}"
        shown = each.get("problem", "") or times
        lines.append(f"| {each['size']} | {each['batch']} | {each['what']} | {each['tasks']} | {shown} |")
    return "\n".join([*lines, ""])


def main() -> None:
    args = parse_arguments()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path, start = args.output_dir / "results.jsonl", time.monotonic()
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(each["size"], each["batch"], each["what"], each["tasks"]) for each in results}
    for described, create in (each for kind in (steps, passes) for each in kind(args)):
        if tuple(described[name] for name in ("size", "batch", "what", "tasks")) in done:
            continue
        if time.monotonic() - start > args.seconds:
            print("the time is over; the same command goes on")
            break
        results.append(measure(args, described, create))
        with path.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    (args.output_dir / "tables.md").write_text(tables(results, device))
    print(tables(results, device))


if __name__ == "__main__":
    main()
