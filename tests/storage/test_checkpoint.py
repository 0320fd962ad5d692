import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import memtune
from memtune.errors import BackboneMismatchError, CheckpointError, ConfigError
from memtune.peft_format import import_peft
from memtune.storage.adapter_folder import CONFIG_NAME, WEIGHTS_NAME

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}


def backbone(seed=0, **changes):
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**SHAPE | {"patch_size": 8} | changes)).eval()


def tuned(model, masked=False, **options):
    torch.manual_seed(1)
    model = memtune.wrap(model, memtune.MemoryConfig(3), labels=["cat", "dog"], masked=masked, **options).eval()
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.normal_()
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def folder(tmp_path):
    tuned(backbone()).save_pretrained(tmp_path / "pets")
    return tmp_path / "pets"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_loaded_answers_as_what_was_saved(tmp_path, images, masked):
    model = tuned(backbone(), masked)
    model.save_pretrained(tmp_path)
    loaded = memtune.TunedModel.from_pretrained(tmp_path, backbone())
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert loaded.config.id2label == {0: "cat", 1: "dog"}
    assert not loaded.training


def test_saving_twice_gives_the_same_bytes(folder, tmp_path):
    memtune.load(folder, backbone=backbone()).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_keys_are_roles(folder):
    keys = ["blocks.0.memory", "blocks.1.memory", "class_token", "head.bias", "head.weight"]
    assert sorted(load_file(folder / WEIGHTS_NAME)) == keys


def test_the_backbone_is_found_by_its_recorded_name(tmp_path, images):
    backbone().save_pretrained(tmp_path / "backbone")
    own = ViTForImageClassification.from_pretrained(tmp_path / "backbone")
    model = tuned(own)
    model.save_pretrained(tmp_path / "pets")
    assert torch.equal(memtune.load(tmp_path / "pets")(images).logits, model(images).logits)
    assert str(tmp_path) not in (tmp_path / "pets" / "README.md").read_text()


def test_a_recorded_name_that_cannot_be_loaded_is_named(tmp_path):
    tuned(backbone()).save_pretrained(tmp_path, base_model_name="nobody/nothing")
    assert "base_model: nobody/nothing" in (tmp_path / "README.md").read_text()
    with pytest.raises(CheckpointError, match="'nobody/nothing' cannot be loaded; give backbone="):
        memtune.load(tmp_path)


def test_the_processor_goes_along(tmp_path):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    model = tuned(backbone(), processor=processor)
    model.save_pretrained(tmp_path)
    assert memtune.load(tmp_path, backbone=backbone()).processor.image_mean == (0.1, 0.2, 0.3)
    assert AutoImageProcessor.from_pretrained(tmp_path).size["height"] == 32
    model.processor = None
    model.save_pretrained(tmp_path)
    assert memtune.load(tmp_path, backbone=backbone()).processor is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_weights_in_half_precision_are_accepted(folder, dtype):
    memtune.load(folder, backbone=backbone().to(dtype))


def test_other_weights_are_refused_unless_asked_for(folder, images):
    with pytest.raises(BackboneMismatchError, match="other weights"):
        memtune.load(folder, backbone=backbone(seed=7))
    assert memtune.load(folder, backbone=backbone(seed=7), any_weights=True)(images).logits.shape == (2, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"hidden_size": 64},
        {"patch_size": 16},
        {"num_attention_heads": 4},
        {"num_channels": 1},
    ],
)
@pytest.mark.parametrize("any_weights", [False, True])
def test_another_shape_is_refused_whatever_is_asked_for(folder, changes, any_weights):
    other = backbone(**changes)
    with pytest.raises(BackboneMismatchError, match="another shape"):
        memtune.load(folder, backbone=other, any_weights=any_weights)
    assert all(parameter.requires_grad for parameter in other.parameters())


def refused(folder, message):
    model = backbone()
    with pytest.raises(CheckpointError, match=message):
        memtune.load(folder, backbone=model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_no_folder(tmp_path):
    refused(tmp_path / "nothing", "no folder")


def test_an_empty_folder(tmp_path):
    refused(tmp_path, "adapter_config.json and adapter_model.safetensors not found")


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, f"{name} not found")


@pytest.mark.parametrize("size", [0, 7, 100, -10])
def test_truncated_weights(folder, size):
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "damaged or cut short")


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def test_every_wrong_tensor_is_named(folder):
    def change(tensors):
        tensors["blocks.0.extra"] = torch.zeros(1)
        tensors["blocks.1.memory"] = torch.zeros(9, 32)
        del tensors["class_token"]

    edit_tensors(folder, change)
    refused(
        folder,
        r"blocks.1.memory: got the shape \(9, 32\), expected \(3, 32\)\n"
        r".*missing: class_token\n.*unexpected: blocks.0.extra",
    )


def test_a_value_that_is_not_finite(folder):
    edit_tensors(folder, lambda tensors: tensors["head.bias"].fill_(float("nan")))
    refused(folder, "head.bias: has values that are not finite")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format_version", 2, "format version 2, this memtune reads up to 1; update memtune"),
        ("format_version", None, "no format_version"),
        ("labels", "cat", "labels is 'cat', expected a list"),
        ("masked", "no", "masked is 'no', expected a bool"),
        ("methods", [{"method": "magic"}], "got the method 'magic', expected one of"),
        ("methods", [{"method": "memory", "tokens": -1}], "tokens: got -1"),
        ("methods", [{"method": "memory", "size": 1}], r"unknown settings \['size'\]"),
        ("methods", [3], "expected a method's settings"),
    ],
)
def test_a_wrong_configuration(folder, name, value, message):
    config = json.loads((folder / CONFIG_NAME).read_text())
    config[name] = value
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    refused(folder, message)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_configuration(folder, text):
    (folder / CONFIG_NAME).write_text(text)
    refused(folder, "damaged|no format_version")


def test_saving_to_a_file_is_refused(tmp_path):
    (tmp_path / "pets").write_text("")
    with pytest.raises(CheckpointError, match="which is a file"):
        tuned(backbone()).save_pretrained(tmp_path / "pets")


def test_a_failed_save_leaves_the_old_adapter(folder, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(memtune.storage.adapter_folder, "write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuned(backbone(), masked=True).save_pretrained(folder)
    assert contents(folder) == before


def test_a_folder_can_be_moved(folder, tmp_path, images):
    before = memtune.load(folder, backbone=backbone())(images).logits
    shutil.move(folder, tmp_path / "elsewhere")
    assert torch.equal(memtune.load(tmp_path / "elsewhere", backbone=backbone())(images).logits, before)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # as PEFT says before it looks further
def test_others_loaders_say_what_to_call(folder):
    with pytest.raises(ValueError, match=r"load this folder with memtune\.load"):
        peft.PeftModel.from_pretrained(backbone(), folder)
    with pytest.raises(OSError, match=r"load this folder with memtune\.load"):
        AutoModelForImageClassification.from_pretrained(folder)
    with pytest.raises(ConfigError, match=r"load it with memtune\.load"):
        import_peft(folder, backbone())
