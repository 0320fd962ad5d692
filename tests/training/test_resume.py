"""Runs that are interrupted and go on: what they end with, and what they lose."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import QUICK, Stop, StopAfter, equal, items, tuned, weights

import memtune
from memtune import LoraConfig, MemoryConfig, TrainingConfig
from memtune.errors import CheckpointError, ConfigError
from memtune.training.callbacks import TrainingCallback

STEPS = 8


def settings(folder, **more):
    """8 steps, with everything random and everything that has a state."""
    every = {"save_strategy": "steps", "save_steps": 1, "ema_decay": 0.8, "logging_steps": 3}
    return TrainingConfig(**QUICK | every | {"output_dir": folder} | more)


def with_dropout():
    torch.manual_seed(0)
    model = tuned()
    return memtune.wrap(model.detach(), [MemoryConfig(2), LoraConfig(r=2, lora_dropout=0.3)], num_labels=2)


class Tell(TrainingCallback):
    """Prints the step after each step."""

    def __init__(self):
        self._step = 0

    def on_step_end(self, model):
        self._step += 1
        print(self._step, flush=True)

    def state_dict(self):
        return {"step": self._step}

    def load_state_dict(self, state):
        self._step = state["step"]


def fit(folder, *, stop=None, resume=None, told=False, **more):
    """A run, whole or until it is stopped; gives the values it ends with, and the result."""
    model = with_dropout()
    callbacks = [Tell()] * told if stop is None else [StopAfter(stop)]
    config = settings(folder, **more)
    options = {"callbacks": callbacks, "resume_from_checkpoint": resume}
    if stop is not None:
        with pytest.raises(Stop):
            memtune.fit(model, items(), items(8, seed=1), config, **options)
        return None
    result = memtune.fit(model, items(), items(8, seed=1), config, **options)
    return weights(model), result


def without_times(result):
    timed = {"seconds", "images_per_second", "peak_memory_gb"}
    return [{name: value for name, value in entry.items() if name not in timed} for entry in result.history]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"save_steps": 3},
        {"save_strategy": "epoch"},
        {"gradient_accumulation_steps": 2, "num_train_epochs": 4},
        {"load_best_model_at_end": True, "ema_decay": None, "metric_for_best_model": "loss"},
        {"optim": "sgd", "learning_rate": 0.03, "lr_scheduler_type": "linear"},
    ],
)
@pytest.mark.slow
def test_a_run_stopped_at_any_step_ends_bit_for_bit_as_one_that_was_not(more, tmp_path):
    expected, whole = fit(tmp_path / "whole", **more)
    assert whole.steps == STEPS
    for stop in range(1, STEPS):
        folder = tmp_path / str(stop)
        fit(folder, stop=stop, **more)
        values, result = fit(folder, resume=True, **more)
        assert equal(values, expected)
        assert without_times(result) == without_times(whole)
        assert result.log_history == whole.log_history
        shutil.rmtree(folder)


def test_a_given_checkpoint_and_one_that_was_the_last(tmp_path):
    expected, _ = fit(tmp_path)
    values, result = fit(tmp_path, resume=tmp_path / "checkpoint-2")
    assert equal(values, expected)
    values, again = fit(tmp_path, resume=True)  # all steps are done
    assert equal(values, expected)
    assert again.history == result.history


def test_the_trunk_cache_and_masked_mode(tmp_path):
    def run(folder, stop=None, resume=None):
        config = settings(folder, trunk_cache=tmp_path / "cache", trunk_cache_dtype="float32")
        model = tuned(masked=True)
        try:
            memtune.fit(
                model,
                items(),
                config=config,
                callbacks=[StopAfter(stop)] if stop else [],
                resume_from_checkpoint=resume,
            )
        except Stop:
            return None
        return weights(model)

    expected = run(tmp_path / "whole")
    run(tmp_path / "stopped", stop=5)
    assert equal(run(tmp_path / "stopped", resume=True), expected)


def test_the_limit_of_checkpoints(tmp_path):
    fit(tmp_path, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-7", "checkpoint-8"]
    fit(tmp_path / "none", save_strategy="no")
    assert not (tmp_path / "none").exists()


def test_a_folder_without_checkpoints_starts_at_the_beginning(tmp_path, caplog):
    expected, _ = fit(tmp_path / "whole")
    with caplog.at_level("WARNING", logger="memtune"):
        values, _ = fit(tmp_path / "new", resume=True)
    assert equal(values, expected)
    assert "no checkpoint to go on from" in caplog.text


def test_another_run_is_refused(tmp_path):
    fit(tmp_path)
    for more, message in [
        ({"learning_rate": 0.5}, "learning_rate: got 0.5, the folder has 0.005"),
        ({"num_train_epochs": 1}, "num_train_epochs: got 1"),
        ({"max_steps": 4}, "max_steps: got 4"),
        ({"num_train_epochs": 5, "learning_rate": 0.5}, "learning_rate"),
        ({"ema_decay": None}, "ema_decay"),
    ]:
        with pytest.raises(ConfigError, match=message):
            fit(tmp_path, resume=True, **more)
    with pytest.raises(ConfigError, match="methods: got"):
        memtune.fit(tuned(), items(), items(8), settings(tmp_path), resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="train_images: got 24, the folder has 32"):
        memtune.fit(with_dropout(), items(24), items(8), settings(tmp_path), resume_from_checkpoint=True)
    other = with_dropout()
    with torch.no_grad():
        for parameter in other.backbone.parameters():
            parameter.add_(0.1)
    before = weights(other)
    with pytest.raises(ConfigError, match="backbone: got"):
        memtune.fit(other, items(), items(8), settings(tmp_path), resume_from_checkpoint=True)
    assert equal(weights(other), before)
    with pytest.raises(ConfigError, match="set output_dir"):
        memtune.fit(with_dropout(), items(), resume_from_checkpoint=True)


def test_a_run_that_is_older_than_a_setting_goes_on_with_its_default(tmp_path):
    expected, _ = fit(tmp_path / "a")
    fit(tmp_path / "b", stop=3)
    for described in (tmp_path / "b").glob("*/run.json"):
        description = json.loads(described.read_text())
        del description["settings"]["randaugment_magnitude"]
        described.write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="randaugment_magnitude: got 3, the folder has 9"):
        fit(tmp_path / "b", resume=True, randaugment_magnitude=3)
    values, _ = fit(tmp_path / "b", resume=True)
    assert equal(values, expected)


@pytest.mark.parametrize("stop", [None, 3])
def test_a_run_that_becomes_longer(stop, tmp_path):
    """The steps after those that were done are those of a run with the longer schedule from there on."""
    fit(tmp_path, stop=stop, lr_scheduler_type="constant", warmup_ratio=0)
    values, result = fit(tmp_path, resume=True, num_train_epochs=4, lr_scheduler_type="constant", warmup_ratio=0)
    expected, whole = fit(tmp_path / "whole", num_train_epochs=4, lr_scheduler_type="constant", warmup_ratio=0)
    assert result.steps == whole.steps == 2 * STEPS
    assert equal(values, expected)  # as the schedule is the same however long a run is
    assert without_times(result) == without_times(whole)


def test_the_schedule_of_a_run_that_becomes_longer_is_that_of_the_longer_one(tmp_path):
    fit(tmp_path)
    _, result = fit(tmp_path, resume=True, num_train_epochs=4)
    _, whole = fit(tmp_path / "whole", num_train_epochs=4)
    rates = [[entry["learning_rate"] for entry in each.history] for each in (result, whole)]
    assert rates[0][2:] == rates[1][2:]
    assert rates[0][1] == 0 < rates[0][2]


def test_settings_without_effect_may_change(tmp_path):
    expected, _ = fit(tmp_path / "a")
    fit(tmp_path / "b", stop=3)
    moved = (tmp_path / "b").rename(tmp_path / "c")
    values, _ = fit(moved, resume=True, save_total_limit=1, logging_steps=1, dataloader_num_workers=0)
    assert equal(values, expected)


@pytest.mark.parametrize("name", ["run.json", "run.pt", "optimizer.bin", "model.safetensors", "random_states_0.pkl"])
@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(name, tmp_path):
    fit(tmp_path, stop=3)
    path = tmp_path / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        fit(tmp_path, resume=True)
    values, _ = fit(tmp_path, resume=tmp_path / "checkpoint-1")
    assert equal(values, fit(tmp_path / "whole")[0])


def test_a_folder_that_is_none_and_a_newer_format(tmp_path):
    with pytest.raises(CheckpointError, match="expected a folder checkpoint-<step>"):
        fit(tmp_path, resume=tmp_path / "checkpoint-3")
    fit(tmp_path, stop=2)
    described = tmp_path / "checkpoint-1" / "run.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="format version 2"):
        fit(tmp_path, resume=True)


KILLED = """
import sys
sys.path[:] = {tests!r}
import test_resume
test_resume.fit({folder!r}, resume=True, told=True, **{more!r})
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_at_random_points_ends_bit_for_bit_as_one_that_was_not(tmp_path):
    """SIGKILL falls anywhere: in a step, in the writing of a checkpoint, in its renaming, or in the deletion of one."""
    more = {"num_train_epochs": 10, "save_steps": 2, "save_total_limit": 2}
    expected, whole = fit(tmp_path / "whole", **more)
    folder, chance = tmp_path / "killed", random.Random(0)
    program = KILLED.format(tests=[*sys.path, str(Path(__file__).parent)], folder=str(folder), more=more)
    kills = finished = 0
    while kills < 4:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        said = process.stdout.readline()  # the first step of this part of the run
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        said = [*(said + process.communicate()[0]).split()]
        finished += "done" in said
        kills += process.returncode == -signal.SIGKILL
        saved = [_step_of(path) for path in folder.glob("checkpoint-*")]
        told = [int(word) for word in said if word.isdecimal()]
        assert max(saved, default=0) >= max(told, default=0) - 2, "more than save_steps steps were lost"
        if finished:
            shutil.rmtree(folder)  # and once more from the beginning
            finished = 0
    values, result = fit(folder, resume=True, **more)
    assert equal(values, expected)
    assert without_times(result) == without_times(whole)


def _step_of(checkpoint):
    step = json.loads((checkpoint / "run.json").read_text())["step"]
    assert checkpoint.name == f"checkpoint-{step}"
    return step
