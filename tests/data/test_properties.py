"""Random data sets through every entry point: accuracy is what a slow count by names gives, or the data is refused."""

from __future__ import annotations

from typing import Any

import datasets
import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune.errors import MemtuneError

NAMES = ["ant", "bee", "cat", "dog", "eel"]
QUICK = memtune.TrainingConfig(num_train_epochs=1, per_device_train_batch_size=8, disable_tqdm=True, learning_rate=0.05)


class Pairs:
    """As torchvision's data sets are: pairs, and the names in `classes`."""

    def __init__(self, rows: list[tuple[Image.Image, int]], classes: list[str]) -> None:
        self._rows = rows
        self.classes = classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._rows[index]


def picture(name: str, number: int) -> Image.Image:
    """One colour for each class, in shades."""
    base = [40 * NAMES.index(name), 255 - 40 * NAMES.index(name), 90 * (NAMES.index(name) % 3)]
    return Image.new("RGB", (32, 32), tuple(min(value + number, 255) for value in base))


def build(kind: str, order: list[str], names: list[str]) -> Any:
    """A data set of one of the usual kinds, its classes in the order given."""
    images = [picture(name, number) for number, name in enumerate(names)]
    if kind == "class label":
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=order)})
        return datasets.Dataset.from_dict({"image": images, "label": names}, features=features)
    if kind == "text":
        return datasets.Dataset.from_dict({"image": images, "label": names}).cast_column("image", datasets.Image())
    if kind == "pairs":
        return Pairs([(image, order.index(name)) for image, name in zip(images, names, strict=True)], order)
    if kind == "named items":
        return [{"image": image, "label": name} for image, name in zip(images, names, strict=True)]
    return [{"image": image, "label": order.index(name)} for image, name in zip(images, names, strict=True)]


@pytest.fixture(scope="module")
def backbone() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**shape, image_size=32, patch_size=16)).eval()


@torch.no_grad()
def slow_accuracy(model: memtune.TunedModel, names: list[str], meant: list[str]) -> float:
    """Image by image: whether the name of the best class is the image's."""
    right = 0
    for number, (name, own) in enumerate(zip(names, meant, strict=True)):
        pixel_values = model.processor(picture(name, number), return_tensors="pt").pixel_values
        right += model.task.labels[int(model(pixel_values).logits.argmax())] == own
    return right / len(names)


@hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    labels=st.permutations(NAMES).flatmap(lambda names: st.integers(2, 5).map(lambda count: names[:count])),
    order=st.permutations(NAMES).flatmap(lambda names: st.integers(1, 5).map(lambda count: names[:count])),
    kind=st.sampled_from(["class label", "text", "pairs", "named items", "numbers"]),
    way=st.sampled_from(["evaluate", "fit", "closed form"]),
    drawn=st.lists(st.integers(0, 4), min_size=2, max_size=9),
)
def test_accuracy_is_a_count_by_names(
    backbone: Any, labels: list[str], order: list[str], kind: str, way: str, drawn: list[int]
) -> None:
    names = [order[number % len(order)] for number in drawn]
    data = build(kind, order, names)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    configs = [] if way == "closed form" else memtune.MemoryConfig(1)
    model = memtune.wrap(backbone, configs, labels=labels, masked=way != "closed form", processor=processor)
    # What the data says each image is: without names its number among the model's labels is all that there is.
    meant = [labels[order.index(name)] for name in names] if _fits(kind, order, names, labels) else names
    known = set(meant) <= set(labels) and (kind != "numbers" or _fits(kind, order, names, labels))
    try:
        if way == "evaluate":
            scores = memtune.evaluate(model, data)
        elif way == "fit":
            scores = memtune.fit(model, data, data, QUICK).scores
        else:
            memtune.fit_closed_form(model, data)
            scores = memtune.evaluate(model, data)
        assert known
        assert scores["accuracy"] == pytest.approx(slow_accuracy(model, names, meant))
    except MemtuneError:
        assert not known or way == "closed form"  # which needs two classes, and two images of one
    finally:
        model.detach()


def _fits(kind: str, order: list[str], names: list[str], labels: list[str]) -> bool:
    """Whether numbers without names are numbers of the model's labels."""
    return kind == "numbers" and all(order.index(name) < len(labels) for name in names)
