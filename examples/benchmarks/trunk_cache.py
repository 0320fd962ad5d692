"""How much faster masked training is from a trunk cache than LoRA of PEFT: a table of ratios, measured in one process.

    python examples/benchmarks/trunk_cache.py --images 128
    python examples/benchmarks/trunk_cache.py --model_name_or_path google/vit-base-patch16-224 --train_dir pets/train

Without `--train_dir` images are generated, without `--model_name_or_path` the weights are random: time depends on
neither. An epoch of PEFT's LoRA and a second epoch of memtune from the cache take turns, both with the same images,
processor, batch size, precision, optimizer and loop over Accelerate; the ratio is of their medians. A whole run is one
that fills an empty cache first; those of LoRA are its epochs' median times their number (it has no more to do).
`--processor_time` counts only the time in which the process ran, for a machine on which others run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
from accelerate import Accelerator
from PIL import Image
from speed import SIZES
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import memtune
from memtune.data.images import Collator, ImageDataset
from memtune.training.callbacks import TrainingCallback

METHODS: dict[str, memtune.AdapterConfig] = {"memory": memtune.MemoryConfig(4), "lora": memtune.LoraConfig(r=8)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="a backbone; by default a vision transformer with random weights")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of that one")
    parser.add_argument("--image_size", type=int, default=224, help="of that one, in pixels")
    parser.add_argument("--attn_implementation", help="the backbone's attention kernel")
    parser.add_argument("--train_dir", help="a folder with one folder of images for each class")
    parser.add_argument("--images", type=int, default=256, help="how many to generate, or to take of the folder")
    parser.add_argument("--method", nargs="+", default=["memory"], choices=METHODS, help="of memtune, masked")
    parser.add_argument("--rank", type=int, default=8, help="of PEFT's LoRA on queries and values")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--mixed_precision", default="bf16", choices=["no", "bf16"])
    parser.add_argument("--trunk_cache_dtype", default="bfloat16")
    parser.add_argument("--num_train_epochs", type=int, default=20, help="of the whole run")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of epochs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor_time", action="store_true", help="not the time that passed")
    return parser.parse_args()


def create_backbone(args: argparse.Namespace) -> tuple[Any, Any]:
    """A backbone of its own, and the image processor."""
    name = args.model_name_or_path
    options = {"attn_implementation": args.attn_implementation}
    if name:
        processor = AutoImageProcessor.from_pretrained(name)
        return AutoModelForImageClassification.from_pretrained(name, **options), processor
    torch.manual_seed(0)
    config = ViTConfig(image_size=args.image_size, **SIZES[args.size], **options)
    size = {"height": args.image_size, "width": args.image_size}
    return ViTForImageClassification(config), ViTImageProcessorPil(size=size)


def load_images(args: argparse.Namespace, folder: Path) -> datasets.Dataset:
    """The images of `--train_dir`, or generated ones of ten classes."""
    if args.train_dir:
        data = datasets.load_dataset("imagefolder", data_dir=args.train_dir, split="train")
        return data.shuffle(seed=0).select(range(min(args.images, len(data))))
    random = np.random.default_rng(0)
    for index in range(args.images):
        path = folder / "images" / str(index % 10) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(path)
    return datasets.load_dataset("imagefolder", data_dir=str(folder / "images"), split="train")


def lora_epoch(args: argparse.Namespace, data: datasets.Dataset) -> Callable[[], None]:
    """A function that trains PEFT's LoRA for one epoch, as `memtune.fit` trains."""
    backbone, processor = create_backbone(args)
    classes = data.features["label"].num_classes
    backbone.classifier = torch.nn.Linear(backbone.config.hidden_size, classes)
    config = peft.LoraConfig(r=args.rank, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(backbone, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loader = DataLoader(ImageDataset(data, processor), args.batch_size, shuffle=True, collate_fn=Collator(classes))
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-3), loader)

    def epoch() -> None:
        model.train()
        for batch in loader:
            loss = cross_entropy(model(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"])
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return epoch


class Steps(TrainingCallback):
    """Notes when each step ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.ends: list[float] = []
        self._clock = clock

    def on_step_end(self, model: memtune.TunedModel) -> None:
        self.ends.append(self._clock())


def masked_run(
    args: argparse.Namespace, data: datasets.Dataset, cache: Path, clock: Callable[[], float]
) -> Callable[[int], list[float]]:
    """A function that trains a new masked task for some epochs from the cache; it gives when each step ended."""
    backbone, processor = create_backbone(args)

    def run(epochs: int) -> list[float]:
        methods = [METHODS[name] for name in args.method]
        labels = data.features["label"].names
        model = memtune.wrap(backbone, methods, labels=labels, masked=True, processor=processor)
        config = memtune.TrainingConfig(
            num_train_epochs=epochs,
            per_device_train_batch_size=args.batch_size,
            mixed_precision=args.mixed_precision,
            trunk_cache=cache,
            trunk_cache_dtype=args.trunk_cache_dtype,
            disable_tqdm=True,
        )
        steps = Steps(clock)
        memtune.fit(model, data, config=config, callbacks=[steps])
        return steps.ends

    return run


def measure(args: argparse.Namespace, folder: Path) -> tuple[float, list[float], list[float]]:
    """Seconds of the run that fills the cache, of second epochs from the cache, and of PEFT's LoRA's epochs."""
    clock = time.process_time if args.processor_time else time.perf_counter

    def seconds(function: Callable[..., object], *arguments: Any) -> float:
        start = clock()
        function(*arguments)
        return clock() - start

    def second_epoch() -> float:
        ends = masked(2)
        return ends[-1] - ends[len(ends) // 2 - 1]

    data = load_images(args, folder)
    lora, masked = lora_epoch(args, data), masked_run(args, data, folder / "cache", clock)
    whole = seconds(masked, args.num_train_epochs)
    pairs = [(second_epoch(), seconds(lora)) for _ in range(args.pairs)]
    cached, reference = map(list, zip(*pairs, strict=True))
    return whole, cached, reference


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        whole, cached, reference = measure(args, Path(folder))
        size = sum(path.stat().st_size for path in (Path(folder) / "cache").rglob("*.safetensors"))
    epoch, lora = statistics.median(cached), statistics.median(reference)
    print(f"{args.images} images, masked {' and '.join(args.method)}, {args.trunk_cache_dtype}, {size / 1e9:.2f} GB,")
    print(f"batch {args.batch_size}, {args.mixed_precision}, {args.threads} threads, torch {torch.__version__}\n")
    print("| measure | memtune, s | PEFT LoRA, s | times as fast |")
    print("| --- | ---: | ---: | ---: |")
    print(f"| a second epoch, from the cache | {epoch:.2f} | {lora:.2f} | {lora / epoch:.1f} |")
    rest, number = lora * args.num_train_epochs, args.num_train_epochs
    print(f"| {number} epochs, the filling of the cache included | {whole:.2f} | {rest:.2f} | {rest / whole:.1f} |")


if __name__ == "__main__":
    main()
