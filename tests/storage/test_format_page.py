"""docs/format.md says what is in an adapter folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from backbone_zoo import BY_NAME

import memtune
from memtune import LoraConfig, MemoryConfig, SideNetworkConfig
from memtune.storage import FORMAT_VERSION

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def keys() -> set[str]:
    """The keys of the page's table."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE, re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


OPTIONS: list[dict[str, Any]] = [
    {"config": [MemoryConfig(2), SideNetworkConfig(4)], "masked": True, "labels": ["a", "b"]},
    {"config": LoraConfig(r=2), "labels": ["a"], "problem_type": "regression"},
    {"config": LoraConfig(r=2), "labels": ["a", "b"], "head": memtune.RandomFeatures(20)},
    {"config": LoraConfig(r=2), "head": "backbone"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_each_key_is_explained(options: dict[str, Any], tmp_path: Path) -> None:
    model = memtune.wrap(BY_NAME["vit-head"].build(), **options)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() <= keys()
    assert f"Format version {FORMAT_VERSION}." in PAGE
    assert all(name in PAGE for name in written["backbone"])


def test_each_key_that_is_explained_is_written(tmp_path: Path) -> None:
    found: set[str] = {"image_size"}  # by training at another size, tests/training/test_honesty.py
    for number, options in enumerate(OPTIONS):
        memtune.wrap(BY_NAME["vit-head"].build(), **options).save_pretrained(tmp_path / str(number))
        found |= json.loads((tmp_path / str(number) / "adapter_config.json").read_text()).keys()
    assert keys() - {"class_token"} == found
