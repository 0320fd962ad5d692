"""transformers.Trainer takes a tuned model as it takes its own."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import equal, items, tuned, weights
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTImageProcessorPil

import memtune
from memtune.errors import BackboneMismatchError, CheckpointError
from memtune.evaluation.metrics import compute_metrics
from memtune.storage import STATE_KEY


def trainer(model, folder, **settings):
    defaults = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(output_dir=str(folder), **defaults | settings)
    data = {"train_dataset": items(), "eval_dataset": items(16, seed=1)}
    return Trainer(model=model, args=arguments, compute_metrics=compute_metrics, **data)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.slow
def test_it_trains_and_its_checkpoints_hold_the_adapter_alone(tmp_path, masked):
    model = tuned(masked)
    run = trainer(model, tmp_path, num_train_epochs=8)
    run.train()
    assert run.evaluate()["eval_accuracy"] == 1.0
    keys = load_file(tmp_path / "checkpoint-4" / "model.safetensors").keys()
    assert set(keys) - {STATE_KEY} == {f"task.{name}" for name, _ in model.task.named_parameters()}


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = tuned()
    trainer(whole, tmp_path).train()
    resumed = tuned()
    with torch.no_grad():
        resumed.task.head.weight.zero_()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert equal(weights(whole), weights(resumed))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = tuned()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    run = trainer(model, tmp_path, learning_rate=0.3, **best)
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    step = min(losses, key=losses.get)
    saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    assert all(torch.equal(saved[f"task.{name}"], value) for name, value in model.task.named_parameters())


def test_activation_checkpointing_changes_nothing(tmp_path):
    one, other = tuned(), tuned()
    trainer(one, tmp_path / "one", num_train_epochs=1).train()
    run = trainer(other, tmp_path / "other", num_train_epochs=1)
    other.activation_checkpointing_enable()
    run.train()
    for key, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[key])


@pytest.mark.parametrize("masked", [False, True])
def test_what_trainer_saves_is_an_adapter(tmp_path, masked):
    model = tuned(masked, processor=ViTImageProcessorPil(size={"height": 32, "width": 32}))
    run = trainer(model, tmp_path / "run", num_train_epochs=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    images = torch.stack([each["pixel_values"] for each in items(4)])
    with torch.no_grad():
        expected = model(images).logits
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-4"):
        loaded = memtune.load(folder, backbone=model.backbone)
        assert (loaded.task.labels, loaded.task.masked) == (model.task.labels, masked)
        assert loaded.processor.size["height"] == 32
        with torch.no_grad():
            assert torch.equal(loaded(images).logits, expected)
    other = tuned().backbone
    with torch.no_grad():
        other.vit.layers[0].mlp.fc1.weight.mul_(1.5)
    with pytest.raises(BackboneMismatchError):
        memtune.load(tmp_path / "saved", backbone=other)


def test_another_models_state_is_no_adapter(tmp_path):
    model = tuned()
    trainer(model.backbone, tmp_path).save_model(str(tmp_path / "whole"))
    with pytest.raises(CheckpointError, match="no state of a model of memtune's"):
        memtune.load(tmp_path / "whole", backbone=model.backbone)


class Casts(TorchDispatchMode):
    """Counts how often each of some tensors is cast."""

    def __init__(self, tensors):
        super().__init__()
        self._names = {tensor.data_ptr(): name for name, tensor in tensors}
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self._names:
            self.counts[self._names[args[0].data_ptr()]] += 1
        return function(*args, **(kwargs or {}))


class Alive(TrainerCallback):
    """Notes after each step how many tensors there are."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, *args, **kwargs):
        gc.collect()
        self.counts.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))


def test_in_mixed_precision_the_backbone_is_cast_once_and_nothing_grows(tmp_path):
    model, alive = tuned(masked=True), Alive()
    run = trainer(model, tmp_path, max_steps=12, bf16=True, eval_strategy="no", save_strategy="no")
    run.add_callback(alive)
    with Casts(model.backbone.named_parameters()) as casts:
        run.train()
    assert casts.counts["vit.layers.0.mlp.fc1.weight"] == 1
    assert all(count == 1 for name, count in casts.counts.items() if ".layers." in name)
    assert max(alive.counts[6:]) <= max(alive.counts[2:6])
