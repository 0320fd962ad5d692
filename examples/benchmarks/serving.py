"""Requests a second of examples/serve.py, over HTTP on this machine, beside the same server on PEFT's `set_adapter`.

    python examples/benchmarks/serving.py --adapters 1 16 256 --clients 16 --requests 320

Each request is an image for one adapter, drawn at random. Both servers put requests together to batches in the same
way; memtune answers a batch in one pass (`rows=`), PEFT takes one for each adapter that the batch asks for, on that
adapter's images. Server and clients run in one process. Rounds of both come in turn; the ratio is the median over them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import uvicorn
from combine import create_peft
from PIL import Image
from speed import CLASSES, add_backbone_arguments, create_backbone
from torch import Tensor
from transformers import ViTImageProcessorPil

import memtune
from memtune import LoraConfig, MemoryConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from serve import Answers, Run, create_app

KINDS = {"memory": MemoryConfig(4), "memory and LoRA": [MemoryConfig(4), LoraConfig(r=4)]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser)
    add = parser.add_argument
    add("--method", choices=KINDS, default="memory", help="of memtune's masked adapters")
    add("--rank", type=int, default=8, help="of PEFT's LoRA")
    add("--adapters", type=int, nargs="+", default=[1, 16, 256])
    add("--clients", type=int, default=16, help="requests at a time")
    add("--requests", type=int, default=320, help="in a round")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    return parser.parse_args()


def create_model(args: argparse.Namespace, number: int) -> memtune.MultiTaskModel:
    backbone = create_backbone(args)
    processor = ViTImageProcessorPil(size={"height": args.image_size, "width": args.image_size})
    options = {"num_labels": CLASSES, "masked": True, "processor": processor}
    tasks = {f"task{task}": memtune.wrap(backbone, KINDS[args.method], **options) for task in range(number)}
    return memtune.combine(backbone, tasks)


def run_peft(args: argparse.Namespace, number: int) -> Run:
    """Answers a batch by PEFT: one pass for each adapter that is asked for."""
    model, _ = create_peft(args, number)

    @torch.no_grad()
    def run(pixel_values: Tensor, tasks: Sequence[tuple[str, ...]]) -> list[Answers]:
        answers: list[Answers] = [{} for _ in tasks]
        for name in dict.fromkeys(name for (name,) in tasks):
            model.set_adapter(name)
            rows = [row for row, (own,) in enumerate(tasks) if own == name]
            for row, logits in zip(rows, model(pixel_values=pixel_values[rows]).logits, strict=True):
                answers[row][name] = logits
        return answers

    return run


@contextmanager
def serving(model: memtune.MultiTaskModel, clients: int, run: Run | None = None) -> Iterator[int]:
    """A server on a port of this machine."""
    app = create_app(model, max_batch=clients, run=run)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def photo(size: int) -> bytes:
    file = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def rate(port: int, args: argparse.Namespace, number: int, seed: int) -> float:
    """Requests a second of a round."""
    drawn = random.Random(seed)
    names = [f"task{drawn.randrange(number)}" for _ in range(args.requests)]
    data, local = photo(args.image_size), threading.local()

    def ask(name: str) -> None:
        if not hasattr(local, "connection"):
            local.connection = HTTPConnection("127.0.0.1", port, timeout=120)
        local.connection.request("POST", f"/predict?task={name}", data, {"Content-Type": "image/jpeg"})
        response = local.connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise RuntimeError(body)

    start = time.perf_counter()
    with ThreadPoolExecutor(args.clients) as pool:
        list(pool.map(ask, names))
    return args.requests / (time.perf_counter() - start)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"ViT-{args.size}, {args.image_size} px, {args.clients} clients, {args.threads} threads, {args.device}")
    print("| adapters | memtune, requests a second | PEFT's `set_adapter` | ratio |\n| ---: | ---: | ---: | ---: |")
    for number in args.adapters:
        model = create_model(args, number)
        ours, theirs = [], []
        with (
            serving(model, args.clients) as port,
            serving(model, args.clients, run_peft(args, number)) as other,
        ):
            for seed in range(-1, args.rounds):  # the first is not counted
                rates = rate(port, args, number, seed), rate(other, args, number, seed)
                if seed >= 0:
                    ours.append(rates[0])
                    theirs.append(rates[1])
        ratio = statistics.median(one / two for one, two in zip(ours, theirs, strict=True))
        print(
            f"| {number} | {statistics.median(ours):.1f} | {statistics.median(theirs):.1f} | {ratio:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
