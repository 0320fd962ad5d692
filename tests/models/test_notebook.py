"""What a notebook shows of models, runs and explanations."""

from __future__ import annotations

from typing import Any

import pytest
from backbone_zoo import BY_NAME
from PIL import Image
from transformers import ViTImageProcessorPil

import memtune
from memtune import LoraConfig, MemoryConfig
from memtune.training import TrainingResult

VIT = BY_NAME["vit-head"]
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


def test_models_in_a_line() -> None:
    backbone = VIT.build()
    labels = ["cat", "dog", "owl", "bee", "ant"]
    one = memtune.wrap(backbone, [MemoryConfig(2), LoraConfig(r=2)], labels=labels, masked=True)
    counts = one.trainable_parameters()
    assert repr(one) == (
        f"TunedModel(memory + lora, masked: 5 classes (cat, dog, owl, bee, ...); {counts['total']:,} values on "
        f"ViTForImageClassification with {counts['backbone']:,})"
    )
    other = memtune.wrap(backbone, MemoryConfig(0, class_token=False), labels=["age"], problem_type="regression")
    other.task.image_size = (48, 64)
    features = memtune.wrap(backbone, LoraConfig(r=2), head=None)
    many = memtune.combine(backbone, {"pets": one, "age": other, "more": features})
    assert repr(many).splitlines() == [
        "MultiTaskModel(3 tasks on ViTForImageClassification",
        "  pets: memory + lora, masked: 5 classes (cat, dog, owl, bee, ...)",
        "  age: head alone, unmasked: 1 numbers (age), at 48 x 64 px",
        "  more: lora, unmasked: features",
        ")",
    ]
    several = memtune.wrap(backbone, LoraConfig(r=2), labels=["a", "b"], problem_type="multi_label_classification")
    assert "2 classes, any of them (a, b)" in repr(several)
    several.detach()
    assert repr(several) == "TunedModel(detached)"


def test_a_run_as_a_table() -> None:
    entry: dict[str, Any] = {"epoch": 1.0, "loss": 0.5, "task_loss": 0.25, "learning_rate": 1e-3, "seconds": 2.0}
    result = TrainingResult([entry | {"eval_<b>": 0.5, "peak_memory_gb": 1.0}])
    assert [line.split() for line in str(result).splitlines()] == [
        ["epoch", "task_loss", "learning_rate", "seconds", "eval_<b>"],
        ["1", "0.25", "0.001", "2", "0.5"],
    ]
    assert "<th>eval_&lt;b&gt;</th>" in result._repr_html_()
    assert str(TrainingResult()) == "no epoch has ended"
    assert "no epoch has ended" in TrainingResult()._repr_html_()


def test_an_explanation_as_a_picture() -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    model = memtune.wrap(VIT.build(), MemoryConfig(2), labels=["a", "b"], masked=True, processor=PROCESSOR)
    assert memtune.explain(model, Image.new("RGB", (40, 40)))._repr_png_().startswith(b"\x89PNG")
