"""What a reader of the documentation has: a backbone, images, adapters in folders and on a Hub, and names for them."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import safetensors.torch
import torch
from hub_server import Hub
from hub_store import Repository
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import memtune

BACKBONE = "google/vit-base-patch16-224-in21k"
"""The backbone that the documentation names; here a tiny one has this name."""

TIMM = Path("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")
"""The same of timm's, with random values, where timm is installed."""

LABELS = ["red", "green", "blue", "yellow", "cyan", "magenta", "white", "black", "grey", "brown"]
SHADES = np.random.default_rng(0).integers(0, 156, (len(LABELS), 3))

ADAPTERS: dict[str, tuple[memtune.AdapterConfig, bool, list[str]]] = {
    "desk/pets-lora": (memtune.LoraConfig(r=2), True, ["cat", "dog"]),
    "desk/birds-lora": (memtune.LoraConfig(r=2), True, ["wren", "robin"]),
    "desk/my-adapter": (memtune.MemoryConfig(4), False, LABELS),
    "hub/me/vit-flowers-lora": (memtune.LoraConfig(r=2), False, ["rose", "tulip"]),
    "hub/me/vit-flowers-memory": (memtune.MemoryConfig(4), True, ["rose", "tulip"]),
    "hub/me/vit-signs-memory": (memtune.MemoryConfig(4), True, ["stop", "go"]),
    "hub/user/pets-adapter": (memtune.MemoryConfig(4), True, ["cat", "dog"]),
    "hub/user/flowers-adapter": (memtune.MemoryConfig(4), True, ["rose", "tulip"]),
}
"""The adapters that the documentation names: settings, whether masked, and labels."""


def tiny_vit(width: int = 128) -> ViTForImageClassification:
    """A backbone with as many blocks as CODA prompts change, and as wide as their pool of 100 needs."""
    shape: dict[str, Any] = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**shape, num_hidden_layers=5, image_size=32, patch_size=8)).eval()


def picture(label: int, seed: int) -> Image.Image:
    """Noise in the shade of a class."""
    pixels = np.random.default_rng(seed).integers(0, 100, (32, 32, 3)) + SHADES[label]
    return Image.fromarray(pixels.astype(np.uint8))


def pictures(names: list[str], number: int, seed: int) -> datasets.Dataset:
    """So many images of each class."""
    labels = list(range(len(names))) * number
    images = [picture(label, seed + place) for place, label in enumerate(labels)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def make_material(folder: Path) -> None:
    """Write the files on a reader's desk into `desk`, and the repositories of the Hub into `hub/<owner>/<name>`."""
    saved = folder / "hub" / BACKBONE
    tiny_vit().save_pretrained(saved)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(saved)
    backbone = AutoModelForImageClassification.from_pretrained(saved)
    for path, (config, masked, labels) in ADAPTERS.items():
        model = memtune.wrap(backbone, config, labels=labels, masked=masked, processor=processor)
        model.save_pretrained(folder / path, base_model_name=BACKBONE)
        model.detach()
    if find_spec("timm") is not None:
        _save_timm(folder / "hub" / TIMM)
    desk = folder / "desk"
    for split, count in (("train", 8), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                path = desk / "pets" / split / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(label, number).save(path)
    shutil.copytree(desk / "pets" / "test" / "cat", desk / "photos")
    for place, name in enumerate(("cat.jpg", "dog.jpg", "sign.png")):
        picture(place, place).save(desk / name)


def _save_timm(folder: Path) -> None:
    """Write a repository as those of timm on the Hub are."""
    import timm

    model = timm.create_model(TIMM.name.split(".")[0])
    config = {name: model.pretrained_cfg[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    config = {"architecture": TIMM.name.split(".")[0], "num_classes": model.num_classes, "pretrained_cfg": config}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def publish(hub: Hub, repo_id: str, folder: Path) -> None:
    """Make a folder a public repository."""
    repository = hub.repositories[repo_id] = Repository(private=False)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    repository.commit("main", files, None, "first")


def names(width: int | None) -> dict[str, Any]:
    """What the documentation's code takes as given.

    Args:
        width: Of the backbone, where the code has one written out; None for the tiny one of the Hub.
    """
    backbone = AutoModelForImageClassification.from_pretrained(BACKBONE) if width is None else tiny_vit(width)
    processor = AutoImageProcessor.from_pretrained(BACKBONE)
    pixel_values = torch.randn(4, 3, 32, 32)
    targets = torch.arange(4)
    shape: dict[str, Any] = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "decoder_hidden_size": 8, "num_labels": 3}
    segmenter = SegformerForSemanticSegmentation(SegformerConfig(**shape))
    cats_and_dogs = pictures(["cat", "dog"], 6, 1)
    given = {"memtune": memtune, "torch": torch, "peft": peft, "backbone": backbone, "processor": processor}
    given |= {"labels": LABELS, "train": pictures(LABELS, 2, 2), "test": pictures(LABELS, 1, 3)}
    given |= {"train_dataset": cats_and_dogs, "eval_dataset": cats_and_dogs, "data": cats_and_dogs}
    given |= {"pixel_values": pixel_values, "targets": targets, "images": pixel_values}
    given |= {"batches": [(pixel_values, targets)] * 2, "my_loss": torch.nn.functional.cross_entropy}
    given |= {"segmenter": segmenter, "masks": torch.randint(3, (4, 32, 32))}
    given["model"] = memtune.wrap(backbone, memtune.MemoryConfig(4), labels=LABELS, masked=True, processor=processor)
    given["signs_model"] = memtune.wrap(backbone, memtune.LoraConfig(r=2), labels=["stop", "go"], processor=processor)
    if width is None:
        given["both"] = memtune.combine(backbone, {"pets": "pets-lora", "flowers": "me/vit-flowers-lora"})
    return given
