"""What happens in a run beside its steps: evaluations, callbacks, schedules, weights of classes, its folder."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from backbone_zoo import BY_NAME
from PIL import Image
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy
from transformers import ViTImageProcessorPil, get_scheduler

import memtune
from memtune import MemoryConfig, TrainingConfig
from memtune.callbacks import TrainingCallback
from memtune.cli.parser import main
from memtune.errors import ConfigError, MemtuneError
from memtune.preparation.config import SCHEDULES

VIT = BY_NAME["vit-head"]
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
LABELS = ["cat", "dog", "owl"]


def data(count: int = 24, seed: int = 0, weights: tuple[float, ...] = (1, 1, 1)) -> datasets.Dataset:
    random = np.random.default_rng(seed)
    labels = random.choice(3, count, p=np.array(weights) / sum(weights)).tolist()
    images = [Image.fromarray((random.integers(0, 200, (32, 32, 3)) + 25 * label).astype(np.uint8)) for label in labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def wrapped() -> memtune.TunedModel:
    torch.manual_seed(0)
    return memtune.wrap(VIT.build(), MemoryConfig(2), labels=LABELS, masked=True, processor=PROCESSOR)


def settings(**more: Any) -> TrainingConfig:
    given = {"disable_tqdm": True, "per_device_train_batch_size": 8, "num_train_epochs": 4, "logging_steps": 2}
    return TrainingConfig(**given | more)


class Recorder(TrainingCallback):
    """Writes down what it is told."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[tuple[str, dict[str, float]]] = []
        self.steps = 0
        self.stop_at = stop_at

    def on_step_end(self, model: memtune.TunedModel) -> None:
        self.steps += 1
        self.should_training_stop = self.steps == self.stop_at

    def on_log(self, model: memtune.TunedModel, entry: dict[str, float]) -> None:
        self.events.append(("log", entry))

    def on_evaluate(self, model: memtune.TunedModel, scores: dict[str, float]) -> None:
        assert not model.training
        self.events.append(("evaluate", scores))

    def on_epoch_end(self, model: memtune.TunedModel, entry: dict[str, float]) -> None:
        self.events.append(("epoch", entry))


def test_callbacks_hear_of_every_entry() -> None:
    recorder = Recorder()
    result = memtune.fit(wrapped(), data(), data(9, 1), settings(), callbacks=[recorder])
    names = [name for name, _ in recorder.events]
    end = ["evaluate", "epoch"]
    assert names == ["log", *end, "log", "log", *end, "log", *end, "log", "log", *end]
    assert [entry for name, entry in recorder.events if name == "log"] == result.log_history
    assert [entry for name, entry in recorder.events if name == "epoch"] == result.history
    scores = [entry for name, entry in recorder.events if name == "evaluate"]
    assert [each["accuracy"] for each in scores] == [entry["eval_accuracy"] for entry in result.history]


def test_a_callback_ends_the_run() -> None:
    recorder = Recorder(stop_at=5)
    model = wrapped()
    result = memtune.fit(model, data(), data(9, 1), settings(), callbacks=[recorder])
    assert result.steps == recorder.steps == 5
    assert len(result.history) == 2
    assert result.scores == pytest.approx(memtune.evaluate(model, data(9, 1)), abs=1e-6)


def test_evaluations_by_steps(tmp_path: Path) -> None:
    model = wrapped()
    config = settings(
        eval_strategy="steps",
        eval_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=0.05,
    )
    result = memtune.fit(model, data(), data(9, 1), config)
    evaluated = [entry for entry in result.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [5, 10, 12]  # the end as well
    assert [entry["epoch"] for entry in evaluated] == pytest.approx([5 / 3, 10 / 3, 4])
    assert not any("eval_loss" in entry for entry in result.history)
    assert result.scores["loss"] == min(entry["eval_loss"] for entry in evaluated)
    assert memtune.evaluate(model, data(9, 1))["loss"] == pytest.approx(result.scores["loss"], abs=1e-6)
    result.plot(tmp_path / "curves.png")
    without = settings(eval_strategy="no")
    assert memtune.fit(wrapped(), data(), data(9, 1), without).scores == {}
    with pytest.raises(ConfigError, match="leave eval_strategy='no' out"):
        memtune.fit(wrapped(), data(), data(9, 1), settings(eval_strategy="no", early_stopping_patience=1))


def test_early_stopping_counts_evaluations() -> None:
    config = settings(eval_strategy="steps", eval_steps=2, early_stopping_patience=2, learning_rate=0.0)
    assert memtune.fit(wrapped(), data(), data(9, 1), config).steps == 6  # the first is the best of equal ones


def test_a_run_goes_on_between_evaluations(tmp_path: Path) -> None:
    given = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 5,
        "output_dir": tmp_path,
    }
    given |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    whole, later = wrapped(), wrapped()
    first = memtune.fit(whole, data(), data(9, 1), settings(**given))
    second = memtune.fit(later, data(), data(9, 1), settings(**given), resume_from_checkpoint=tmp_path / "checkpoint-5")
    assert [entry.get("eval_loss") for entry in first.log_history] == [e.get("eval_loss") for e in second.log_history]
    for key, value in whole.task.tensors().items():
        assert torch.equal(value, later.task.tensors()[key])


