"""The card of an adapter: metadata that the Hub understands, code that runs as it is printed, and no path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import TrainingArguments, ViTConfig, ViTImageProcessorPil, ViTModel

import memtune
from memtune.errors import ConfigError
from memtune.storage.card import public_name

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def backbone() -> ViTModel:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**SHAPE, image_size=32, patch_size=8)).eval()


def tuned(model: Any = None, **options: Any) -> memtune.TunedModel:
    options = {"labels": ["cat", "dog"]} | options
    return memtune.wrap(model or backbone(), memtune.MemoryConfig(3), **options)


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_metadata(tmp_path: Path) -> None:
    tuned(masked=True).save_pretrained(
        tmp_path,
        base_model_name="user/backbone",
        results={"accuracy": 0.9375, "loss": np.float32(0.25)},
        datasets=["beans", "user/pets"],
    )
    card = card_of(tmp_path)
    assert {key: value for key, value in card.data.to_dict().items() if key != "model-index"} == {
        "base_model": "user/backbone",
        "base_model_relation": "adapter",
        "datasets": ["beans", "user/pets"],
        "library_name": "memtune",
        "metrics": ["accuracy"],
        "pipeline_tag": "image-classification",
        "tags": ["memtune", "memory", "masked"],
    }
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name) == ("image-classification", "beans", "beans")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.9375)
    assert "| accuracy | 0.9375 |\n| loss | 0.25 |" in card.text
    assert "masked: a token of the task" in card.text
    assert "It puts 290 trained values on a frozen vit backbone" in card.text  # 2 * 3 * 32 + 32 + 2 * 32 + 2


def test_what_is_not_known_is_not_in_the_metadata(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path)
    assert set(card_of(tmp_path).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert not re.search("## (Results|Training)", card_of(tmp_path).text)


def test_results_without_a_data_set(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path, results={"eval_accuracy": 1})
    (result,) = card_of(tmp_path).data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("unknown", "accuracy", 1.0)


@pytest.mark.parametrize(
    "training",
    [
        memtune.TrainingConfig(learning_rate=0.03, optim="sgd"),
        TrainingArguments("a/path", learning_rate=0.03, optim="sgd", report_to="none"),
    ],
    ids=["memtune", "transformers"],
)
def test_training_settings(tmp_path: Path, training: Any) -> None:
    tuned().save_pretrained(tmp_path, training=training)
    text = card_of(tmp_path).text
    assert "| learning_rate | 0.03 |" in text
    assert "| optim | sgd |" in text
    assert re.search(r"\| lr_scheduler_type \| (cosine|linear) \|", text)
    assert "a/path" not in text


def test_few_labels_are_all_shown_and_many_shortened(tmp_path: Path) -> None:
    tuned(labels=[f"class {index}" for index in range(1000)]).save_pretrained(tmp_path / "many")
    text = card_of(tmp_path / "many").text
    assert "1000: `class 0`, `class 1`" in text
    assert "`class 19` and 980 more, all in `adapter_config.json`" in text
    tuned(labels=["a`b", "---\nlicense: mit", "ü"]).save_pretrained(tmp_path / "odd")
    card = card_of(tmp_path / "odd")
    assert "3: `a'b`, `--- license: mit`, `ü`" in card.text
    assert "license" not in card.data.to_dict()


@pytest.mark.parametrize("where", ["absolute", "relative", "one-name"])
def test_no_path_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    name = {"absolute": str(tmp_path / "secret" / "vit"), "relative": "secret/vit", "one-name": "secret"}[where]
    backbone().save_pretrained(name)
    model = tuned(ViTModel.from_pretrained(name))
    model.save_pretrained("pets")
    model.save_pretrained("explicit", base_model_name=name)
    for folder in ("pets", "explicit"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "base_model" not in card
        assert "secret" not in card
        assert str(tmp_path) not in card


def test_public_names() -> None:
    assert public_name("google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    for name in (None, "", "vit", "/a/b", "./a", "../a", "a/b/c", "a/b.git", "C:\\models\\vit", "~/vit", "a/ b", "a/"):
        assert public_name(name) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"results": {"accuracy": "good"}}, "accuracy is 'good', expected a finite number"),
        ({"results": {"accuracy": float("inf")}}, "accuracy is inf"),
        ({"datasets": "/data/pets"}, "got '/data/pets', expected the id of a data set"),
        ({"datasets": ["beans", 3]}, "got 3, expected the id"),
    ],
)
def test_wrong_details(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tuned().save_pretrained(tmp_path / "pets", **options)
    assert not (tmp_path / "pets").exists()


@pytest.mark.parametrize("processor", [False, True], ids=["no-processor", "processor"])
def test_the_code_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], processor: bool
) -> None:
    """Beside the folder's own files, the backbone being found by its recorded path."""
    backbone().save_pretrained(tmp_path / "backbone")
    options = {"processor": ViTImageProcessorPil(size={"height": 32, "width": 32})} if processor else {}
    model = tuned(ViTModel.from_pretrained(tmp_path / "backbone"), **options)
    with torch.no_grad():
        model.task.head.bias.copy_(torch.tensor([0.0, 100.0]))
    model.save_pretrained(tmp_path / "pets")
    Image.new("RGB", (50, 40)).save(tmp_path / "pets" / "image.jpg")
    monkeypatch.chdir(tmp_path / "pets")
    run_code(Path("README.md"))
    out = capsys.readouterr().out
    assert out.startswith("[{'label': 'dog', 'score': 1.0}") if processor else out == "dog\n"


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_the_code_of_other_labels_without_a_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], problem_type: str
) -> None:
    backbone().save_pretrained(tmp_path / "backbone")
    model = tuned(ViTModel.from_pretrained(tmp_path / "backbone"), problem_type=problem_type)
    torch.nn.init.zeros_(model.task.head.weight)
    with torch.no_grad():
        model.task.head.bias.copy_(torch.tensor([0.0, 100.0]))
    model.save_pretrained(tmp_path / "pets")
    monkeypatch.chdir(tmp_path / "pets")
    run_code(Path("README.md"))
    first, second = (0.5, 1.0) if problem_type == "multi_label_classification" else (0.0, 100.0)
    assert capsys.readouterr().out == f"{{'cat': {first}, 'dog': {second}}}\n"


def run_code(card: Path) -> None:
    (code,) = re.findall("```python\n(.*?)```", card.read_text(), re.DOTALL)
    exec(compile(code, str(card), "exec"), {})


def test_the_code_of_an_adapter_without_a_named_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = backbone()
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("path/to/the/backbone")
    tuned(model).save_pretrained(tmp_path)
    run_code(Path("README.md"))
    assert capsys.readouterr().out in ("cat\n", "dog\n")


@pytest.mark.parametrize("processor", [False, True], ids=["no-processor", "processor"])
def test_the_code_of_an_adapter_that_reads_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], processor: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone().save_pretrained("path/to/the/backbone")
    model = ViTModel.from_pretrained("path/to/the/backbone")
    tuned(model, masked=True).save_pretrained("path/to/it")
    both = memtune.combine(model, {"first": "path/to/it"})
    options = {"processor": ViTImageProcessorPil(size={"height": 32, "width": 32})} if processor else {}
    tuned(model, masked=True, extends=both, **options).save_pretrained(tmp_path)
    Image.new("RGB", (50, 40)).save("image.jpg")
    assert "- It reads other tasks (`first`)" in Path("README.md").read_text()
    assert str(tmp_path) not in Path("README.md").read_text()
    run_code(Path("README.md"))
    out = capsys.readouterr().out
    assert out.startswith("{'this': [{'label': '") if processor else out in ("cat\n", "dog\n")
