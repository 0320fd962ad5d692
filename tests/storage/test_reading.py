"""A folder may be a stranger's, or be written to while it is read: plain files, of one moment, limited, and no code."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune import LoraConfig, MemoryConfig
from memtune.errors import CheckpointError, ConfigError, InputError, MemtuneError

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def backbone() -> Any:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8)).eval()


def saved(folder: Path, **options: Any) -> memtune.TunedModel:
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    model = memtune.wrap(backbone(), MemoryConfig(2), labels=["a", "b"], processor=processor, **options)
    model.save_pretrained(folder)
    return model


def edited(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def linked(folder: Path, name: str) -> None:
    """Put a link in the place of a file, to that very file elsewhere."""
    (folder / name).rename(folder.parent / f"elsewhere-{folder.name}")
    (folder / name).symlink_to(folder.parent / f"elsewhere-{folder.name}")


BACKBONE = {"family": "vit", "model_class": "ViTForImageClassification", "depth": 2, "name_or_path": ""}
DEEP = '{"a": ' * 100_000 + "1" + "}" * 100_000
CODE = '{"auto_map": {"AutoImageProcessor": "evil.E"}}'
STRANGE: dict[str, Callable[[Path], Any]] = {
    "deep configuration": lambda folder: (folder / "adapter_config.json").write_text(DEEP),
    "deep processor": lambda folder: (folder / "preprocessor_config.json").write_text(DEEP),
    "FIFO": lambda folder: os.mkfifo(folder / "preprocessor_config.json"),
    "device": lambda folder: (folder / "preprocessor_config.json").symlink_to("/dev/zero"),
    "folder": lambda folder: (folder / "preprocessor_config.json").mkdir(),
    "code": lambda folder: (folder / "preprocessor_config.json").write_text(CODE),
    "labels that are none": lambda folder: edited(folder, labels=[None, {}]),
    "labels twice": lambda folder: edited(folder, labels=["a", "a"]),
    "digests that are none": lambda folder: edited(folder, extends={"z": []}),
    "a fingerprint without values": lambda folder: edited(folder, backbone=BACKBONE | {"fingerprint": {"blocks": "x"}}),
    "a link": lambda folder: linked(folder, "adapter_config.json"),
    "a link to tensors": lambda folder: linked(folder, "adapter_model.safetensors"),
    "many tokens": lambda folder: edited(folder, methods=[MemoryConfig(10**9).to_dict()]),
    "a number beyond all": lambda folder: edited(folder, methods=[MemoryConfig(2).to_dict() | {"init_std": 10**400}]),
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_what_is_strange_is_refused(strange: Callable[[Path], Any], tmp_path: Path) -> None:
    model = saved(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    path = tmp_path / "preprocessor_config.json"
    if strange in (STRANGE["FIFO"], STRANGE["device"], STRANGE["folder"]):
        path.unlink()
    strange(tmp_path)
    with pytest.raises(CheckpointError):
        memtune.load(tmp_path, backbone=model.backbone)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [torch.complex64, torch.bool, torch.int64, torch.float8_e4m3fn])
def test_tensors_of_other_types(kind: torch.dtype, tmp_path: Path) -> None:
    model = saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: torch.ones_like(tensor).to(kind) for key, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match="is of the type"):
        memtune.load(tmp_path, backbone=model.backbone)


def _write_for_ever(folder: str, stop: Any) -> None:
    model = backbone()
    models = []
    for number, letter in enumerate("ab"):
        each = memtune.wrap(model, MemoryConfig(2), labels=[letter + "0", letter + "1"])
        with torch.no_grad():
            for parameter in each.task.parameters():
                parameter.fill_(float(number))
        models.append(each)
    while not stop.is_set():
        for each in models:
            each.save_pretrained(folder)


def test_a_reader_beside_a_writer_sees_one_adapter() -> None:
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with tempfile.TemporaryDirectory() as folder:
        writer = context.Process(target=_write_for_ever, args=(folder, stop))
        writer.start()
        try:
            while not (Path(folder) / "README.md").exists():
                assert writer.is_alive()
            own, seen = backbone(), set()
            for _ in range(300):
                loaded = memtune.load(folder, backbone=own)
                value = {float(tensor.mean()) for tensor in loaded.task.tensors().values()}
                assert value == {float("ab".index(loaded.task.labels[0][0]))}
                seen |= value
        finally:
            stop.set()
            writer.join(60)
    assert seen == {0.0, 1.0}


def test_links_in_place_of_memtunes_own_folders_move_nothing(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    (tmp_path / "a" / ".memtune-commit").symlink_to(mine)
    with pytest.raises(CheckpointError, match="no folder of memtune's"):
        model.save_pretrained(tmp_path / "a")
    assert (mine / "thesis.txt").read_text() == "precious"
    (tmp_path / "a" / ".memtune-commit").unlink()
    (tmp_path / "a" / ".memtune-staging").symlink_to(mine)
    model.save_pretrained(tmp_path / "a")
    assert (mine / "thesis.txt").read_text() == "precious"
    (tmp_path / "a" / "README.md").unlink()
    (tmp_path / "a" / "README.md").mkdir()
    with pytest.raises(CheckpointError, match="where a file is to be written"):
        model.save_pretrained(tmp_path / "a")
    assert memtune.load(tmp_path / "a", backbone=model.backbone)


def test_a_neighbours_processor_stays(tmp_path: Path) -> None:
    own = backbone()
    transformers.CLIPImageProcessorPil().save_pretrained(tmp_path)
    memtune.wrap(own, MemoryConfig(1), labels=["a", "b"]).save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").exists()
    saved(tmp_path)
    memtune.wrap(own, MemoryConfig(1), labels=["a", "b"]).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()  # which was an adapter's


@pytest.mark.parametrize("name", ["README.md", "multi_task_config.json", "CON", "nul.txt", "x" * 300])
def test_names_of_tasks_meet_no_files(name: str, tmp_path: Path) -> None:
    own = backbone()
    model = memtune.wrap(own, MemoryConfig(1), labels=["a", "b"], masked=True)
    for _ in range(2):
        memtune.combine(own, {name: model, "b": model}).save_pretrained(tmp_path)
    assert [*memtune.MultiTaskModel.from_pretrained(tmp_path, own).tasks] == [name, "b"]


def test_tasks_that_others_extend_are_saved_before_them(tmp_path: Path) -> None:
    own = backbone()
    first = memtune.wrap(own, MemoryConfig(1), labels=["a", "b"], masked=True)
    both = memtune.combine(own, {"first": first})
    both.add_task("later", memtune.wrap(own, MemoryConfig(1), labels=["a", "b"], masked=True, extends=both))
    both.remove_task("first")
    with pytest.raises(ConfigError, match="extends 'first', which is not in the model any more"):
        both.save_pretrained(tmp_path)
    both.add_task("first", first)
    both.save_pretrained(tmp_path)
    assert {*memtune.MultiTaskModel.from_pretrained(tmp_path, own).tasks} == {"first", "later"}


def test_a_model_of_many_tasks_gives_its_backbone_back_and_has_a_state() -> None:
    own = backbone().train()
    tuned = memtune.wrap(own, MemoryConfig(1), labels=["a", "b"], masked=True)
    both = memtune.combine(own, {"a": tuned, "b": tuned})
    state = both.state_dict()
    assert state
    assert all(key.startswith("tasks.") for key in state)
    other = memtune.combine(own, {"a": tuned, "b": tuned})
    with torch.no_grad():
        other.arrangement.tasks["a"].head.bias.fill_(7.0)
    other.load_state_dict(state)
    assert torch.equal(other.arrangement.tasks["a"].head.bias, both.arrangement.tasks["a"].head.bias)
    incompatible = other.load_state_dict({"tasks.a.nothing": torch.zeros(1)}, strict=False)
    assert incompatible.unexpected_keys == ["tasks.a.nothing"]
    assert len(incompatible.missing_keys) == len(state)
    for model in (tuned, both, other):
        model.detach()
    assert own.training
    assert all(parameter.requires_grad for parameter in own.parameters())


@pytest.mark.parametrize("part", ["position_embeddings", "layernorm.bias"])
def test_any_other_tensor_of_the_tower_is_another_backbone(part: str, tmp_path: Path) -> None:
    model = saved(tmp_path)
    with torch.no_grad():
        next(each for name, each in model.backbone.named_parameters() if part in name).add_(0.5)
    with pytest.raises(MemtuneError, match="other weights"):
        memtune.load(tmp_path, backbone=model.backbone)


def test_backbones_of_other_precisions(tmp_path: Path) -> None:
    model = saved(tmp_path)
    for kind in (torch.float64, torch.bfloat16):
        assert memtune.load(tmp_path, backbone=backbone().to(kind))
    memtune.wrap(backbone().double(), MemoryConfig(1), labels=["a", "b"]).save_pretrained(tmp_path / "double")
    assert memtune.load(tmp_path / "double", backbone=model.backbone)


def test_small_things() -> None:
    model = memtune.wrap(backbone(), LoraConfig(r=2), labels=["a", "b"])
    with pytest.raises(InputError, match="got no image"):
        model(torch.zeros(0, 3, 32, 32))
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_enable({"preserve_rng_state": False})
    model.train()(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.task.parameters())
