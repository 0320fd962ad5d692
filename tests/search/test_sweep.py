import csv
import functools
import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import optuna
import pytest
import torch
from filelock import FileLock
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BruteForceSampler, GridSampler, TPESampler
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune import TrainingConfig
from memtune.data import as_items
from memtune.data.splitting import digest, held_out
from memtune.errors import BackboneMismatchError, CheckpointError, ConfigError, InputError, MemtuneError
from memtune.search.result import FinalRun, SweepResult, Trial

search = importlib.import_module("memtune.search.sweeping")  # the name in the package is the function

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
RATES = FloatDistribution(1e-3, 1.0, log=True)
SPACE = {"learning_rate": RATES, "memory.tokens": (1, 4), "optim": ["adamw", "sgd"]}
QUICK = TrainingConfig(max_steps=10, warmup_ratio=0, per_device_train_batch_size=8, disable_tqdm=True, seed=5)
EARLY = functools.partial(TPESampler, n_startup_trials=1)
"""A sampler that learns from the second trial on."""


def backbone(seed=0):
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**SHAPE, image_size=16, patch_size=8))


def items(count=40, seed=0):
    """Bright and dark images: a class each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator) + 3 * (index % 2) - 1.5, "labels": index % 2}
        for index in range(count)
    ]


def sweep(folder, model=None, **changes):
    options = {"training": QUICK, "n_trials": 3, "seeds": (0, 1), "output_dir": folder}
    given = {"config": memtune.MemoryConfig(2), "space": SPACE, "train": items(), "eval": items(10, 1)}
    given |= {name: changes.pop(name) for name in list(changes) if name in given}
    return memtune.sweep(model or backbone(), *given.values(), **options | changes)


class Stop(Exception):
    """Raised in the place of a kill."""


def stop_at(monkeypatch, number, error=Stop):
    """Let the run of this number, counted from 0, raise an error when it begins to train."""
    calls, original = [], search.fit

    def fit(*args, **kwargs):
        calls.append(args)
        if len(calls) == number + 1:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(search, "fit", fit)
    return calls


@pytest.mark.slow
def test_the_best_setting_is_chosen_by_held_out_images_and_measured_on_the_test_images(tmp_path):
    model = backbone()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train, test = items(), items(10, 1)
    result = sweep(tmp_path, model, train=train, eval=test)
    held = set(held_out([item["labels"] for item in train], 0.2, QUICK.seed))
    assert len(held) == 8
    part = [[item for place, item in enumerate(train) if (place in held) == side] for side in (False, True)]

    def by_hand(values, seed, images, measured):
        torch.manual_seed(seed)
        own = memtune.wrap(model, memtune.MemoryConfig(values["memory.tokens"]), num_labels=2)
        config = TrainingConfig(
            **vars(QUICK) | {"seed": seed, "optim": values["optim"], "learning_rate": values["learning_rate"]}
        )
        memtune.fit(own, images, config=config)
        scores = memtune.evaluate(own, measured, config)
        own.detach()
        return scores["accuracy"], scores["loss"]

    assert [each.number for each in result.trials] == [0, 1, 2]
    assert len({str(each.values) for each in result.trials}) == 3
    assert len({each.accuracy for each in result.trials}) > 1
    for each in result.trials:
        assert 1e-3 <= each.values["learning_rate"] <= 1.0
        assert type(each.values["memory.tokens"]) is int
        assert (each.accuracy, each.loss) == by_hand(each.values, QUICK.seed, *part)
    assert result.best is min(result.trials, key=lambda each: (-each.accuracy, each.loss))
    assert [run.seed for run in result.finals] == [0, 1]
    for run in result.finals:
        assert (run.accuracy, run.loss) == by_hand(result.best.values, run.seed, train, test)
    assert result.test_accuracy == statistics.fmean(result.test_scores)
    assert result.test_deviation == statistics.stdev(result.test_scores)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    loaded = memtune.load(tmp_path / "seed-1", model)
    assert loaded.task.configs == [memtune.MemoryConfig(result.best.values["memory.tokens"])]
    assert memtune.evaluate(loaded, test)["accuracy"] == result.finals[1].accuracy


def test_the_folder_has_a_table_a_summary_and_a_picture(tmp_path):
    result = sweep(tmp_path)
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["learning_rate"]) for row in rows] == [each.values["learning_rate"] for each in result.trials]
    assert [float(row["accuracy"]) for row in rows] == [each.accuracy for each in result.trials]
    summary = json.loads((tmp_path / "sweep.json").read_text())
    assert summary["result"]["best_values"] == result.best.values
    assert summary["result"]["test_score"] == result.test_score
    assert summary["result"]["test_runs"] == 2
    assert summary["settings"]["space"].keys() == SPACE.keys()
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size == (1200, 350)
        assert len(picture.convert("RGB").getcolors(100_000)) > 20
    text = str(result).splitlines()
    assert text[0].split() == ["trial", *SPACE, "accuracy", "loss"]
    assert text[1].split()[0] == str(result.best.number)
    assert text[4].startswith(f"best: trial {result.best.number} of 3: learning_rate=")
    assert re.fullmatch(r"test: [\d.]+ ± [\d.]+ % \(mean ± standard deviation, n = 2\)", text[5])
    study = optuna.load_study(
        study_name="memtune",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log"))
        ),
    )
    assert [trial.value for trial in study.trials] == [each.accuracy for each in result.trials]


@pytest.mark.parametrize("number", [0, 2, 4, 5])
@pytest.mark.slow
def test_a_search_goes_on_where_it_was_stopped(tmp_path, monkeypatch, number):
    whole = sweep(tmp_path / "whole", n_trials=4, sampler=EARLY)
    with monkeypatch.context() as patch:
        stop_at(patch, number)
        with pytest.raises(Stop):
            sweep(tmp_path / "stopped", n_trials=4, sampler=EARLY)
    calls = stop_at(monkeypatch, 99)
    assert sweep(tmp_path / "stopped", n_trials=4, sampler=EARLY) == whole
    assert len(calls) == 6 - number  # nothing that had been finished
    calls.clear()
    assert sweep(tmp_path / "stopped", n_trials=4, sampler=EARLY) == whole
    assert not calls


def test_a_stopped_trial_keeps_its_values_whatever_the_sampler_proposes_now(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Stop):
            sweep(tmp_path / "stopped", sampler=TPESampler(seed=1))
    begun = (tmp_path / "stopped" / "journal.log").read_text()
    result = sweep(tmp_path / "stopped", sampler=TPESampler(seed=2))
    rate = result.trials[1].values["learning_rate"]
    assert RATES.to_internal_repr(rate) in [json.loads(line).get("param_value_internal") for line in begun.splitlines()]
    assert len(result.trials) == 3


@pytest.mark.slow
def test_killed_in_a_trial_it_goes_on(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys, os\nsys.path[:] = {[*sys.path, str(Path(__file__).parent)]!r}\nimport test_sweep as t\n"
        "calls, original = [], t.search.fit\n"
        "def fit(*args, **kwargs):\n"
        "    calls.append(0)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), 9)\n"
        "    return original(*args, **kwargs)\n"
        f"t.search.fit = fit\nt.torch.set_num_threads({torch.get_num_threads()})\nt.sweep({str(tmp_path / 'run')!r})\n"
    )
    killed = subprocess.run(
        [sys.executable, str(script)], env=os.environ.copy(), capture_output=True, text=True, check=False, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    with (tmp_path / "run" / "journal.log").open("ab") as file:
        file.write(b'{"op_code": 4, "tri')  # what a kill in the middle of writing leaves
    assert sweep(tmp_path / "run") == sweep(tmp_path / "whole")


@pytest.mark.slow
def test_more_trials_and_seeds_are_added_to_a_search(tmp_path, monkeypatch):
    first = sweep(tmp_path / "grown", n_trials=2, seeds=(0,))
    calls = stop_at(monkeypatch, 99)
    grown = sweep(tmp_path / "grown", n_trials=4, seeds=(0, 1))
    assert grown.trials[:2] == first.trials
    kept = grown.best.number < 2  # then the final run of seed 0 is still that of the best
    assert len(calls) == 2 + (1 if kept else 2)
    assert grown == sweep(tmp_path / "whole", n_trials=4, seeds=(0, 1))
    assert first.test_deviation is None
    assert "n = 1)" in str(first)


@pytest.mark.filterwarnings("ignore:BruteForceSampler is experimental")
def test_equal_trials_are_trained_once_and_finite_samplers_end_the_search(tmp_path, monkeypatch):
    calls = stop_at(monkeypatch, 99)
    space = {"memory.tokens": [1, 2]}
    result = sweep(tmp_path / "tpe", space=space, n_trials=6, seeds=())
    assert len(calls) == len({each.values["memory.tokens"] for each in result.trials}) <= 2
    for each in result.trials:
        if each.same_as is not None:
            first = result.trials[each.same_as]
            assert first.same_as is None
            assert (each.values, each.accuracy, each.loss) == (first.values, first.accuracy, first.loss)
    for name, sampler in (("brute", BruteForceSampler), ("grid", GridSampler(space, seed=0))):
        for _ in range(2):
            result = sweep(tmp_path / name, space=space, n_trials=6, seeds=(), sampler=sampler)
            assert sorted(each.values["memory.tokens"] for each in result.trials) == [1, 2]
    assert not result.finals
    assert result.test_accuracy is None


def test_choices_that_are_no_plain_values(tmp_path):
    space = {"memory.blocks": [None, [0], [-1]], "weight_decay": (0, 1), "memory.tokens": IntDistribution(1, 2)}
    result = sweep(tmp_path, space=space, n_trials=4, seeds=(0,))
    assert all(each.values["memory.blocks"] in space["memory.blocks"] for each in result.trials)
    assert any(0 < each.values["weight_decay"] < 1 for each in result.trials)
    assert result.kinds == {"memory.blocks": "choices", "weight_decay": "linear", "memory.tokens": "linear"}
    assert result == sweep(tmp_path, space=space, n_trials=4, seeds=(0,))
    blocks = memtune.load(tmp_path / "seed-0", backbone()).task.configs[0].blocks
    assert blocks == (tuple(value) if (value := result.best.values["memory.blocks"]) else None)


def test_several_methods(tmp_path):
    configs = [memtune.MemoryConfig(1), memtune.LoraConfig(r=1)]
    result = sweep(tmp_path, config=configs, space={"lora.r": [1, 2], "memory.tokens": [2, 3]}, n_trials=1, seeds=(0,))
    memory, lora = memtune.load(tmp_path / "seed-0", backbone()).task.configs
    assert (lora.r, memory.tokens) == tuple(result.best.values.values())


def test_with_a_trunk_cache_the_backbone_runs_once_for_each_image(tmp_path, monkeypatch):
    images, original = [], memtune.TunedModel.trunk_pass

    def trunk_pass(model, pixel_values, **options):
        images.append(len(pixel_values))
        return original(model, pixel_values, **options)

    training = TrainingConfig(**vars(QUICK) | {"trunk_cache": tmp_path / "cache", "trunk_cache_dtype": "float32"})
    plain = sweep(tmp_path / "plain", masked=True)
    monkeypatch.setattr(memtune.TunedModel, "trunk_pass", trunk_pass)
    cached = sweep(tmp_path / "run", masked=True, training=training)
    # of 40 + 10 images, and at each filling one more that tells how large an entry is
    assert 50 <= sum(images) <= 53
    assert [each.values for each in cached.trials] == [each.values for each in plain.trials]
    for one, other in zip([*cached.trials, *cached.finals], [*plain.trials, *plain.finals], strict=True):
        assert one.accuracy == other.accuracy
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


def images(labels, names):
    pictures = [Image.fromarray(np.full((20, 20, 3), 60 + 90 * label, dtype=np.uint8)) for label in labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": pictures, "label": list(labels)}, features=features)


def test_images_go_through_the_processor_and_name_the_classes(tmp_path):
    data = {"train": images([0, 1] * 10, ["dark", "light"]), "eval": None}
    options = {"processor": ViTImageProcessorPil(size={"height": 16, "width": 16}), "n_trials": 2, "seeds": (0,)}
    result = sweep(tmp_path, **data, **options)
    assert [run.accuracy for run in result.finals] == [None]
    assert memtune.load(tmp_path / "seed-0", backbone()).task.labels == ["dark", "light"]
    other = images([0, 1] * 9 + [1, 1], ["dark", "light"])
    with pytest.raises(ConfigError, match="train_data: got"):
        sweep(tmp_path, **data | {"train": other}, **options)
    with pytest.raises(InputError, match="no image processor"):
        sweep(tmp_path / "other", **data)


def test_held_out_images_have_each_class_in_its_share():
    labels = [0] * 50 + [1] * 30 + [2] * 19 + [3]
    places = held_out(labels, 0.2, 0)
    counts = [sum(labels[place] == label for place in places) for label in range(4)]
    assert sum(counts) == 20
    assert counts in ([10, 6, 4, 0],)
    assert places == sorted(set(places)) == held_out(labels, 0.2, 0) != held_out(labels, 0.2, 1)
    assert held_out(labels, [99, 3], 0) == [3, 99]
    assert held_out(labels, range(90, 100), 0) == list(range(90, 100))


def test_a_digest_tells_data_apart_unless_they_change():
    def of(data):
        return digest(as_items(data, None, None, "raise"))

    assert of(items()) == of(items()) != of(items(seed=1))
    assert of(items(3)) != of(items(2))

    class Noisy(list):
        def __getitem__(self, index):
            return {"pixel_values": torch.randn(3, 4, 4), "labels": 0}

    assert of(Noisy(items())) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "expected a distribution for each of one or more settings"),
        ({"space": {"learning_rat": RATES}}, "unknown setting 'learning_rat', expected some of .*'memory.tokens'"),
        ({"space": {"seed": [1, 2]}}, "unknown setting 'seed'"),
        ({"space": {"lora.r": [1, 2]}}, r"unknown setting 'lora.r'"),
        ({"space": {"memory.method": ["lora"]}}, "unknown setting 'memory.method'"),
        ({"space": {3: [1]}}, "unknown setting 3"),
        ({"space": {"learning_rate": 0.1}}, "'learning_rate': got 0.1: expected a distribution of Optuna"),
        ({"space": {"learning_rate": (0.1, 0.01)}}, r"'learning_rate': got \(0.1, 0.01\): .*low"),
        ({"space": {"learning_rate": []}}, "'learning_rate': got"),
        ({"space": {"memory.tokens": [1, 1]}}, "a choice stands there twice"),
        ({"space": {"memory.tokens": (1.0, 2.0)}}, "'memory.tokens': .* type int; give whole numbers"),
        ({"space": {"memory.tokens": FloatDistribution(1, 2)}}, "'memory.tokens': .* take IntDistribution"),
        ({"space": {"memory.tokens": (-1, 2)}}, "'memory.tokens' would take the value -1: tokens: got -1"),
        ({"space": {"warmup_ratio": (0, 1)}}, "'warmup_ratio' would take the value 1.0"),
        ({"space": {"optim": CategoricalDistribution(["adamw", "adam"])}}, "'optim' would take the value 'adam'"),
        ({"space": {"memory.blocks": [[0], [7]]}}, r"space: with .*\[7\].*: blocks: got \[7\]"),
        ({"validation": 0.0}, "validation: got 0.0, expected a share above 0 and below 1"),
        ({"validation": 1.0}, "validation: got 1.0"),
        ({"validation": 1}, "validation: got 1,"),
        ({"validation": "half"}, "validation: got 'half'"),
        ({"validation": 0.01}, "which of 40 images is 0"),
        ({"validation": [0, 40]}, "different ones from 0 to 39"),
        ({"validation": [0, 0]}, "different ones from 0 to 39"),
        ({"validation": range(40)}, "and not all"),
        ({"n_trials": 0}, "n_trials: got 0"),
        ({"seeds": (0, 0)}, r"seeds: got \(0, 0\)"),
        ({"seeds": 3}, "seeds: got 3"),
        ({"labels": ["a", "a"]}, "stand there twice"),
        ({"training": TrainingConfig(output_dir="run")}, "training: got output_dir='run'"),
        ({"training": TrainingConfig(load_best_model_at_end=True)}, "training: got load_best_model_at_end=True"),
        ({"training": TrainingConfig(class_weights=[1, 2, 3])}, "got 3 class_weights, expected one for each of 2"),
        ({"training": TrainingConfig(trunk_cache="cache")}, "trunk_cache: got an unmasked model"),
        ({"training": TrainingConfig(trunk_cache_versions=4)}, "trunk_cache_versions: got 4, but only"),
        (
            {"training": TrainingConfig(trunk_cache="cache", mixup_alpha=0.2), "masked": True},
            "a trunk cache has no images to mix",
        ),
        ({"space": {"randaugment_magnitude": [9, 31]}}, "'randaugment_magnitude' would take the value 31"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(tmp_path, monkeypatch, changes, message):
    calls, model = stop_at(monkeypatch, 0), backbone()
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path / "run", model, **changes)
    assert not calls
    assert not (tmp_path / "run").exists()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_missing_optuna_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MemtuneError, match=r"needs Optuna, which is not installed: pip install optuna"):
        sweep(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"space": {"learning_rate": RATES}}, ConfigError, "space: got"),
        ({"config": memtune.MemoryConfig(3)}, ConfigError, "methods: got"),
        ({"masked": True}, ConfigError, "masked: got True, the folder has False"),
        ({"labels": ["a", "b"]}, ConfigError, "labels: got"),
        ({"validation": 0.4}, ConfigError, "validation_images: got 16, the folder has 8"),
        ({"validation": range(8)}, ConfigError, "validation: got"),
        ({"train": items(seed=3)}, ConfigError, "train_data: got"),
        ({"eval": items(12, 1)}, ConfigError, "eval_images: got 12, the folder has 10"),
        ({"eval": items(10, 2)}, ConfigError, "eval_data: got"),
        ({"training": TrainingConfig(**vars(QUICK) | {"max_steps": 1})}, ConfigError, "max_steps: got 1"),
        ({"training": TrainingConfig(**vars(QUICK) | {"seed": 6})}, ConfigError, "seed: got 6"),
        ({"model": backbone(7)}, BackboneMismatchError, "other weights"),
    ],
)
def test_another_search_than_the_folders_is_refused(tmp_path, monkeypatch, changes, error, message):
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Stop):
            sweep(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error, match=message):
        sweep(tmp_path, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_search_that_has_finished_no_trial_makes_room_for_another(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 0)
        with pytest.raises(Stop):
            sweep(tmp_path)
    result = sweep(tmp_path, space={"memory.tokens": [1, 2]}, n_trials=1, seeds=())
    assert len(result.trials) == 1


def test_a_folder_that_is_taken_damaged_or_foreign_is_refused(tmp_path):
    (tmp_path / "taken").mkdir()
    with FileLock(tmp_path / "taken" / ".lock"), pytest.raises(ConfigError, match="another process searches in"):
        sweep(tmp_path / "taken")
    sweep(tmp_path / "damaged", n_trials=1, seeds=())
    journal = tmp_path / "damaged" / "journal.log"
    good = journal.read_text()
    for text, message in (
        (good.replace('"op_code"', "op_code", 2), "is damaged"),
        (good.replace('"format_version":1', '"format_version":2'), "format version 2"),
        (good.replace('"settings":', '"other":'), "is damaged"),
    ):
        journal.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            sweep(tmp_path / "damaged", n_trials=1, seeds=())
    for name in ("journal.log", ".lock"):
        for change in (lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
            (tmp_path / "damaged" / name).unlink(missing_ok=True)
            change(tmp_path / "damaged" / name)
            with pytest.raises(CheckpointError, match=f"{name} is"):
                sweep(tmp_path / "damaged", n_trials=1, seeds=())
            (tmp_path / "damaged" / name).rename(tmp_path / f"aside-{len(list(tmp_path.iterdir()))}")
    (tmp_path / "foreign").mkdir()
    path = tmp_path / "foreign" / "journal.log"
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    optuna.create_study(study_name="mine", storage=optuna.storages.JournalStorage(backend))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="studies that are not memtune's"):
        sweep(tmp_path / "foreign")
    assert path.read_bytes() == before


def test_ties_go_to_the_smaller_loss_and_then_to_the_earlier_trial():
    trials = [
        Trial(number, {"optim": name}, accuracy, loss)
        for number, (name, accuracy, loss) in enumerate(
            [("a", 0.5, 0.1), ("b", 0.7, float("nan")), ("c", 0.7, 0.3), ("d", 0.7, 0.2), ("e", 0.7, 0.2)]
        )
    ]
    result = SweepResult({"optim": "choices"}, trials, [FinalRun(0, 0.5, 1.0), FinalRun(1, 0.7, 1.0)])
    assert [each.number for each in result.ranking] == [3, 4, 2, 1, 0]
    assert result.test_accuracy == pytest.approx(0.6)
    assert result.test_deviation == pytest.approx(0.02**0.5)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["trials"][1]["loss"] is None
    with pytest.raises(MemtuneError, match="no trial has been finished"):
        _ = SweepResult({}).best
    many = SweepResult({"optim": "choices"}, [Trial(number, {"optim": "a"}, 0.5, 1.0) for number in range(25)])
    assert "... and 5 more" in str(many)


SCRIPT = """
import os, sys
sys.path[:] = {tests!r}
import torch
import test_sweep as t
torch.set_num_threads(1)
result = t.sweep({folder!r}, seeds=(0,), training=t.TrainingConfig(
    **vars(t.QUICK) | {{"per_device_train_batch_size": {batch}}}))
