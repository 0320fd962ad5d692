"""The folder of many tasks: replaced at once, and nothing but what was written for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import memtune
from memtune import MemoryConfig, MultiTaskModel
from memtune.errors import CheckpointError
from memtune.storage import atomic, collection

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def backbone() -> Any:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8)).eval()


def combined(backbone: Any, *names: str) -> MultiTaskModel:
    """Tasks whose only label is their name."""
    return memtune.combine(
        backbone, {name: memtune.wrap(backbone, MemoryConfig(1), labels=[f"of {name}"], masked=True) for name in names}
    )


def labels(folder: Path, backbone: Any) -> dict[str, list[str]]:
    return MultiTaskModel.from_pretrained(folder, backbone).tasks


@pytest.mark.parametrize("moves", range(9))
def test_a_save_that_is_stopped_leaves_one_save(
    moves: int, backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tasks change their folders with each other; stopped after any number of renames."""
    combined(backbone, "a b", "a/b").save_pretrained(tmp_path)
    later = combined(backbone, "a/b", "a b", "c")
    done = 0

    def stop_after(original: Any) -> Any:
        def move(path: Path, target: Path) -> Any:
            nonlocal done
            if done == moves:
                raise KeyboardInterrupt
            done += 1
            return original(path, target)

        return move

    for name in ("rename", "replace"):
        monkeypatch.setattr(atomic.Path, name, stop_after(getattr(Path, name)))
    with pytest.raises(KeyboardInterrupt):
        later.save_pretrained(tmp_path)
    monkeypatch.undo()
    found = labels(tmp_path, backbone)
    assert all(each == [f"of {name}"] for name, each in found.items())
    assert set(found) == ({"a b", "a/b", "c"} if moves else {"a b", "a/b"})
    later.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob(".memtune*"))
    assert memtune.load(tmp_path / "a-b", backbone=backbone).task.labels == ["of a/b"]


def test_a_save_deletes_what_was_written_alone(backbone: Any, tmp_path: Path) -> None:
    combined(backbone, "old", "noted").save_pretrained(tmp_path)
    (tmp_path / "noted" / "my notes.txt").write_text("mine")
    (tmp_path / "README.txt").write_text("mine")
    combined(backbone, "new").save_pretrained(tmp_path)
    assert labels(tmp_path, backbone) == {"new": ["of new"]}
    assert not (tmp_path / "old").exists()
    assert [path.name for path in (tmp_path / "noted").iterdir()] == ["my notes.txt"]
    assert (tmp_path / "README.txt").read_text() == "mine"


def test_a_strangers_index_deletes_nothing(backbone: Any, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "README.md").write_text("my photographs")
    (tmp_path / "multi_task_config.json").write_text(json.dumps({"format_version": 1, "tasks": {"pets": "photos"}}))
    combined(backbone, "new").save_pretrained(tmp_path)
    assert (tmp_path / "photos" / "README.md").read_text() == "my photographs"


def test_a_link_in_the_place_of_a_task_is_not_followed(backbone: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "new").symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is a link"):
        combined(backbone, "new").save_pretrained(tmp_path / "all")
    assert not list((tmp_path / "mine").iterdir())
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["new"]


@pytest.mark.parametrize(
    "name", ["README.md", "multi_task_config.json", "x" * 300, "ä" * 200, "con", "..", "/", "\ud800", "\x00"]
)
def test_any_name_of_a_task(name: str, backbone: Any, tmp_path: Path) -> None:
    both = memtune.combine(
        backbone, {each: memtune.wrap(backbone, MemoryConfig(1), labels=["l"], masked=True) for each in (name, "other")}
    )
    both.save_pretrained(tmp_path)
    assert list(labels(tmp_path, backbone)) == [name, "other"]


def test_what_a_killed_save_left_of_removed_tasks_goes_with_the_next_one(
    backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    combined(backbone, "old", "older").save_pretrained(tmp_path)

    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collection, "remove_files", stop)
    with pytest.raises(KeyboardInterrupt):
        combined(backbone, "new").save_pretrained(tmp_path)
    monkeypatch.undo()
    assert labels(tmp_path, backbone) == {"new": ["of new"]}
    assert (tmp_path / "old").exists()
    combined(backbone, "new").save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "multi_task_config.json", "new"]
