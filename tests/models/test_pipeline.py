"""Pipelines of tuned models and of models of many tasks: transformers' own, memtune's, and evaluate's evaluator."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import evaluate
import numpy as np
import pytest
import torch
import transformers
from backbone_zoo import BY_NAME
from PIL import Image
from torch.utils.data import Dataset
from transformers import ImageClassificationPipeline, ViTImageProcessorPil

import memtune
from memtune import LoraConfig, MemoryConfig
from memtune.errors import ConfigError
from memtune.evaluation.metrics import Accuracy

VIT = BY_NAME["vit-head"]
LABELS = {
    "pets": ["cat", "dog"],
    "past_key_values": ["oak", "ash", "elm", "fir", "yew", "box"],
    "LoRA": ["x", "y", "z"],
}
SIZE = {"height": 32, "width": 32}


def processor(**options: Any) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size=SIZE, **options)


def tuned(name: str = "pets", backbone: Any = None, **options: Any) -> memtune.TunedModel:
    options = {"processor": processor()} | options
    config: Any = LoraConfig(r=2) if name == "LoRA" else MemoryConfig(tokens=2)
    backbone = VIT.build() if backbone is None else backbone
    model = memtune.wrap(backbone, config, labels=LABELS[name], masked=name != "LoRA", **options).eval()
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.normal_()
    return model


def many(**options: Any) -> memtune.MultiTaskModel:
    backbone = VIT.build()
    return memtune.combine(backbone, {name: tuned(name, backbone, **options) for name in LABELS})


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8))


PICTURES = [picture(seed) for seed in range(5)]


def expected(logits: torch.Tensor, labels: list[str], top_k: int = 5) -> list[dict[str, Any]]:
    scores = logits.softmax(dim=-1).tolist()
    best = sorted(range(len(labels)), key=lambda place: -scores[place])[:top_k]
    return [{"label": labels[place], "score": pytest.approx(scores[place], abs=1e-5)} for place in best]


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    return processor()(images=pictures, return_tensors="pt").pixel_values


def expected_of_many(model: memtune.MultiTaskModel, picture: Image.Image, top_k: int = 5) -> dict[str, Any]:
    answers = model(pixels([picture]))
    return {name: expected(answers[name].logits[0], labels, top_k) for name, labels in LABELS.items()}


@pytest.mark.parametrize("make", [memtune.pipeline, lambda model, **options: theirs(model, **options)])
def test_a_tuned_model_gives_its_own_labels(make: Any) -> None:
    model = tuned(backbone=VIT.build(problem_type="multi_label_classification"))
    pipe = make(model)
    assert isinstance(pipe, ImageClassificationPipeline)
    logits = model(pixels(PICTURES)).logits
    assert pipe(PICTURES[0]) == expected(logits[0], ["cat", "dog"])
    assert pipe(PICTURES, batch_size=2, top_k=1) == [expected(each, ["cat", "dog"], 1) for each in logits]
    assert "TunedModel" in repr(pipe)
    assert "image" in repr(pipe)


def theirs(model: memtune.TunedModel, **options: Any) -> Any:
    return transformers.pipeline("image-classification", model=model, image_processor=model.processor, **options)


def test_ours_does_not_log_that_the_model_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        memtune.pipeline(tuned())
        assert not caplog.records
        theirs(tuned())
        assert "'TunedModel' is not supported" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_a_model_is_put_in_evaluation_mode() -> None:
    model = tuned().train()
    assert not memtune.pipeline(model).model.training


def test_many_tasks_answer_each_image(tmp_path: Path) -> None:
    model = many()
    pipe = memtune.pipeline(model)
    one = expected_of_many(model, PICTURES[0])
    assert one["past_key_values"] != expected_of_many(model, PICTURES[1])["past_key_values"]
    assert pipe(PICTURES[0]) == one
    PICTURES[0].save(tmp_path / "image.png")
    assert pipe(str(tmp_path / "image.png")) == one
    assert pipe([str(tmp_path / "image.png")]) == [one]
    assert "MultiTaskModel" in repr(pipe)


def test_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import image_utils

    def get(address: str, **options: Any) -> Any:
        assert address == "https://example.org/image.png"
        data = io.BytesIO()
        PICTURES[0].save(data, "png")
        return SimpleNamespace(content=data.getvalue())

    monkeypatch.setattr(image_utils.httpx, "get", get)
    model = many()
    assert memtune.pipeline(model)("https://example.org/image.png") == expected_of_many(model, PICTURES[0])


class Pictures(Dataset[Image.Image]):
    def __len__(self) -> int:
        return len(PICTURES)

    def __getitem__(self, place: int) -> Image.Image:
        return PICTURES[place]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    "images", [lambda: PICTURES, Pictures, lambda: (each for each in PICTURES)], ids=["list", "dataset", "generator"]
)
def test_many_images(images: Any, batch_size: int) -> None:
    model = many()
    found = list(memtune.pipeline(model, batch_size=batch_size, top_k=2)(images()))
    assert found == [expected_of_many(model, each, 2) for each in PICTURES]


def test_some_tasks_and_other_functions() -> None:
    model = many()
    pipe = memtune.pipeline(model, tasks=["pets"])
    assert pipe(PICTURES[0], top_k=1) == {"pets": expected_of_many(model, PICTURES[0], 1)["pets"]}
    assert list(pipe(PICTURES[0], tasks=["LoRA", "pets"])) == ["LoRA", "pets"]
    logits = model(pixels(PICTURES[:1]))["pets"].logits[0]
    for name, scores in {"none": logits, "sigmoid": logits.sigmoid()}.items():
        found = {each["label"]: each["score"] for each in pipe(PICTURES[0], function_to_apply=name)["pets"]}
        assert found == pytest.approx(dict(zip(LABELS["pets"], scores.tolist(), strict=True)), abs=1e-5)
    with pytest.raises(ConfigError, match=r"unknown tasks \['birds'\]"):
        pipe(PICTURES[0], tasks=["birds"])


def test_in_half_precision() -> None:
    model = many().to(torch.bfloat16)
    found = memtune.pipeline(model)(PICTURES[0])["pets"]
    assert sum(each["score"] for each in found) == pytest.approx(1)


def test_a_task_that_came_later_answers() -> None:
    model = many()
    pipe = memtune.pipeline(model)
    model.add_task("more", tuned("pets", model.backbone))
    model.remove_task("LoRA")
    assert list(pipe(PICTURES[0])) == ["pets", "past_key_values", "more"]


def test_what_is_refused() -> None:
    model = many()
    with pytest.raises(ConfigError, match="got ViTForImageClassification, expected a TunedModel or a MultiTaskModel"):
        memtune.pipeline(model.backbone)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="image_processor: got None; pass one"):
        memtune.pipeline(many(processor=None))
    assert memtune.pipeline(many(processor=None), image_processor=processor())(PICTURES[0]).keys() == LABELS.keys()
    model.add_task("other", tuned("pets", model.backbone, processor=processor(image_mean=[0.1, 0.2, 0.3])))
    with pytest.raises(ConfigError, match="the tasks 'pets' and 'other' were trained with different ones"):
        memtune.pipeline(model)
    for name in model.tasks:
        model.remove_task(name)
    with pytest.raises(ConfigError, match="without tasks"):
        memtune.pipeline(model)


def test_an_evaluator_measures_a_tuned_model(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(transformers, "TFPreTrainedModel"):  # evaluate 0.4.6 asks for it, whatever the model
        monkeypatch.setattr(transformers, "TFPreTrainedModel", (), raising=False)
    model = tuned()
    right = model(pixels(PICTURES)).logits.argmax(dim=-1).tolist()
    labels = [1 - right[0], *right[1:]]
    data = datasets.Dataset.from_dict({"image": PICTURES, "label": labels}).cast_column("image", datasets.Image())
    for pipe in (memtune.pipeline(model), theirs(model)):
        result = evaluate.evaluator("image-classification").compute(
            model_or_pipeline=pipe, data=data, metric=Accuracy(), label_mapping=model.config.label2id
        )
        assert result["accuracy"] == pytest.approx(0.8)