open({output!r} + os.environ.get("RANK", ""), "w").write(repr([each.values for each in result.trials]))
try:
    t.sweep({folder!r}, seeds=(0,))
except t.ConfigError as error:  # in every process
    open({output!r} + os.environ.get("RANK", "") + "-refused", "w").write(str(error))
"""


@pytest.mark.slow
def test_two_processes_run_one_search(tmp_path):
    script = tmp_path / "script.py"
    folder, output = str(tmp_path / "run"), str(tmp_path / "values")
    script.write_text(
        SCRIPT.format(tests=[*sys.path, str(Path(__file__).parent)], folder=folder, output=output, batch=4)
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (Path(f"{output}{rank}").read_text() for rank in range(2))
    assert one == other
    assert len(json.loads((tmp_path / "run" / "sweep.json").read_text())["result"]["trials"]) == 3
    for rank in range(2):
        assert "per_device_train_batch_size: got 8, the folder has 4" in Path(f"{output}{rank}-refused").read_text()


@pytest.mark.slow
def test_the_example_searches_on_folders_of_images(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 4)):
        for name, level in (("dark", 0), ("light", 120)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 120, (20, 20, 3), dtype=np.uint8) + np.uint8(level)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    backbone().save_pretrained(tmp_path / "backbone")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "backbone")
    command = [sys.executable, str(Path(__file__).parents[2] / "examples" / "sweep.py"), "--cpu"]
    command += ["--model_name_or_path", str(tmp_path / "backbone"), "--train_dir", str(tmp_path / "train")]
    command += ["--test_dir", str(tmp_path / "test"), "--output_dir", str(tmp_path / "run"), "--masked"]
    command += ["--trunk_cache", str(tmp_path / "cache"), "--n_trials", "2", "--seeds", "0", "--num_train_epochs", "2"]
    command += ["--search", "learning_rate=log:1e-3:1e-1", "memory.tokens=1,2", "label_smoothing_factor=0:0.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "run" / "sweep.json").read_text())["result"]
    assert list(result["best_values"]) == ["learning_rate", "memory.tokens", "label_smoothing_factor"]
    assert f"test: {100 * result['test_score']:.2f} % (mean, n = 1)" in done.stdout
    assert memtune.load(tmp_path / "run" / "seed-0", backbone()).task.labels == ["dark", "light"]


@pytest.mark.parametrize("torn", [b'{"op_code": 4, "wor', b'{"op_code": 4, "\x00\x00\n', b"\x00\x00\x00\n"])
def test_a_last_line_that_was_not_finished_is_left_out(tmp_path, torn):
    first = sweep(tmp_path, n_trials=2, seeds=())
    journal = tmp_path / "journal.log"
    journal.write_bytes(journal.read_bytes() + torn)
    result = sweep(tmp_path, n_trials=3, seeds=())
    assert [trial.values for trial in result.trials[:2]] == [trial.values for trial in first.trials]
    assert len(result.trials) == 3
