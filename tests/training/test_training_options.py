"""Averages, early stopping, learning rates by layer, class weights, trackers, callbacks, and the curves of a run."""

import argparse
import sys
import types
from dataclasses import fields

import pytest
import torch
from accelerate.tracking import GeneralTracker, on_main_process
from torch.nn.functional import cross_entropy
from training_runs import QUICK, equal, items, train, tuned, weights

import memtune
from memtune import TrainingConfig
from memtune.errors import ConfigError, MemtuneError
from memtune.preparation.arguments import add_training_arguments, read_training_arguments
from memtune.training.callbacks import TrainingCallback
from memtune.training.optimization import make_optimizer
from memtune.training.result import TrainingResult


class Watch(TrainingCallback):
    """Keeps what it sees."""

    def __init__(self):
        self.events = []
        self.values = []

    def on_train_begin(self, model):
        self.events.append("train begin")

    def on_step_begin(self, model):
        self.events.append("step begin")

    def on_step_end(self, model):
        self.events.append("step end")
        self.values.append(weights(model))

    def on_train_end(self, model):
        self.events.append("train end")


def fit(model, *, evaluation=None, callbacks=(), **settings):
    return memtune.fit(model, items(), evaluation, TrainingConfig(**QUICK | settings), callbacks=callbacks)


def test_callbacks_are_called_around_each_step_of_the_optimizer():
    watch = Watch()
    fit(tuned(), callbacks=[watch], gradient_accumulation_steps=2)
    assert watch.events == ["train begin", *["step begin", "step end"] * 4, "train end"]


