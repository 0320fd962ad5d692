"""examples/combine.py as a user runs it: the commands that it prints as its help."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

EXAMPLE = Path(__file__).parents[2] / "examples" / "combine.py"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TASKS = {"pets": {"cat": 0, "dog": 1}, "flowers": {"daisy": 0, "rose": 1, "test": 2}}
"""For each task its classes, with the channel that is brighter in their images."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands name: a backbone whose own head has four classes, two data sets, and photos."""
    folder = tmp_path_factory.mktemp("material")
    backbone = folder / "google" / "vit-base-patch16-224"
    shape: Any = {**SHAPE, "image_size": 32, "patch_size": 8, "num_labels": 4}
    config = ViTConfig(**shape)
    ViTForImageClassification(config).save_pretrained(backbone)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(backbone)
    ViTModel(config).save_pretrained(folder / "headless")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "headless")
    for task, classes in TASKS.items():
        for split, count in (("train", 16), ("test", 5)):
            for name, channel in classes.items():
                for index in range(count):
                    write(folder / task / split / name / f"{index}.png", channel, seed=index)
    for index in range(3):
        write(folder / "photos" / f"{index}.png", index, seed=100 + index)
    (folder / "photos" / "notes.txt").write_text("no image")
    return folder


def write(path: Path, channel: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 120, (32, 32, 3), dtype=np.uint8)
    pixels[..., channel] += 100
    Image.fromarray(pixels).save(path)


def commands() -> list[list[str]]:
    """The arguments of the commands in the docstring."""
    text = EXAMPLE.read_text(encoding="utf-8").split('"""')[1].replace("\\\\\n", " ")
    return [shlex.split(line)[2:] for line in text.splitlines() if line.strip().startswith("python ")]


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(output: str, folder: Path, names: list[str], images: int) -> None:
    """The plan, an answer of each task for each image, the times, and the picture."""
    assert "sharing 2 of 2 blocks: pets, flowers;" in output
    answers = re.findall(r"^\S+\.png: (.+)$", output, re.MULTILINE)
    assert len(answers) == images
    for answer in answers:
        assert [each.split()[0] for each in answer.split(", ")] == names
        shares = [int(share) for share in re.findall(r"\((\d+)%\)", answer)]
        assert len(shares) == len(names)
        assert all(0 < share <= 100 for share in shares)
    times = re.search(
        r"one pass over (\d+) images: ([\d.]+) ms; separate passes for ([\w, ]+): ([\d.]+) ms .* ([\d.]+) times", output
    )
    assert times is not None
    assert times[3].split(", ") == names
    assert float(times[5]) == pytest.approx(float(times[4]) / float(times[2]), rel=0.1)
    difference = re.search(r"largest difference .*: (\S+)$", output, re.MULTILINE)
    assert difference is not None
    assert float(difference[1]) < 1e-5
    with Image.open(folder / "combined" / "combine.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
        assert picture.width > 500
    colours = {
        tuple(pixels[row, column]) for row in range(0, len(pixels), 5) for column in range(0, pixels.shape[1], 5)
    }
    assert len(colours) > 200, "the images are not in the picture"


def test_the_commands_of_its_help(folder: Path) -> None:
    train, combine = commands()
    output = run(folder, *train, "--num_train_epochs", "20", "--learning_rate", "0.02")
    accuracies = dict(re.findall(r"^(\w+): .* accuracy ([\d.]+) % of", output, re.MULTILINE))
    assert accuracies.keys() == TASKS.keys()
    assert all(float(accuracy) > 80 for accuracy in accuracies.values())
    check(output, folder, [*TASKS, "backbone"], images=2 * 4)
    (folder / "combined" / "combine.png").unlink()
    output = run(folder, *combine)
    assert "accuracy" not in output
    check(output, folder, [*TASKS, "backbone"], images=3)


def test_a_backbone_without_a_head_has_no_answer_of_its_own(folder: Path) -> None:
    arguments = ["--model_name_or_path", "headless", "--output_dir", "combined", "--max_steps", "1", "--r", "0"]
    output = run(folder, *arguments, "--data", "pets=pets", "--data", "flowers=flowers", "--images", "photos/1.png")
    check(output, folder, [*TASKS], images=1)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--adapter", "pets=pets"], "two or more"),
        (["--data", "pets=pets", "--data", "pets=flowers"], "a name of its own"),
        (["--adapter", "pets=pets", "--adapter", "flowers=flowers"], "give --images"),
        (["--adapter", "pets"], "expected NAME=FOLDER"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse_arguments = runpy.run_path(str(EXAMPLE))["parse_arguments"]
    monkeypatch.setattr(sys, "argv", ["combine.py", "--model_name_or_path", "x", "--output_dir", "x", *arguments])
    with pytest.raises(SystemExit, match="2"):
        parse_arguments()
    assert problem in capsys.readouterr().err


@pytest.mark.shared
def test_real_images(shared_models: Path, shared_data: Path, tmp_path: Path) -> None:
    """A few steps on the real backbone are enough to tell photographs of seven kinds from a guess."""
    arguments = ["--model_name_or_path", str(shared_models / "vit-tiny-patch16-224"), "--output_dir", "combined"]
    for name, data in (("photos", "pacs-photo"), ("waste", "trashnet")):
        arguments += ["--data", f"{name}={shared_data / data}"]
    arguments += ["--max_steps", "12", "--per_device_train_batch_size", "16", "--learning_rate", "0.01", "--r", "0"]
    output = run(tmp_path, *arguments, "--max_eval_samples", "40", "--pairs", "2")
    accuracies = dict(re.findall(r"^(\w+): .* accuracy ([\d.]+) % of 40 images", output, re.MULTILINE))
    assert float(accuracies["photos"]) > 50
    assert "7 classes" in output
    assert "6 classes" in output
