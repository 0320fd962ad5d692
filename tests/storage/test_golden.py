"""Folders of every format version (tests/golden): this release loads them, and they answer as they did then."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from golden import make
from other_releases import install
from safetensors.torch import load_file
from torch import Tensor

import memtune
from memtune.errors import CheckpointError
from memtune.storage import adapter_folder as checkpoint

VERSIONS = sorted(make.HERE.glob("version_*"))
CURRENT = make.HERE / f"version_{checkpoint.FORMAT_VERSION}"
OTHER = "5.22.0" if not transformers.__version__.startswith("5.22.") else "5.23.0"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_recorded(found: dict[str, Tensor], folder: Path) -> None:
    recorded = load_file(folder / "answers.safetensors")
    assert found.keys() == recorded.keys()
    for name, logits in recorded.items():
        torch.testing.assert_close(found[name], logits, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_each_folder_answers_as_it_did(folder: Path) -> None:
    assert_recorded(make.answers(folder), folder)


def test_there_are_folders_of_this_version_with_each_method_and_both_modes() -> None:
    adapters = [json.loads(path.read_text()) for path in CURRENT.glob("*/adapter_config.json")]
    methods = {"memory", "approximated_prompts", "lora", "coda_prompts"}
    assert {method["method"] for adapter in adapters for method in adapter["methods"]} == methods
    assert {adapter["masked"] for adapter in adapters} == {False, True}
    answers = load_file(CURRENT / "answers.safetensors")
    assert {name for name in answers if "/" in name} == {
        f"collection/{name}" for name in ("memory", "lora", "a later one")
    }
    distinct = [each[:, :3] for name, each in answers.items() if "/" not in name or name.endswith("one")]
    for place, one in enumerate(distinct):
        assert all((one - other).abs().max() > 0.1 for other in distinct[:place])


def test_they_are_small() -> None:
    assert sum(len(data) for folder in VERSIONS for data in contents(folder).values()) < 300_000


def as_version(folder: Path, name: str, version: int) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | {"format_version": version}))


def test_a_newer_adapter_is_refused_by_name(tmp_path: Path) -> None:
    backbone, folder = make.read_backbone(CURRENT), tmp_path / "memory"
    shutil.copytree(CURRENT / "memory", folder)
    as_version(folder, "adapter_config.json", checkpoint.FORMAT_VERSION + 1)
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"memory/adapter_config.json has format version 2.*update memtune"):
        memtune.load(folder, backbone=backbone)
    with pytest.raises(CheckpointError, match=r"task 'new': .*format version 2.*update memtune"):
        memtune.combine(backbone, {"new": folder})
    assert contents(folder) == before
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_a_newer_collection_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "collection"
    shutil.copytree(CURRENT / "collection", folder)
    as_version(folder, "multi_task_config.json", 2)
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"multi_task_config.json has format version 2.*update memtune"):
        memtune.MultiTaskModel.from_pretrained(folder, make.read_backbone(CURRENT))
    assert contents(folder) == before


def upgrade(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """From a made-up version 0, in which the labels were called classes, and the head's weights a classifier."""
    config["labels"] = config.pop("classes")
    tensors["head.weight"] = tensors.pop("classifier")


def test_an_older_adapter_is_upgraded_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, folder = make.read_backbone(CURRENT), tmp_path / "memory"
    shutil.copytree(CURRENT / "memory", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"format_version": 0, "classes": config.pop("labels")}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["classifier"] = tensors.pop("head.weight")
    checkpoint.safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    before = contents(folder)
    with pytest.raises(CheckpointError, match="format version 0, which no memtune wrote"):
        memtune.load(folder, backbone=backbone)
    monkeypatch.setitem(checkpoint.UPGRADES, 0, upgrade)
    images = load_file(CURRENT / "images.safetensors")["images"]
    found = memtune.load(folder, backbone=backbone)(images).logits
    torch.testing.assert_close(found, load_file(CURRENT / "answers.safetensors")["memory"], atol=1e-5, rtol=1e-5)
    assert contents(folder) == before  # what is read is not written


ANSWER = """
import sys
from pathlib import Path
import transformers
from golden import make
from other_releases import install
from safetensors.torch import save_file

print(transformers.__version__, transformers.__file__)
save_file(make.answers(Path(sys.argv[1])), "found.safetensors")
"""


@pytest.mark.slow
def test_another_release_of_transformers_gives_the_same_answers(tmp_path: Path) -> None:
    site = install(tmp_path / "site", f"transformers=={OTHER}")
    paths = [site, Path(memtune.__file__).parents[1], Path(__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    arguments = [sys.executable, "-c", ANSWER, str(CURRENT)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [OTHER, str(site / "transformers" / "__init__.py")]
    assert_recorded(load_file(tmp_path / "found.safetensors"), CURRENT)