def test_the_moving_average_is_what_is_evaluated_and_kept():
    model, watch = tuned(), Watch()
    result = fit(model, evaluation=items(16, seed=1), callbacks=[watch], ema_decay=0.7)
    expected = watch.values[0]
    for values in watch.values[1:]:
        expected = {key: 0.7 * expected[key] + 0.3 * values[key] for key in values}
    for key, value in weights(model).items():
        torch.testing.assert_close(value, expected[key])
    assert not equal(weights(model), watch.values[-1])
    scores = memtune.evaluate(model, items(16, seed=1))
    assert scores["loss"] == pytest.approx(result.history[-1]["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_best_epoch_is_kept(metric):
    model = tuned()
    settings = {"num_train_epochs": 6, "learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0}
    result = fit(
        model, evaluation=items(16, seed=1), load_best_model_at_end=True, metric_for_best_model=metric, **settings
    )
    measured = [entry[f"eval_{metric}"] for entry in result.history]
    best = max(measured) if metric == "accuracy" else min(measured)
    assert memtune.evaluate(model, items(16, seed=1))[metric] == pytest.approx(best, abs=1e-6)


def test_it_stops_when_evaluations_get_no_better():
    result = fit(tuned(), evaluation=items(16, seed=1), early_stopping_patience=2, learning_rate=0, num_train_epochs=9)
    assert len(result.history) == 3  # the first, and two that are no better
    assert result.steps == 12


def test_learning_rates_by_layer():
    model = memtune.wrap(tuned().detach(), [memtune.MemoryConfig(2), memtune.LoraConfig(r=2)], num_labels=2)
    config = TrainingConfig(learning_rate=0.1, layerwise_lr_decay=0.5).for_mode(masked=False)
    optimizer = make_optimizer(model, config)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            distance = {"blocks.0": 1, "blocks.1": 0, "class_token": 2}
            blocks = [number for part, number in distance.items() if part in name]
            assert rates[id(parameter)] == pytest.approx(0.1 * 0.5 ** (blocks[0] if blocks else 0)), name
    assert len({*rates.values()}) == 3


def test_class_weights_are_those_of_cross_entropy():
    model, data = tuned(), items(8)
    with torch.no_grad():
        logits = model(torch.stack([item["pixel_values"] for item in data])).logits
    labels = torch.tensor([item["labels"] for item in data])
    expected = cross_entropy(logits, labels, weight=torch.tensor([1.0, 5.0])).item()
    result = memtune.fit(model, data, config=TrainingConfig(**QUICK | {"max_steps": 1, "class_weights": [1, 5]}))
    assert result.history[0]["loss"] == pytest.approx(expected, abs=1e-5)


class WithMean:
    """In place of torchvision's classes: each image is mixed with the mean of all, whatever their order."""

    def __init__(self, num_classes, alpha):
        self._classes = num_classes
        assert alpha == 0.2

    def __call__(self, images, labels):
        shares = torch.nn.functional.one_hot(labels, self._classes).float()
        return (images + images.mean(0)) / 2, (shares + shares.mean(0)) / 2


def test_mixed_images_have_mixed_labels(monkeypatch):
    v2 = types.SimpleNamespace(MixUp=WithMean)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", types.SimpleNamespace(v2=v2))
    model, data = tuned(), items(8)
    images = torch.stack([item["pixel_values"] for item in data])
    labels = torch.tensor([item["labels"] for item in data])
    mixed, shares = WithMean(2, 0.2)(images, labels)
    with torch.no_grad():
        expected = cross_entropy(model(mixed).logits, shares).item()
    settings = TrainingConfig(**QUICK | {"max_steps": 1, "mixup_alpha": 0.2})
    assert memtune.fit(model, data, config=settings).history[0]["loss"] == pytest.approx(expected, abs=1e-5)


class Kept(GeneralTracker):
    """One of Accelerate's trackers that keeps what it is told."""

    name = "kept"
    requires_logging_directory = False
    tracker = None

    @on_main_process
    def __init__(self):
        super().__init__()
        self.config, self.entries, self.finished = {}, [], False

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **options):
        self.entries.append((step, values))

    def finish(self):
        self.finished = True


def test_trackers_hear_of_settings_steps_and_epochs():
    tracker = Kept()
    result = fit(tuned(), evaluation=items(8), report_to=[tracker], logging_steps=3)
    assert tracker.config["num_train_epochs"] == 2
    assert [step for step, _ in tracker.entries] == [3, 4, 6, 8]
    assert {"loss", "learning_rate", "epoch"} <= tracker.entries[0][1].keys()
    assert tracker.entries[1][1] == result.history[0]
    assert tracker.finished


def test_tensorboard_shows_the_curves(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = fit(tuned(), evaluation=items(8), report_to="tensorboard", logging_steps=1, output_dir=tmp_path)
    events = reader.EventAccumulator(str(tmp_path / "memtune"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(entry["step"], entry["loss"]) for entry in result.log_history]
    assert [step for step, _ in losses if step % 4] == [step for step, _ in expected if step % 4]
    for place in expected:
        assert any(place == pytest.approx(loss, abs=1e-6) for loss in losses)
    found = [event.value for event in events.Scalars("eval_accuracy")]
    assert found == pytest.approx([entry["eval_accuracy"] for entry in result.history])


def test_the_log_has_the_mean_losses():
    result = fit(tuned(), logging_steps=1)
    assert [entry["step"] for entry in result.log_history] == list(range(1, 9))
    for epoch, entry in enumerate(result.history):
        steps = result.log_history[4 * epoch : 4 * epoch + 4]
        assert sum(each["loss"] for each in steps) / 4 == pytest.approx(entry["loss"], abs=1e-5)
    assert all(entry["images_per_second"] > 0 and entry["peak_memory_gb"] > 0 for entry in result.history)


@pytest.mark.parametrize("evaluated", [False, True])
def test_learning_curves(evaluated, tmp_path):
    fit(tuned(), evaluation=items(8) if evaluated else None).plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    with pytest.raises(MemtuneError, match="no epoch of the run has ended"):
        TrainingResult().plot(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_best_model_at_end": True}, "pass eval_dataset"),
        ({"early_stopping_patience": 1}, "pass eval_dataset"),
        ({"class_weights": [1, 2, 3]}, "got 3 weights, expected one for each of 2"),
        ({"report_to": "paper"}, "report_to: got 'paper'"),
    ],
)
def test_settings_that_need_something_else(settings, message):
    with pytest.raises(ConfigError, match=message):
        train(tuned(), **settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layerwise_lr_decay": 0},
        {"class_weights": "even"},
        {"class_weights": [1, -1]},
        {"ema_decay": 1},
        {"cutmix_alpha": -1},
        {"randaugment_ops": 1.5},
        {"randaugment_ops": True},
        {"randaugment_ops": None},
        {"randaugment_magnitude": 31},
        {"save_strategy": "minutes"},
        {"save_steps": 0},
        {"logging_steps": None},
        {"output_dir": 3},
        {"load_best_model_at_end": 1},
        {"metric_for_best_model": 1},
        {"early_stopping_patience": 0},
    ],
)
def test_a_wrong_setting_is_named(wrong):
    name = next(iter(wrong))
    with pytest.raises(ConfigError, match=f"{name}: got .*, expected"):
        TrainingConfig(**wrong)


def test_the_precision_is_the_launchers_where_none_is_given(monkeypatch):
    assert TrainingConfig().mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert TrainingConfig().mixed_precision == "bf16"
    assert TrainingConfig(mixed_precision="no").mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="mixed_precision: got 'fp8', expected one of"):
        TrainingConfig()


def test_every_setting_is_an_option_of_the_command_line():
    parser = argparse.ArgumentParser()
    add_training_arguments(parser, save_total_limit=2)
    assert read_training_arguments(parser.parse_args([])) == TrainingConfig(save_total_limit=2)
    given = ["--learning_rate", "0.1", "--class_weights", "1", "2.5", "--load_best_model_at_end", "--max_steps", "7"]
    config = read_training_arguments(parser.parse_args([*given, "--optim", "sgd", "--output_dir", "run"]), seed=3)
    assert (config.learning_rate, config.class_weights, config.max_steps) == (0.1, [1.0, 2.5], 7)
    assert (config.load_best_model_at_end, config.optim, str(config.output_dir), config.seed) == (True, "sgd", "run", 3)
    text = " ".join(parser.format_help().split())
    for each in fields(TrainingConfig):
        assert f"--{each.name}" in text
    assert "the oldest go; None for all (2)" in text
