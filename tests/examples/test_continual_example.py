"""examples/continual.py as a user runs it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune

EXAMPLE = Path(__file__).parents[2] / "examples" / "continual.py"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
NAMES = ["red", "test", "train", "violet"]
"""Two of the classes are named as a split: CIFAR-100 has a class "train"."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A backbone, and images of four colours in folders."""
    folder = tmp_path_factory.mktemp("material")
    ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8)).save_pretrained(folder / "backbone")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "backbone")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 5)):
        for name, colour in zip(NAMES, ([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]), strict=True):
            (folder / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8) + np.array(colour, dtype=np.uint8) * 100
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{index}.png")
    return folder


@pytest.fixture
def run(material, monkeypatch, capsys, caplog):
    """Runs the example in this process: what was measured, and all that was said."""
    caplog.set_level("INFO")

    def run(output, *arguments):
        command = command_for(material, output, *arguments)[1:]
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(command[0], run_name="__main__")
        return json.loads((output / "all_results.json").read_text()), capsys.readouterr().out + caplog.text

    return run


def command_for(material, output, *arguments):
    command = [sys.executable, str(EXAMPLE), "--model_name_or_path", str(material / "backbone")]
    command += ["--data_dir", str(material / "images"), "--output_dir", str(output), "--tasks", "2", "--cpu"]
    command += ["--num_train_epochs", "6", "--learning_rate", "0.02", "--per_device_train_batch_size", "8"]
    return [*command, *arguments]


def test_as_a_process(material, tmp_path):
    command = command_for(material, tmp_path, "--method", "closed_form")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "average_accuracy" in done.stdout


CODA = ["--method_config", '{"pool_size": 4, "blocks": null}']


@pytest.mark.parametrize(
    "arguments",
    [
        [*CODA],
        [*CODA, "--masked", "--image_size", "64"],
        ["--method", "memory", "--loss", "seen"],
        ["--method", "lora"],
        ["--method", "head", "--class_order_seed", "3"],
        ["--method", "full", "--loss", "seen"],
    ],
    ids=["coda", "masked", "memory", "lora", "head", "full"],
)
def test_methods_and_baselines(run, tmp_path, arguments):
    results, said = run(tmp_path, *arguments)
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2]
    assert results["eval_images"] == [10, 10]
    assert sorted(each for task in results["classes"] for each in task) == [0, 1, 2, 3]
    assert (results["classes"] == [[0, 1], [2, 3]]) == ("--class_order_seed" not in arguments)
    assert results["accuracy_matrix"][0][0] > 0.8
    if "seen" in arguments:  # what the loss over all classes does without images of the earlier ones
        assert results["accuracy_matrix"][1][1] > results["accuracy_matrix"][1][0]
    assert f"average_accuracy          {100 * results['average_accuracy']:6.2f} %" in said
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.size == (1000, 420)
    if "full" in arguments:
        assert not (tmp_path / "adapter_config.json").exists()
        assert results["trainable_parameters"] > 20_000
    else:
        assert memtune.load(tmp_path).task.labels == NAMES
        again, said = run(tmp_path, *arguments)
        assert again["accuracy_matrix"] == results["accuracy_matrix"]
        assert "going on after task 2" in said
