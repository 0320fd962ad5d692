"""Makes the golden files of a format version: adapters as that version saved them, and what they answered.

    python tests/golden/make.py

They are made once, when the format version is new, and never again: tests/test_golden.py loads them with every later
release. Everything random is drawn here and kept as a file, so nothing hangs on a random generator either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

import memtune
from memtune import AdapterConfig, ApproximatedPromptConfig, CodaPromptConfig, LoraConfig, MemoryConfig
from memtune.storage.adapter_folder import FORMAT_VERSION

HERE = Path(__file__).parent
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LABELS = ["ant", "bee", "cat"]

ADAPTERS: dict[str, tuple[list[AdapterConfig], bool]] = {
    "memory": ([MemoryConfig(tokens=3)], True),
    "approximated_prompts": ([ApproximatedPromptConfig(n=20, r=2, gate=True, blocks=[1])], False),
    "lora": ([LoraConfig(r=2, roles=["query", "out", "fc1"], use_dora=True)], False),
    "coda_prompts": ([CodaPromptConfig(pool_size=4, prompt_length=4, blocks=[0, 1])], True),
    "several": ([MemoryConfig(tokens=2), LoraConfig(r=2)], True),
}
"""The methods and whether they are masked; the folder has the same name."""


def tuned(backbone: ViTModel, configs: list[AdapterConfig], masked: bool, **options: Any) -> memtune.TunedModel:
    """A tuned model in which every trained value is random."""
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    options = {"labels": LABELS, "processor": processor} | options
    model = memtune.wrap(backbone, configs, masked=masked, **options)
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def save(folder: Path) -> None:
    """Save a backbone, the adapters, a multi-task model, and what they answer."""
    torch.manual_seed(0)
    drawn = ViTModel(ViTConfig(**SHAPE, image_size=16, patch_size=8), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in drawn.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    drawn.save_pretrained(folder / "backbone")
    backbone = read_backbone(folder)
    save_file({"images": torch.randn(2, 3, 16, 16)}, folder / "images.safetensors")
    for name, (configs, masked) in ADAPTERS.items():
        tuned(backbone, configs, masked).save_pretrained(folder / name, base_model_name="memtune/golden")
    tasks = {name: tuned(backbone, *ADAPTERS[name]) for name in ("memory", "lora")}
    model = memtune.combine(backbone, tasks)
    model.add_task("a later one", tuned(backbone, [MemoryConfig(tokens=2)], True, extends=model))
    model.save_pretrained(folder / "collection", base_model_name="memtune/golden")
    features = tuned(backbone, [MemoryConfig(tokens=2)], True, head=None, labels=None, processor=None)
    features.save_pretrained(folder / "features", base_model_name="memtune/golden")
    save_file(answers(folder), folder / "answers.safetensors")


def read_backbone(folder: Path) -> ViTModel:
    """The backbone of a version's files."""
    return ViTModel.from_pretrained(folder / "backbone", add_pooling_layer=False).eval()


def answers(folder: Path) -> dict[str, Tensor]:
    """What a version's adapters, loaded, give for its images, by folder and task: logits or features."""
    backbone, images = read_backbone(folder), load_file(folder / "images.safetensors")["images"]
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for path in sorted(folder.glob("*/adapter_config.json")):
            found[path.parent.name] = memtune.load(path.parent, backbone=backbone)(images)[0]
        collection = memtune.MultiTaskModel.from_pretrained(folder / "collection", backbone)
        return found | {f"collection/{name}": answer.logits for name, answer in collection(images).items()}


if __name__ == "__main__":
    place = HERE / f"version_{FORMAT_VERSION}"
    if place.exists():
        raise SystemExit(f"{place} is there already: golden files are made once for a format version, and never again")
    save(place)
