"""transformers.Trainer takes a tuned model as it takes its own."""

import pytest
import torch
from safetensors.torch import load_file
from training_runs import equal, items, tuned, weights
from transformers import Trainer, TrainingArguments

from memtune.evaluation.metrics import compute_metrics


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
    assert set(keys) == {f"task.{name}" for name, _ in model.task.named_parameters()}


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
