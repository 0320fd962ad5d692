"""examples/finetune.py as a user runs it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune.py"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A backbone and images of three colours, in folders."""
    folder = tmp_path_factory.mktemp("material")
    ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8)).save_pretrained(folder / "backbone")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "backbone")
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 7)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def arguments_of(material, output, *arguments):
    given = ["--model_name_or_path", str(material / "backbone"), "--train_dir", str(material / "train")]
    given += ["--validation_dir", str(material / "test"), "--output_dir", str(output), "--num_train_epochs", "10"]
    return [*given, "--learning_rate", "0.02", *arguments]


def finetune(material, output, *arguments, **environment):
    command = [sys.executable, str(EXAMPLE), *arguments_of(material, output, *arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "all_results.json").read_text())


@pytest.mark.parametrize("arguments", [["--tokens", "2"], ["--masked", "--image_size", "64"], ["--method", "head"]])
def test_one_process(material, tmp_path, arguments):
    results = finetune(material, tmp_path, *arguments)
    assert results["eval_accuracy"] > 0.8
    assert results["eval_samples"] == 21
    model = memtune.load(tmp_path)
    assert model.task.labels == ["blue", "green", "red"]
    assert model.task.masked == ("--masked" in arguments)
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-18", "checkpoint-20"]


def test_without_an_epoch_it_measures_and_saves(material, tmp_path):
    results = finetune(material, tmp_path, "--num_train_epochs", "0")
    assert results["history"] == []
    assert 0 <= results["eval_accuracy"] <= 1
    assert results["eval_loss"] > 0
    assert not (tmp_path / "learning_curves.png").exists()
    assert memtune.load(tmp_path).task.labels == ["blue", "green", "red"]


def test_a_killed_run_goes_on(material, tmp_path):
    """Killed after the first checkpoint; what it ends with is what it would have ended with."""
    steps = ["--save_strategy", "steps", "--save_steps", "3"]
    whole = finetune(material, tmp_path / "whole", *steps)
    killed = tmp_path / "killed"
    command = [sys.executable, str(EXAMPLE), *arguments_of(material, killed, *steps)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(killed.glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    resumed = finetune(material, killed, *steps, "--resume_from_checkpoint")
    assert resumed["eval_loss"] == whole["eval_loss"]
    one, other = (memtune.load(folder).task.tensors() for folder in (tmp_path / "whole", killed))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_two_processes_have_the_losses_of_one_and_go_on(material, tmp_path):
    """The same images make each step: the losses differ by rounding alone, also after an interruption."""
    epochs = ["--num_train_epochs", "4", "--save_total_limit", "9"]
    one = finetune(material, tmp_path / "one", *epochs, "--per_device_train_batch_size", "6")
    together = [*epochs, "--cpu", "--num_processes", "2", "--per_device_train_batch_size", "3"]
    two = finetune(material, tmp_path / "two", *together, OMP_NUM_THREADS="1")
    for name in ("loss", "eval_loss"):
        losses = [[entry[name] for entry in run["history"]] for run in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    checkpoint = tmp_path / "two" / "checkpoint-20"
    resumed = finetune(
        material, tmp_path / "two", *together, "--resume_from_checkpoint", str(checkpoint), OMP_NUM_THREADS="1"
    )
    assert resumed["eval_loss"] == pytest.approx(two["eval_loss"], abs=1e-6)
    assert (two["num_processes"], two["eval_samples"]) == (2, 21)
    assert abs(one["eval_accuracy"] - two["eval_accuracy"]) <= 1 / 21
    assert memtune.load(tmp_path / "two").task.labels == ["blue", "green", "red"]


def test_two_machines_reach_the_accuracy_of_one_process(material, tmp_path):
    """Two launches that find each other over the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
    launch += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    train = arguments_of(material, tmp_path / "two", "--cpu", "--per_device_train_batch_size", "4")
    machines = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), str(EXAMPLE), *train],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for machine in machines:
        _, errors = machine.communicate(timeout=600)
        assert machine.returncode == 0, errors[-3000:]
    two = json.loads((tmp_path / "two" / "all_results.json").read_text())
    one = finetune(material, tmp_path / "one", "--per_device_train_batch_size", "8")
    assert two["num_processes"] == 2
    assert two["eval_samples"] == 21
    assert abs(one["eval_accuracy"] - two["eval_accuracy"]) <= 2 / 21


@pytest.mark.parametrize("path", sorted(EXAMPLE.parent.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_accelerates(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= config.num_machines >= 1
    assert path.name in (EXAMPLE.parents[1] / "docs" / "distributed.md").read_text()
