"""The adapters of `adapters/`: that they are small, load, and do what is recorded of them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageClassification

import memtune

ROOT = Path(__file__).parents[2]
ADAPTERS = sorted(path.parent for path in (ROOT / "adapters").glob("*/adapter_config.json"))
MEASURED_AGAIN = ["dtd10-lora", "pacs-sketch-memory-lora-masked"]
"""One of each mode, with few test images; the logits of all are compared."""

each_adapter = pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)


@pytest.fixture(scope="module")
def zoo():
    """examples/zoo.py as a module."""
    specification = importlib.util.spec_from_file_location("zoo", ROOT / "examples" / "zoo.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backbone(shared_models):
    return AutoModelForImageClassification.from_pretrained(shared_models / "vit-tiny-patch16-224")


def test_there_are_adapters_of_four_methods_and_both_modes():
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in ADAPTERS]
    assert len(configs) >= 6
    methods = {method["method"] for config in configs for method in config["methods"]}
    assert methods == {"memory", "lora", "approximated_prompts", "coda_prompts"}
    assert {config["masked"] for config in configs} == {True, False}
    assert {config["backbone"]["name_or_path"] for config in configs} == {"WinKawaks/vit-tiny-patch16-224"}


def test_they_are_small_and_hold_no_program():
    files = [path for path in (ROOT / "adapters").rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 600_000
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    assert not [path for path in files if path.suffix == ".py"]


def test_the_readme_is_what_the_script_makes(zoo):
    assert (ROOT / "adapters" / "README.md").read_text() == zoo.readme()


def test_each_was_made_by_a_command_of_the_script(zoo):
    assert {folder.name for folder in ADAPTERS} == set(zoo.ZOO)
    for folder in ADAPTERS:
        task, options = zoo.ZOO[folder.name]
        command = json.loads((folder / "training.json").read_text())["command"]
        assert f"/{task}/train " in command
        assert options in command


@each_adapter
def test_the_card_has_the_measured_accuracy(folder):
    accuracy = json.loads((folder / "training.json").read_text())["eval_accuracy"]
    card = (folder / "README.md").read_text()
    assert f"{accuracy:.4f}"[:5] in card
    assert "base_model: WinKawaks/vit-tiny-patch16-224" in card


@pytest.mark.shared
@each_adapter
def test_the_recorded_logits(zoo, backbone, folder):
    model = memtune.load(folder, backbone)
    expected = json.loads((folder / "expected.json").read_text())["logits"]
    torch.testing.assert_close(torch.tensor(zoo.logits_of(model)), torch.tensor(expected), atol=2e-3, rtol=1e-3)


@pytest.mark.shared
def test_all_masked_ones_answer_from_one_pass(backbone):
    masked = [folder for folder in ADAPTERS if folder.name.endswith("-masked")]
    model = memtune.combine(backbone, {folder.name: folder for folder in masked})
    with Image.open(ROOT / "adapters" / "input.png") as image:
        processor = memtune.load(masked[0], backbone).processor
        pixel_values = processor(image.convert("RGB"), return_tensors="pt").pixel_values
    for folder, answer in zip(masked, model(pixel_values).values(), strict=True):
        expected = json.loads((folder / "expected.json").read_text())["logits"]
        torch.testing.assert_close(answer.logits[0], torch.tensor(expected), atol=2e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize(
    "folder",
    [folder for folder in ADAPTERS if folder.name in MEASURED_AGAIN],
    ids=lambda folder: folder.name,
)
def test_the_recorded_accuracy(zoo, backbone, shared_data, folder):
    """In full precision, where it was measured in bf16: some images near a boundary may fall to the other side."""
    task, _ = zoo.ZOO[folder.name]
    training = json.loads((folder / "training.json").read_text())
    data = load_dataset("imagefolder", data_dir=str(shared_data / task / "test"), data_files="**", split="train")
    scores = memtune.evaluate(memtune.load(folder, backbone), data)
    assert len(data) == training["eval_samples"]
    assert scores["accuracy"] == pytest.approx(training["eval_accuracy"], abs=0.025)
