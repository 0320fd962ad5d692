"""Methods by their names, memtune's own and those of other packages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from backbone_zoo import BY_NAME, family_modes
from torch import Tensor, nn

import memtune
from memtune import Adapter, AdapterConfig, MemoryConfig, register_method
from memtune.errors import ConfigError
from memtune.methods import registry
from memtune.methods.memory import MemoryAdapter


@dataclass(frozen=True)
class ShiftConfig(AdapterConfig):
    """A method of another package: adds a trained vector to what a block's attention gives out."""

    method: ClassVar[str] = "shift"
    scale: float = 1.0


class ShiftAdapter(Adapter[ShiftConfig]):
    config_class = ShiftConfig

    def __init__(self, config: ShiftConfig, backbone: Any) -> None:
        super().__init__(config, backbone)
        self.blocks = nn.ModuleDict()
        for block in config.select(backbone):
            self.blocks[str(block.index)] = nn.ParameterDict({"shift": torch.zeros(block.width)})

    @classmethod
    def attach(cls, stream: Any, adapters: Any) -> None:
        (scale,) = {adapter.config.scale for adapter in adapters if adapter}
        for block, stack in stream.stacks(adapters):
            block["out"].register_forward_hook(_Shift(stack.tensor("shift"), scale))


class _Shift:
    def __init__(self, shift: Any, scale: float) -> None:
        self.shift, self.scale = shift, scale

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + self.scale * self.shift.like(output)


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    before = dict(registry._METHODS)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)


def _install(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    entries = EntryPoints([EntryPoint(name="shift", value=value, group="memtune.methods")])
    monkeypatch.setattr(registry, "entry_points", lambda **wanted: entries.select(**wanted))


def test_memory_is_there() -> None:
    assert "memory" in registry.method_names()
    assert registry.find_method("memory") is MemoryAdapter


@pytest.mark.parametrize("name", sorted(registry._METHODS))
def test_every_method_names_its_settings(name: str) -> None:
    adapter_class = registry.find_method(name)
    config = adapter_class.config_class()
    assert config.method == name
    assert registry.read_config(config.to_dict()) == config


@family_modes
def test_a_method_of_another_package_is_one_class(case: Any, masked: bool) -> None:
    assert register_method(ShiftAdapter) is ShiftAdapter
    assert register_method(ShiftAdapter) is ShiftAdapter  # again, as when a module is run twice
    model = memtune.wrap(case.build(), [MemoryConfig(), ShiftConfig()], num_labels=2, masked=masked)
    model(case.images(), labels=torch.tensor([0, 1])).loss.backward()
    assert model.task.methods == ["memory", "shift"]
    assert "blocks.0.shift" in model.task.tensors()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.task.parameters())


def test_a_method_of_an_entry_point_is_found_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_shift_adapter", ShiftAdapter, raising=False)
    _install(monkeypatch, "memtune.methods.registry:_shift_adapter")
    assert "shift" in registry.method_names()
    assert registry.find_method("shift") is ShiftAdapter
    assert registry.read_config({"method": "shift", "scale": 2.0, "blocks": [0]}) == ShiftConfig(scale=2.0, blocks=(0,))


def _distribution(folder: Path, name: str, value: str) -> None:
    """What pip leaves of a distribution whose entry point `shift` is `value`."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[memtune.methods]\nshift = {value}\n")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"alpha": "alpha_shift:Shift", "beta": "beta_shift:Shift"},
            r"'shift' is in several.* packages: alpha 1\.0 \(alpha_shift:Shift\) and beta 1\.0 \(beta_shift:Shift\);",
        ),
        ({"alpha": "no_such_module:Shift"}, r"'shift' of alpha 1\.0 .*cannot be imported: No module named"),
        (
            {"alpha": "memtune.methods.registry:NoSuch"},
            r"'shift' of alpha 1\.0 .*cannot be imported: .*has no attribute",
        ),
        (
            {"alpha": "memtune.methods:MemoryAdapter"},
            r"the entry point 'shift' of alpha 1\.0 .*gives the method 'memory'; name both alike",
        ),
        ({"alpha": "torch.nn:Linear"}, "has no config_class"),
    ],
    ids=["two packages", "no module", "no class", "another name", "no adapter"],
)
def test_entry_points_that_cannot_be_used_are_named(
    values: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in values.items():
        _distribution(tmp_path, name, value)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(registry._METHODS)
    with pytest.raises(ConfigError, match=message):
        registry.find_method("shift")
    assert dict(registry._METHODS) == before


def test_one_class_in_two_packages_is_no_clash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_shift_adapter", ShiftAdapter, raising=False)
    for name in ("alpha", "beta"):
        _distribution(tmp_path, name, "memtune.methods.registry:_shift_adapter")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.find_method("shift") is ShiftAdapter


def test_a_name_taken_is_refused() -> None:
    class Other(MemoryAdapter):
        config_class = MemoryConfig

    with pytest.raises(ConfigError, match=r"'memory' is memtune\.methods\.memory\.MemoryAdapter already"):
        register_method(Other)
    assert registry.find_method("memory") is MemoryAdapter


@pytest.mark.parametrize("value", [nn.Linear, MemoryConfig, "memory", None], ids=str)
def test_what_is_no_method_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="config_class"):
        register_method(value)


def test_an_unknown_method_is_refused_with_the_known_named() -> None:
    with pytest.raises(ConfigError, match=r"got the method 'mamory', expected one of \[.*'memory'"):
        registry.find_method("mamory")


@pytest.mark.parametrize("values", [None, [], {}, {"tokens": 4}, {"method": 3}, "memory"], ids=str)
def test_settings_without_a_method_are_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match="expected a method's settings"):
        registry.read_config(values)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown settings \['token'\]; it has \['blocks', 'tokens'"):
        registry.read_config({"method": "memory", "token": 4})


def test_a_configuration_stays_as_it_is() -> None:
    config = MemoryConfig(tokens=1)
    assert registry.as_config(config) is config
    assert isinstance(registry.create_adapter(config, memtune.backbones.Backbone(BY_NAME["vit"].build())), Adapter)
