"""What every method's settings have in common."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import pytest
from backbone_zoo import BY_NAME

from memtune import Adapter, AdapterConfig, MemoryConfig
from memtune.backbones.backbone import Backbone
from memtune.errors import ConfigError


@dataclass(frozen=True)
class Config(AdapterConfig):
    method: ClassVar[str] = "test"
    sizes: tuple[int, ...] = (1, 2)


def indices(config: AdapterConfig, name: str = "vit") -> list[int]:
    return [block.index for block in config.select(Backbone(BY_NAME[name].build()))]


@pytest.mark.parametrize(
    ("blocks", "expected"), [(None, [0, 1, 2]), ([], []), ([0], [0]), ([-1], [2]), ((2, 0), [0, 2]), (range(2), [0, 1])]
)
def test_chosen_blocks_in_order(blocks: Any, expected: list[int]) -> None:
    assert indices(Config(blocks=blocks), "swin") == expected


@pytest.mark.parametrize("blocks", [[2], [-3], [0, 5]], ids=str)
def test_blocks_outside_are_refused(blocks: list[int]) -> None:
    with pytest.raises(ConfigError, match="expected indices below the backbone's 2 blocks"):
        indices(Config(blocks=blocks))


@pytest.mark.parametrize("blocks", [[0, 0], [-1, 1]], ids=str)
def test_a_block_named_twice_is_refused(blocks: list[int]) -> None:
    with pytest.raises(ConfigError, match="names a block twice"):
        indices(Config(blocks=blocks))


@pytest.mark.parametrize("blocks", ["0", 0, [0.0], [None], [True], {0, 1}, {0: 1}], ids=str)
def test_blocks_of_another_type_are_refused(blocks: Any) -> None:
    with pytest.raises(ConfigError, match="expected a sequence of block indices"):
        Config(blocks=blocks)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().blocks = [0]
    given = [0, 1]
    config = Config(blocks=given)
    given.append(2)
    assert config.blocks == (0, 1)


def test_settings_are_json_values_and_come_back() -> None:
    config = Config(blocks=[1], sizes=(3,))
    assert json.loads(json.dumps(config.to_dict())) == {"method": "test", "blocks": [1], "sizes": [3]}
    assert MemoryConfig.from_dict(json.loads(json.dumps(MemoryConfig(blocks=[0]).to_dict()))) == MemoryConfig(
        blocks=[0]
    )
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Config: got the unknown settings \['size'\]; it has \['blocks', 'sizes'\]"):
        Config.from_dict({"method": "test", "size": 3})


def test_defaults() -> None:
    config = Config()
    assert config.blocks is None
    assert not config.trains_class_token()
    assert config.for_mode(masked=True) is config
    assert Config.adopt("anything") is None


def test_an_adapter_must_say_how_it_attaches() -> None:
    class Unfinished(Adapter):
        config_class = Config

    with pytest.raises(TypeError, match="attach"):
        Unfinished(Config(), Backbone(BY_NAME["vit"].build()))
