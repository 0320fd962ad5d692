"""Checkpoints that a stranger has changed, with digests that fit: refused by name, before anything is changed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from training_runs import QUICK, equal, items, tuned, weights

import memtune
from memtune import TrainingConfig
from memtune.errors import CheckpointError, ConfigError
from memtune.training.checkpoint import _digests


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has done the first of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    memtune.fit(tuned(masked=True), items(), config=settings(folder))
    shutil.rmtree(folder / "checkpoint-8")
    return folder


def settings(folder: Path) -> TrainingConfig:
    return TrainingConfig(**QUICK, output_dir=folder)


def go_on(folder: Path) -> memtune.TunedModel:
    model = tuned(masked=True)
    memtune.fit(model, items(), config=settings(folder), resume_from_checkpoint=True)
    return model


def sign(folder: Path, **changes: Any) -> None:
    """Write the digests of what is there now."""
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": _digests(folder)} | changes))


class Evil:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


def state(**changes: Any) -> Callable[[Path], None]:
    """Change the run's progress."""

    def change(folder: Path) -> None:
        values = torch.load(folder / "run.pt", weights_only=True)
        values["progress"] |= changes
        torch.save(values, folder / "run.pt")

    return change


def parts(**changes: Any) -> Callable[[Path], None]:
    """Change, or take away, parts of the run's state."""

    def change(folder: Path) -> None:
        values = torch.load(folder / "run.pt", weights_only=True) | changes
        torch.save({name: each for name, each in values.items() if each != "away"}, folder / "run.pt")

    return change


def values(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Change the trained values."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)

    return apply


def optimizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the optimizer's state."""

    def apply(folder: Path) -> None:
        kept = torch.load(folder / "optimizer.bin", weights_only=True)
        change(kept)
        torch.save(kept, folder / "optimizer.bin")

    return apply


CHANGES: dict[str, Callable[[Path], Any]] = {
    "no progress": parts(progress="away"),
    "unknown progress": state(evil=1),
    "a negative step": state(step=-5),
    "a step beyond the last": state(step=10**9),
    "a step that is a text": state(step="1"),
    "a batch beyond the last": state(batches=10**9),
    "an order of another kind": state(order=torch.zeros(3)),
    "a history of numbers": state(history=[3]),
    "sums of another shape": state(sums=torch.zeros(5)),
    "no schedule": parts(schedule="away"),
    "a schedule that is a number": parts(schedule=3),
    "a schedule of other values": parts(schedule={"get_lr": 1}),
    "best values of another model": parts(best={"tensors": {"x": torch.ones(1)}, "waited": 0, "scores": {}}),
    "scores that are none": parts(best={"tensors": None, "waited": 0, "scores": {"accuracy": "high"}}),
    "a state that is a list": lambda folder: torch.save([1], folder / "run.pt"),
    "values that are not finite": values(lambda kept: {key: each * float("nan") for key, each in kept.items()}),
    "no values": values(lambda kept: {}),
    "values of other shapes": values(lambda kept: {key: torch.ones(3) for key in kept}),
    "values of other names": values(lambda kept: {f"x{key}": each for key, each in kept.items()}),
    "the backbone's values beside": values(lambda kept: kept | {"backbone.vit.layernorm.weight": torch.ones(32)}),
    "no file of values": lambda folder: (folder / "model.safetensors").unlink(),
    "a link to values": lambda folder: (
        (folder / "model.safetensors").rename(folder.parent / "elsewhere"),
        (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere"),
    ),
    "an optimizer with text": optimizer(lambda kept: kept["param_groups"][0].update(lr="fast")),
    "an optimizer of other shapes": optimizer(lambda kept: kept["state"][0].update(exp_avg=torch.ones(7))),
    "an optimizer that is not finite": optimizer(lambda kept: kept["state"][0]["exp_avg"].fill_(float("inf"))),
    "no random states": lambda folder: (folder / "random_states_0.pkl").unlink(),
    "random states of a list": lambda folder: torch.save([1], folder / "random_states_0.pkl"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_checkpoint_is_refused(change: Callable[[Path], Any], finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    model = tuned(masked=True)
    before, backbone = weights(model), {key: each.clone() for key, each in model.backbone.state_dict().items()}
    change(folder / "checkpoint-4")
    if not (folder / "checkpoint-4" / "model.safetensors").is_symlink():
        sign(folder / "checkpoint-4")
    with pytest.raises(CheckpointError):
        memtune.fit(model, items(), config=settings(folder), resume_from_checkpoint=True)
    assert equal(weights(model), before)
    assert equal(model.backbone.state_dict(), backbone)


@pytest.mark.parametrize("name", ["run.pt", "random_states_0.pkl", "optimizer.bin", "model.safetensors"])
@pytest.mark.parametrize("saved", ["pickle", "torch"])
def test_no_code_of_a_checkpoint_runs(name: str, saved: str, finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    place, evil = folder / "checkpoint-4" / name, Evil(tmp_path / "ran")
    place.write_bytes(pickle.dumps(evil)) if saved == "pickle" else torch.save(evil, place)
    sign(folder / "checkpoint-4")
    with pytest.raises(CheckpointError):
        go_on(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": None},
        {"settings": [1]},
        {"settings": "x"},
        {"files": None},
        {"files": ["a"]},
        {"files": {}},
        {"format_version": True},
        {"format_version": [1]},
    ],
    ids=str,
)
def test_a_changed_description_is_refused(changes: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    sign(folder / "checkpoint-4", **changes)
    with pytest.raises((CheckpointError, ConfigError)):
        go_on(folder)


def test_a_checkpoint_as_it_is_goes_on(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    sign(folder / "checkpoint-4")
    whole = tuned(masked=True)
    memtune.fit(whole, items(), config=TrainingConfig(**QUICK))
    assert equal(weights(go_on(folder)), weights(whole))


def test_a_state_never_changes_the_backbone() -> None:
    model = tuned()
    name, value = next(iter(model.backbone.state_dict().items()))
    before = value.clone()
    with pytest.warns(UserWarning, match="1 tensors of a backbone"):
        model.load_state_dict(model.state_dict() | {f"backbone.{name}": torch.zeros_like(value)})
    assert torch.equal(model.backbone.state_dict()[name], before)
