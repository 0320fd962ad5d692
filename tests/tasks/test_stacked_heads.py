"""Heads of all sizes in one lane: each task's answer is its own, and costs what its own head does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME

import memtune
from memtune import LoraConfig, MemoryConfig
from memtune.export import export_program

VIT = BY_NAME["vit"]
CLASSES = {"two": 2, "three": 3, "many": 700, "more": 720, "most": 2500}


@pytest.fixture(scope="module", params=[True, False], ids=["masked", "unmasked"])
def models(request: pytest.FixtureRequest) -> dict[str, memtune.TunedModel]:
    backbone, made = VIT.build(), {}
    for number, (name, classes) in enumerate(CLASSES.items()):
        torch.manual_seed(number)
        config = MemoryConfig(1) if request.param else LoraConfig(r=1, init_lora_weights=False)
        made[name] = memtune.wrap(backbone, config, num_labels=classes, masked=request.param).eval()
    return made


@torch.no_grad()
def test_each_answers_as_alone(models: dict[str, memtune.TunedModel]) -> None:
    both, images = memtune.combine(models["two"].backbone, dict(models)), VIT.images()
    for names in (list(CLASSES), ["most", "two"], ["more"], ["many", "three", "more"]):
        answers = both(images, tasks=names)
        assert list(answers) == names
        for name in names:
            assert answers[name].logits.shape == (len(images), CLASSES[name])
            torch.testing.assert_close(answers[name].logits, models[name](images).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_mixed_batch_answers_as_alone(models: dict[str, memtune.TunedModel]) -> None:
    both = memtune.combine(models["two"].backbone, dict(models))
    rows = ["most", "two", "many", "two", "more"]
    images = torch.cat([VIT.images()] * 3)[: len(rows)]
    for image, name, answer in zip(images, rows, both(images, rows=rows), strict=True):
        torch.testing.assert_close(answer.logits, models[name](image[None]).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_heads_of_several_sizes_are_exported(models: dict[str, memtune.TunedModel]) -> None:
    both, images = memtune.combine(models["two"].backbone, dict(models)), VIT.images()
    answers = export_program(both).module()(images)
    for name, output in both(images).items():
        torch.testing.assert_close(answers[name], output.logits, atol=1e-5, rtol=1e-5)


def held(model: Any) -> int:
    return sum(tensor.nbytes for lane in model.arrangement.lanes for tensor in lane._heads)


@pytest.mark.parametrize("classes", [[2] * 7 + [21843], [10, 100, 1000], [300, 310, 320, 5]], ids=str)
def test_each_costs_what_it_is(classes: list[int]) -> None:
    backbone = VIT.build()

    def combined(numbers: list[int]) -> memtune.MultiTaskModel:
        tasks = {
            str(place): memtune.wrap(backbone, MemoryConfig(1), num_labels=number, masked=True)
            for place, number in enumerate(numbers)
        }
        return memtune.combine(backbone, tasks)

    alone = [combined([number]) for number in classes]
    together = combined(classes)
    adds = together.plan().lanes[0].multiply_adds
    assert adds < 1.15 * sum(each.plan().lanes[0].multiply_adds for each in alone)
    assert held(together) < 1.15 * sum(map(held, alone))
