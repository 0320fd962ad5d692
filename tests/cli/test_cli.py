"""The command line, in this process as `main([...])`, and once as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune import LoraConfig, MemoryConfig, MultiTaskModel
from memtune.cli.parser import main

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, two adapters and images in folders by class."""
    folder = tmp_path_factory.mktemp("cli")
    backbone = ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8))
    backbone.save_pretrained(folder / "backbone")
    backbone = ViTForImageClassification.from_pretrained(folder / "backbone")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "backbone")
    for name, config, masked, labels in (
        ("pets", LoraConfig(r=2), True, ["dog", "cat", "bird"]),
        ("signs", MemoryConfig(2), False, ["stop", "go"]),
    ):
        tuned = memtune.wrap(backbone, config, labels=labels, masked=masked, processor=processor)
        torch.nn.init.normal_(tuned.task.head.weight)
        tuned.save_pretrained(folder / name)
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for index in range(3):
            pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{index}.png")
    return folder


def images_of(material: Path) -> list[str]:
    return [str(path) for path in sorted((material / "photos").glob("*/*.png"))]


def adapters_of(material: Path) -> list[str]:
    return ["--adapter", f"pets={material / 'pets'}", "--adapter", f"signs={material / 'signs'}"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_finetune(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--train_dir", str(material / "photos"), "--validation_dir", str(material / "photos")]
    given = ["--model_name_or_path", str(material / "backbone"), *data, "--output_dir", str(tmp_path / "adapter")]
    given += ["--method", "memory", "lora", "--masked", "--num_train_epochs", "2", "--per_device_train_batch_size", "2"]
    given += ["--method_config", '{"lora": {"r": 2}}', "--disable_tqdm", "--class_weights", "1", "2"]
    summary = run(capsys, "finetune", *given)
    assert summary["train_samples"] == summary["eval_samples"] == 6
    assert summary["command"] == " ".join(["memtune", "finetune", *given, "--json"])
    model = memtune.load(tmp_path / "adapter")
    assert model.task.labels == ["cat", "dog"]
    assert model.task.methods == ["memory", "lora"]
    assert main(["finetune", *given, "--num_train_epochs", "1", "--resume_from_checkpoint"]) == 1
    assert "num_train_epochs: got 1.0, the folder has 2.0" in capsys.readouterr().err
    assert main(["finetune", *given, "--resume_from_checkpoint"]) == 0
    assert f"the adapter is in {tmp_path / 'adapter'}" in capsys.readouterr().out


def test_inspect(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = run(capsys, "inspect", str(material / "pets"))
    assert values["mode"] == "masked"
    assert values["labels"] == ["dog", "cat", "bird"]
    assert values["methods"][0]["r"] == 2
    assert values["trained_values"] == memtune.load(material / "pets").trainable_parameters()["total"]
    assert main(["inspect", str(material / "pets")]) == 0
    text = capsys.readouterr().out
    assert "lora (" in text
    assert "3: dog, cat, bird" in text
    assert f"{values['trained_values']:,}" in text


def test_inspect_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    assert main(["inspect", str(tmp_path)]) == 1
    assert "adapter_model.safetensors not found" in capsys.readouterr().out


def test_predict_answers_as_the_library(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    options = ["--top_k", "2", "--batch_size", "4", "--sheet", str(sheet)]
    answers = run(capsys, "predict", *images_of(material), *adapters_of(material), *options)
    assert [each["image"] for each in answers] == images_of(material)
    with Image.open(sheet) as drawn:
        assert drawn.width > 500
    for task in ("pets", "signs"):
        model = memtune.load(material / task)
        for answer in answers:
            with Image.open(answer["image"]) as image:
                pixel_values = model.processor(images=image, return_tensors="pt").pixel_values
            with torch.no_grad():
                best = model(pixel_values).logits[0].softmax(-1).topk(2)
            assert [label for label, _ in answer["tasks"][task]] == [model.task.labels[i] for i in best.indices]
            got = torch.tensor([probability for _, probability in answer["tasks"][task]])
            torch.testing.assert_close(got, best.values, atol=1e-5, rtol=1e-5)


def test_evaluate_goes_by_the_names_of_classes(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = run(capsys, "evaluate", str(material / "pets"), "--data", str(material / "photos"))
    assert values["images"] == 6
    answers = run(capsys, "predict", *images_of(material), *adapters_of(material))
    right = [Path(each["image"]).parent.name == each["tasks"]["pets"][0][0] for each in answers]
    assert values["accuracy"] == pytest.approx(sum(right) / 6)
    assert main(["evaluate", str(material / "signs"), "--data", str(material / "photos")]) == 1
    assert "of the data set's classes the model lacks ['cat', 'dog']" in capsys.readouterr().err


def test_combine(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["combine", str(tmp_path / "both"), *adapters_of(material)]) == 0
    assert "task stream, sharing 2 of 2 blocks: pets" in capsys.readouterr().out
    model = MultiTaskModel.from_pretrained(tmp_path / "both")
    assert model.tasks == {"pets": ["dog", "cat", "bird"], "signs": ["stop", "go"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "none.png", "ADAPTERS"], "none.png cannot be read"),
        (["predict", "IMAGE", "ADAPTERS", "--top_k", "0"], "--top_k: got 0"),
        (["predict", "IMAGE", "ADAPTERS", "ADAPTERS"], "which names a task twice"),
        (["predict", "IMAGE", "ADAPTERS", "--backbone", "nowhere/at-all"], "--backbone: 'nowhere/at-all' cannot be"),
        (["inspect", "./nothing"], "which is no folder"),
        (["finetune", "--model_name_or_path", "b", "--output_dir", "o"], "got no data to train on"),
        (
            ["finetune", "--model_name_or_path", "b", "--output_dir", "o", "--train_dir", "./nothing"],
            "nothing is not there; expected a folder",
        ),
        (
            ["finetune", "--model_name_or_path", "b", "--output_dir", "o", "--optim", "sgd", "--momentum", "2"],
            "momentum",
        ),
    ],
)
def test_errors_are_one_line(
    material: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    spelled = {"ADAPTERS": adapters_of(material), "IMAGE": images_of(material)[:1]}
    spelled["MODEL"] = ["--model_name_or_path", "backbone", "--output_dir", "adapter"]
    assert main([word for each in arguments for word in spelled.get(each, [each])]) == 1
    output = capsys.readouterr()
    assert message in output.err + output.out
    assert "Traceback" not in output.err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"memtune {memtune.__version__}\n"


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "a.png", "--adapter", "pets="])
    assert "expected NAME=PATH" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_user_types_it(material: Path) -> None:
    command = [sys.executable, "-m", "memtune", "predict", images_of(material)[0], *adapters_of(material)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split("\t")[1] for line in done.stdout.splitlines()] == ["pets", "signs"]
    shown = subprocess.run([sys.executable, "-m", "memtune", "--help"], capture_output=True, text=True, check=True)
    assert all(name in shown.stdout for name in ("inspect", "predict", "evaluate", "combine", "push", "zoo"))
