"""Multi-task models on the Hub, against the server of `hub_server`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hub_fixtures import backbone
from hub_server import Hub
from multitask import tune_all

import memtune
from memtune import MultiTaskModel
from memtune.errors import HubError

KINDS = [("memory", True), ("lora", False), ("memory at the end", False)]


def logits_of(model: Any) -> dict[str, torch.Tensor]:
    size = model.backbone.config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {name: answer.logits for name, answer in model(images).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_pushed_and_pulled(hub: Hub, tmp_path: Path) -> None:
    model = memtune.combine(backbone(), tune_all(backbone(), KINDS))
    expected = logits_of(model)
    info = model.push_to_hub("user/all", commit_message="Three tasks")
    assert info.commit_message == "Three tasks"
    pulled = MultiTaskModel.from_pretrained("user/all", backbone(), cache_dir=tmp_path / "one")
    assert_same(logits_of(pulled), expected)
    first, *_ = model.tasks
    alone = memtune.load("user/all", backbone=backbone(), subfolder="0-masked-memory", cache_dir=tmp_path / "two")
    assert alone.task.labels == model.tasks[first]
    model.remove_task(first)
    model.push_to_hub("user/all")
    again = MultiTaskModel.from_pretrained("user/all", backbone(), cache_dir=tmp_path / "three")
    assert_same(logits_of(again), {name: expected[name] for name in list(expected)[1:]})
    with pytest.raises(HubError, match=r"has no 0-masked-memory/adapter_config\.json"):
        memtune.load("user/all", backbone=backbone(), subfolder="0-masked-memory", cache_dir=tmp_path / "four")
    older = MultiTaskModel.from_pretrained("user/all", backbone(), revision=info.oid, cache_dir=tmp_path / "five")
    assert_same(logits_of(older), expected)


def test_the_card_names_tasks_and_no_path(hub: Hub, tmp_path: Path) -> None:
    model = memtune.combine(backbone(), tune_all(backbone(), KINDS))
    model.save_pretrained(tmp_path / "all", base_model_name="user/vit")
    text = (tmp_path / "all" / "README.md").read_text()
    assert "base_model: user/vit" in text
    assert "| `1: lora` | [`1-lora`](1-lora) | lora | unmasked | 3 |" in text
    model.save_pretrained(tmp_path / "none")
    assert str(tmp_path) not in (tmp_path / "none" / "README.md").read_text()


def test_what_is_no_collection(hub: Hub) -> None:
    with pytest.raises(HubError, match="user/nothing"):
        MultiTaskModel.from_pretrained("user/nothing", backbone())