def test_the_norm_of_the_gradients_and_the_loss_of_evaluations() -> None:
    norms: list[float] = []

    class Norms(TrainingCallback):
        def on_train_begin(self, model: memtune.TunedModel) -> None:
            self.images = PROCESSOR(images=data()["image"][:], return_tensors="pt").pixel_values
            self.labels = torch.tensor(data()["label"][:])
            model.train()
            loss = cross_entropy(model(self.images).logits, self.labels, label_smoothing=0.1)
            loss.backward()
            gradients = [each.grad for each in model.parameters() if each.grad is not None]
            norms.append(float(torch.stack([each.norm() for each in gradients]).norm()))
            model.zero_grad()
            norms.append(float(cross_entropy(model(self.images).logits.detach(), self.labels)))

    config = settings(per_device_train_batch_size=24, max_steps=1, logging_steps=1, max_grad_norm=1e-3)
    result = memtune.fit(wrapped(), data(), config=config, callbacks=[Norms()])
    assert result.log_history[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-3)
    assert result.history[0]["task_loss"] == pytest.approx(norms[1], abs=1e-5)
    assert result.history[0]["loss"] != pytest.approx(norms[1], abs=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedules_are_those_of_transformers(schedule: str) -> None:
    more: dict[str, Any] = {"warmup_stable_decay": {"num_decay_steps": 3}}.get(schedule, {})
    if "min_lr" in schedule:
        more = {"min_lr": 1e-4}
    config = settings(
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=more or None,
        warmup_steps=3,
        learning_rate=0.01,
        logging_steps=1,
    )
    result = memtune.fit(wrapped(), data(), config=config)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.01)
    theirs = get_scheduler(schedule, optimizer, 3, 12, scheduler_specific_kwargs=more)
    expected = []
    for _ in range(12):
        optimizer.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    assert [entry["learning_rate"] for entry in result.log_history] == pytest.approx(expected)


def test_settings_that_a_schedule_lacks() -> None:
    with pytest.raises(ConfigError, match="which 'cosine' does not take"):
        memtune.fit(wrapped(), data(), config=settings(lr_scheduler_kwargs={"speed": 3}))
    with pytest.raises(ConfigError, match="lr_scheduler_type: got 'reduce_lr_on_plateau'"):
        settings(lr_scheduler_type="reduce_lr_on_plateau")
    with pytest.raises(ConfigError, match="set dataloader_num_workers to 1 or more"):
        settings(dataloader_prefetch_factor=2)


def test_balanced_classes() -> None:
    rows = data(30, weights=(8, 1, 1))
    given: list[torch.Tensor] = []

    class Losses(TrainingCallback):
        def on_train_begin(self, model: memtune.TunedModel) -> None:
            weights = torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=rows["label"][:]))
            images = PROCESSOR(images=rows["image"][:], return_tensors="pt").pixel_values
            logits = model.eval()(images).logits
            model.train()
            given.append(cross_entropy(logits, torch.tensor(rows["label"][:]), weight=weights.float()).detach())

    config = settings(class_weights="balanced", per_device_train_batch_size=30, max_steps=1, label_smoothing_factor=0.0)
    result = memtune.fit(wrapped(), rows, config=config, callbacks=[Losses()])
    assert result.history[0]["loss"] == pytest.approx(float(given[0]), abs=1e-4)
    model = memtune.wrap(
        VIT.build(), MemoryConfig(2), labels=LABELS, processor=PROCESSOR, problem_type="multi_label_classification"
    )
    with pytest.raises(ConfigError, match="class_weights='balanced', balanced_sampling: not for multi_label"):
        memtune.fit(model, rows, config=config)


