"""examples/new_method.py: run as a script, held to the contract and to peft's (IA)3, and installed as a package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from backbone_zoo import BY_NAME
from contract_cases import FEW, Row, can_be_masked, linears, logits, moved, wrapped
from contract_promises import PROMISES, Promise
from torch import Tensor

import memtune
from memtune.backbones.backbone import Backbone
from memtune.methods import registry
from memtune.streams import TaskStream, Trunk

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_method.py"
VIT = BY_NAME["vit"]
PLACES = [(name, masked) for name in FEW for masked in (False, True) if not masked or can_be_masked(BY_NAME[name])]


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Row:
    """The row of the contract's table that the example would have; its method is known during the test alone."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    spec: Any = importlib.util.spec_from_file_location("new_method", EXAMPLE)
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return Row(
        example.IA3Config(),
        keys=("key", "value", "fc2"),
        count=lambda block, width, feature_width: 2 * width + linears(block)[-1].in_features,
        unchanged=True,
        cases=FEW,
    )


@pytest.mark.parametrize(("name", "masked"), PLACES)
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_example_keeps_the_contract(promise: Promise, name: str, masked: bool, row: Row) -> None:
    promise(row, BY_NAME[name], masked)


def factors(model: memtune.TunedModel) -> list[dict[str, Tensor]]:
    """For each block the factors of keys, values and activations."""
    tensors = model.task.tensors()
    return [{role: tensors[f"blocks.{index}.{role}"] for role in ("key", "value", "fc2")} for index in range(VIT.depth)]


def test_unmasked_it_is_pefts(row: Row) -> None:
    model = moved(wrapped(row, VIT, False))
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "mlp.fc2"], feedforward_modules=["mlp.fc2"])
    plain: Any = peft.get_peft_model(VIT.build(), config).eval().base_model.model
    with torch.no_grad():
        for block, scales in zip(Backbone(plain).blocks, factors(model), strict=True):
            for role, scale in scales.items():
                block[role].ia3_l["default"].copy_(scale.view_as(block[role].ia3_l["default"]))
        expected = model.task.head(plain(VIT.images()).last_hidden_state[:, 0])
    torch.testing.assert_close(logits(model, VIT.images()), expected, atol=1e-5, rtol=1e-5)


def test_masked_the_task_reads_scaled_keys_and_values_of_the_trunk(row: Row) -> None:
    model = moved(wrapped(row, VIT, True))
    changed = Backbone(VIT.build())
    with torch.no_grad():
        current, _ = Trunk(Backbone(model.backbone)).run(VIT.images())
        for block, scales in zip(changed.blocks, factors(model), strict=True):
            key, value = (scales[role].view(1, block.heads, 1, -1) for role in ("key", "value"))
            seen = current.trunk[block.index]
            current.trunk[block.index] = seen._replace(key=seen.key * key, value=seen.value * value)
            for role in ("key", "value"):
                block[role].weight.mul_(scales[role][:, None])
                block[role].bias.mul_(scales[role])
            block["fc2"].weight.mul_(scales["fc2"])
        expected = model.task.head(TaskStream(changed).features(current, model.task.token())[:, 0])
    torch.testing.assert_close(logits(model, VIT.images()), expected, atol=1e-5, rtol=1e-5)


def run(*arguments: str, **options: Any) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    output = run(str(EXAMPLE), cwd=tmp_path)
    first, second = (line for line in output.splitlines())
    assert first.count("'loss'") == 2
    assert second.startswith("{'ia3': 256, 'class_token': 32, 'head': 66, 'total': 354")
    assert (tmp_path / "ia3-adapter" / "adapter_model.safetensors").is_file()


PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "memtune-ia3"
version = "1.0"
dependencies = ["memtune"]

[project.entry-points."memtune.methods"]
ia3 = "memtune_ia3:IA3Adapter"

[tool.setuptools]
py-modules = ["memtune_ia3"]
"""

WRAP = """
import sys, torch, memtune
from memtune.methods.registry import method_names, read_config
from transformers import ViTConfig, ViTModel

vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).eval()
vit.save_pretrained("backbone")
vit = ViTModel.from_pretrained("backbone")
assert "ia3" in method_names() and "memtune_ia3" not in sys.modules
model = memtune.wrap(vit, read_config({"method": "ia3", "blocks": [1]}), num_labels=2, masked=True).eval()
torch.nn.init.normal_(model.task.adapters[0].blocks["1"]["key"])
model.save_pretrained("adapter")
torch.manual_seed(0)
print(model(torch.randn(1, 3, 224, 224)).logits.tolist())
"""

LOAD = """
import torch, memtune

model = memtune.load("adapter")
torch.manual_seed(0)
print(model(torch.randn(1, 3, 224, 224)).logits.tolist())
print(model.task.methods, type(model.task.adapters[0]).__module__)
"""


@pytest.mark.slow
def test_a_package_of_its_own_is_found_by_the_methods_name(tmp_path: Path) -> None:
    """The example as a second distribution: built and installed by pip, without a network, in a folder on the path."""
    pytest.importorskip("pip")
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "memtune_ia3.py").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    pip = ["-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--no-index", "--no-cache-dir"]
    run(*pip, "--no-build-isolation", "--no-deps", "--target", str(site), str(source), cwd=tmp_path)
    paths = [str(site), str(Path(memtune.__file__).parents[1])]  # memtune itself may not be installed but lie here
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    answer = run("-c", WRAP, cwd=tmp_path, env=environment)
    again, names = run("-c", LOAD, cwd=tmp_path, env=environment).splitlines()
    assert again == answer.strip()
    assert names == "['ia3'] memtune_ia3"