def test_loaders() -> None:
    config = settings(dataloader_drop_last=True, per_device_train_batch_size=10, num_train_epochs=1)
    assert memtune.fit(wrapped(), data(), config=config).steps == 2
    workers = settings(dataloader_num_workers=1, dataloader_prefetch_factor=3, num_train_epochs=2)
    one, other = wrapped(), wrapped()
    memtune.fit(one, data(), config=workers)
    memtune.fit(other, data(), config=settings(num_train_epochs=2))
    for key, value in one.task.tensors().items():
        assert torch.equal(value, other.task.tensors()[key])


def test_a_folder_that_is_read_without_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    VIT.build().save_pretrained(tmp_path / "backbone")
    PROCESSOR.save_pretrained(tmp_path / "backbone")
    for place, row in enumerate(data(12)):
        folder = tmp_path / "photos" / LABELS[row["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{place}.png")
    output, photos = tmp_path / "run", str(tmp_path / "photos")
    given = ["finetune", "--model_name_or_path", str(tmp_path / "backbone"), "--train_dir", photos]
    given += ["--validation_dir", photos, "--output_dir", str(output), "--num_train_epochs", "3", "--class_weights"]
    given += ["balanced", "--lr_scheduler_type", "cosine_with_restarts", "--lr_scheduler_kwargs", '{"num_cycles": 2}']
    assert main([*given, "--disable_tqdm", "--no-dataloader_pin_memory", "--eval_strategy", "epoch"]) == 0
    capsys.readouterr()
    with (output / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((output / "all_results.json").read_text())
    assert [float(row["eval_accuracy"]) for row in rows] == [entry["eval_accuracy"] for entry in summary["history"]]
    options = yaml.safe_load((output / "config.yaml").read_text())
    assert options["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert options["class_weights"] == "balanced" or options["class_weights"] == ["balanced"]
    assert options["num_train_epochs"] == 3
    assert options["dataloader_pin_memory"] is False
    text = (output / "summary.md").read_text()
    assert f"| accuracy | {summary['eval_accuracy']:.4f} |" in text
    assert "| 3 |" in text
    assert math.isfinite(summary["history"][-1]["task_loss"])


def test_a_batch_size_that_fits() -> None:
    sizes: list[int] = []

    def loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(labels))
        if len(labels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return cross_entropy(outputs.logits, labels)

    config = settings(auto_find_batch_size=True, per_device_train_batch_size=8, num_train_epochs=1)
    one, other = wrapped(), wrapped()
    result = memtune.fit(one, data(), config=config, compute_loss_func=loss)
    assert sizes[:3] == [8, 4, 2]
    assert result.steps == 3
    plain = settings(per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=1)
    memtune.fit(other, data(), config=plain, compute_loss_func=lambda o, labels: cross_entropy(o.logits, labels))
    for key, value in one.task.tensors().items():
        assert torch.equal(value, other.task.tensors()[key])

    def never(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(MemtuneError, match="not even one image at a time"):
        memtune.fit(wrapped(), data(), config=config, compute_loss_func=never)
    with pytest.raises(ConfigError, match="auto_find_batch_size: got it for a run that goes on"):
        memtune.fit(wrapped(), data(), config=config, resume_from_checkpoint=True)


def test_classes_are_drawn_equally_often() -> None:
    rows = data(60, weights=(8, 1, 1))
    drawn: list[int] = []

    def loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        drawn.extend(labels.tolist())
        return cross_entropy(outputs.logits, labels)

    config = settings(balanced_sampling=True, num_train_epochs=10, per_device_train_batch_size=20, learning_rate=0.0)
    memtune.fit(wrapped(), rows, config=config, compute_loss_func=loss)
    counts = [drawn.count(label) for label in range(3)]
    assert sum(counts) == 600
    assert all(abs(count - 200) < 60 for count in counts)
    assert drawn[:60] != drawn[60:120]
    number = memtune.wrap(VIT.build(), MemoryConfig(2), num_labels=1, processor=PROCESSOR, problem_type="regression")
    with pytest.raises(ConfigError, match="balanced_sampling: not for regression"):
        memtune.fit(number, rows, config=config)


def test_a_checkpoint_has_the_values_alone(tmp_path: Path) -> None:
    model = wrapped()
    memtune.fit(model, data(), config=settings(num_train_epochs=1, output_dir=tmp_path))
    (path,) = tmp_path.glob("checkpoint-*/model.safetensors")
    saved = load_file(path)
    assert saved.keys() == {f"task.{name}" for name in model.task.state_dict()}
    assert "adapter_config" in model.state_dict()  # as Trainer saves it
