import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from transformers.modeling_outputs import ImageClassifierOutput

import memtune
from memtune import TrainingConfig
from memtune.continual import folder as continual_folder
from memtune.continual import protocol as continual
from memtune.continual.folder import read_state
from memtune.continual.protocol import ClassCrossEntropy, ContinualTask, class_order, fit_continual, split_by_class
from memtune.errors import BackboneMismatchError, CheckpointError, ConfigError, InputError
from memtune.storage.atomic import place_of

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CODA = memtune.CodaPromptConfig(pool_size=6, prompt_length=2, num_tasks=3, blocks=None)
GROUPS = [[4, 1], [0, 2], [5, 3]]
CONFIG = TrainingConfig(
    num_train_epochs=4, per_device_train_batch_size=8, learning_rate=1e-2, weight_decay=0.0, seed=3, disable_tqdm=True
)
MODES = pytest.mark.parametrize("masked", [False, True])


def backbone(seed=0):
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**SHAPE, image_size=16, patch_size=8))


def tuned(config=CODA, masked=False, seed=0, **options):
    model = backbone(seed)
    torch.manual_seed(1)
    return memtune.wrap(model, config, num_labels=6, masked=masked, **options)


def items(classes, count, seed):
    """Images with a pattern of their class under noise."""
    patterns = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(99))
    noise = torch.Generator().manual_seed(seed)
    labels = [classes[index % len(classes)] for index in range(count)]
    return [
        {"pixel_values": 2 * patterns[label] + torch.randn(3, 16, 16, generator=noise), "labels": label}
        for label in labels
    ]


def sequence():
    return [
        ContinualTask(group, items(group, 16, number), items(group, 10, 50 + number))
        for number, group in enumerate(GROUPS)
    ]


def weights(model):
    return {key: tensor.clone() for key, tensor in model.task.tensors().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Stop(Exception):
    """Raised in the place of a kill."""


class Stopping(list):
    """Data that stop the run when they are read."""

    def __getitem__(self, index):
        raise Stop


def stopping_at(number):
    tasks = sequence()
    tasks[number] = ContinualTask(GROUPS[number], Stopping(tasks[number].train_dataset), tasks[number].eval_dataset)
    return tasks


@pytest.mark.parametrize("loss", ["local", "seen"])
def test_the_matrix_is_that_of_a_loop_written_out(loss):
    model, by_hand = tuned(), tuned()
    result = fit_continual(model, sequence(), CONFIG, loss=loss)
    seen = []
    for number, task in enumerate(sequence()):
        torch.manual_seed(CONFIG.seed + number)
        by_hand.task.adapters[0].start_task(number)
        seen += task.classes
        among = task.classes if loss == "local" else seen
        allowed = torch.tensor([0.0 if label in among else -torch.inf for label in range(6)])
        memtune.fit(
            by_hand,
            task.train_dataset,
            config=replace(CONFIG, seed=CONFIG.seed + number),
            compute_loss_func=lambda outputs, labels, allowed=allowed: cross_entropy(outputs.logits + allowed, labels),
        )
        row = []
        for earlier in sequence()[: number + 1]:
            images = torch.stack([item["pixel_values"] for item in earlier.eval_dataset])
            with torch.no_grad():
                logits = by_hand(images).logits[:, seen]
            guesses = torch.tensor(seen)[logits.argmax(dim=-1)]
            right = guesses == torch.tensor([item["labels"] for item in earlier.eval_dataset])
            row.append(right.float().mean().item())
        assert result.accuracy_matrix[number] == pytest.approx(row)
    for key, tensor in weights(model).items():
        torch.testing.assert_close(tensor, weights(by_hand)[key], rtol=1e-3, atol=1e-5)
    assert result.classes == GROUPS
    assert result.eval_images == [10, 10, 10]


def test_the_local_loss_forgets_less():
    config = replace(CONFIG, learning_rate=3e-2, num_train_epochs=8)
    local, seen = (fit_continual(tuned(), sequence(), config, loss=loss) for loss in ("local", "seen"))
    assert local.average_accuracy > seen.average_accuracy + 0.2
    assert local.forgetting_from_peak < 0.3 < seen.forgetting_from_peak


@MODES
def test_rows_of_earlier_tasks_stay_bit_for_bit(masked):
    model, states = tuned(masked=masked), []
    original = continual.fit

    def noting(*args, **kwargs):
        trained = original(*args, **kwargs)
        states.append(weights(model))
        return trained

    before = {key: tensor.clone() for key, tensor in model.backbone.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "fit", noting)
        fit_continual(model, sequence(), CONFIG)
    pools = [key for key in states[0] if ".prefix" in key]
    assert len(pools) == 2 * 3
    for number in range(3):
        own = slice(2 * number, 2 * number + 2)
        for key in pools:
            assert states[number][key][own].any()
            assert not states[number][key][own.stop :].any()
            assert all(torch.equal(later[key][own], states[number][key][own]) for later in states[number:])
        for later in states[number:]:
            for key in ("head.weight", "head.bias"):
                assert torch.equal(later[key][GROUPS[number]], states[number][key][GROUPS[number]])
    assert equal(before, model.backbone.state_dict())


@pytest.mark.parametrize(
    "config", [CODA, memtune.MemoryConfig(2), memtune.LoraConfig(r=2)], ids=lambda each: each.method
)
@MODES
@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, config, masked):
    whole = tuned(config, masked)
    result = fit_continual(whole, sequence(), CONFIG, output_dir=tmp_path / "whole")
    for number in (1, 2):
        with pytest.raises(Stop):
            fit_continual(tuned(config, masked), stopping_at(number), CONFIG, output_dir=tmp_path / "stopped")
        assert len(read_state(tmp_path / "stopped")["result"]["accuracy_matrix"]) == number
    torch.manual_seed(1234)
    model = tuned(config, masked)
    with torch.no_grad():  # whatever the new model is before it takes over the folder's
        model.task.head.weight.normal_()
    again = fit_continual(model, sequence(), CONFIG, output_dir=tmp_path / "stopped")
    assert again.accuracy_matrix == result.accuracy_matrix
    assert equal(weights(model), weights(whole))
    assert equal(weights(memtune.load(tmp_path / "stopped", whole.backbone)), weights(whole))
    assert fit_continual(tuned(config, masked), stopping_at(0), CONFIG, output_dir=tmp_path / "whole") == result


@pytest.mark.slow
def test_killed_at_any_task_it_goes_on(tmp_path):
    """A process that is killed while it trains the second task, and another that goes on."""
    folder, script = tmp_path / "run", tmp_path / "run.py"
    script.write_text(
        f"import sys, os\nsys.path[:] = {[*sys.path, str(Path(__file__).parent)]!r}\nimport test_continual as t\n"
        "class Killing(list):\n"
        "    def __getitem__(self, index): os.kill(os.getpid(), 9)\n"
        "tasks = t.sequence()\n"
        "tasks[1] = t.ContinualTask(t.GROUPS[1], Killing(tasks[1].train_dataset), tasks[1].eval_dataset)\n"
        f"t.torch.set_num_threads({torch.get_num_threads()})\n"
        f"t.fit_continual(t.tuned(), tasks, t.CONFIG, output_dir={str(folder)!r})\n"
    )
    killed = subprocess.run(
        [sys.executable, str(script)], env=os.environ.copy(), capture_output=True, text=True, check=False, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    model, whole = tuned(), tuned()
    result = fit_continual(model, sequence(), CONFIG, output_dir=folder)
    assert result.accuracy_matrix == fit_continual(whole, sequence(), CONFIG).accuracy_matrix
    assert equal(weights(model), weights(whole))


def test_adapter_and_state_are_replaced_together(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        fit_continual(tuned(), stopping_at(1), CONFIG, output_dir=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = tuned()
    folder = continual_folder.RunFolder(tmp_path, model, sequence(), CONFIG, "local")
    monkeypatch.setattr(continual_folder.json, "dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folder.save(model, continual.ContinualResult())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert place_of(tmp_path, continual_folder.STATE_NAME).is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config": TrainingConfig(**vars(CONFIG) | {"learning_rate": 2e-2})},
            r"learning_rate: got 0.02, the folder has 0.01",
        ),
        ({"loss": "seen"}, "loss: got 'seen', the folder has 'local'"),
        ({"tasks": sequence()[::-1]}, r"classes: got \[\[5, 3\]"),
        ({"tasks": sequence()[:2]}, r"eval_images: got \[10, 10\]"),
        ({"model": {"masked": True}}, "masked: got True, the folder has False"),
        ({"model": {"config": memtune.MemoryConfig(2)}}, r"methods: got \[\{'method': 'memory'"),
    ],
)
def test_other_settings_than_the_folders_are_refused(tmp_path, change, message):
    with pytest.raises(Stop):
        fit_continual(tuned(), stopping_at(1), CONFIG, output_dir=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    given = {"tasks": sequence(), "config": CONFIG} | change | {"model": tuned(**change.get("model", {}))}
    state = weights(given["model"])
    with pytest.raises(ConfigError, match=message):
        fit_continual(**given, output_dir=tmp_path)
    assert equal(weights(given["model"]), state)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_backbone_and_a_damaged_state_are_refused(tmp_path):
    with pytest.raises(Stop):
        fit_continual(tuned(), stopping_at(1), CONFIG, output_dir=tmp_path)
    with pytest.raises(BackboneMismatchError, match="other weights"):
        fit_continual(tuned(seed=7), sequence(), CONFIG, output_dir=tmp_path)
    state = json.loads((tmp_path / "continual.json").read_text())
    for text, message in (
        ("{", "missing or damaged"),
        (json.dumps(state | {"format_version": 2}), "format version 2"),
        (json.dumps(state | {"result": {"unknown": 1}}), "missing or damaged"),
        (json.dumps(state | {"settings": "x"}), "missing or damaged"),
        (json.dumps(state | {"result": state["result"] | {"accuracy_matrix": [None]}}), "missing or damaged"),
        (json.dumps(state | {"result": state["result"] | {"seconds": "long"}}), "missing or damaged"),
    ):
        (tmp_path / "continual.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            fit_continual(tuned(), sequence(), CONFIG, output_dir=tmp_path)


def test_what_cannot_work_is_refused_before_anything_is_trained():
    model = tuned(replace(CODA, num_tasks=2))
    state = weights(model)
    for tasks, options, message in (
        (sequence(), {}, "task: got 2, expected a number below num_tasks=2"),
        (sequence(), {"loss": "all"}, "loss: got 'all'"),
        (sequence(), {"config": TrainingConfig(output_dir="run")}, "config: output_dir is for"),
        ([], {}, "got 0 tasks"),
        (sequence()[:1] * 2, {}, r"the classes \[1, 4\] stand in them twice"),
        ([ContinualTask([6], items([1], 2, 0), items([1], 2, 0))], {}, r"got the classes \[6\], expected .* 0 to 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_continual(model, tasks, **{"config": CONFIG} | options)
    wrong = [ContinualTask([0, 1], items([0, 2], 4, 0), items([0, 1], 4, 0))]
    with pytest.raises(InputError, match=r"got \[2\] in the data of the task of the classes \[0, 1\]"):
        fit_continual(model, wrong, CONFIG)
    assert equal(weights(model), state)


def test_a_trained_backbone_is_not_saved(tmp_path):
    model = tuned(memtune.MemoryConfig(tokens=0, class_token=False))
    model.backbone.requires_grad_(True)
    with pytest.raises(ConfigError, match="the backbone is being trained"):
        fit_continual(model, sequence(), CONFIG, output_dir=tmp_path)
    before = model.backbone.vit.layernorm.weight.detach().clone()
    fit_continual(model, sequence()[:1], CONFIG)
    assert not torch.equal(before, model.backbone.vit.layernorm.weight)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_a_head_without_the_other_classes(smoothing):
    logits = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([4, 1, 4, 5, 1, 5, 5])
    loss = ClassCrossEntropy([4, 1, 5], smoothing)(ImageClassifierOutput(logits=logits), labels)
    probabilities = logits[:, [1, 4, 5]].softmax(dim=1)
    column = torch.tensor([{1: 0, 4: 1, 5: 2}[label] for label in labels.tolist()])
    target = (1 - smoothing) * torch.eye(3)[column] + smoothing / 3
    torch.testing.assert_close(loss, -(target * probabilities.log()).sum(dim=1).mean())
    loss.backward()
    assert not logits.grad[:, [0, 2, 3]].any()
    if not smoothing:
        masked = logits.detach().masked_fill(~torch.isin(torch.arange(6), torch.tensor([1, 4, 5])), -torch.inf)
        torch.testing.assert_close(loss.detach(), cross_entropy(masked, labels))


def images(labels, names=6):
    pictures = [Image.fromarray(np.full((16, 16, 3), 40 * label, dtype=np.uint8)) for label in labels]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"c{name}" for name in range(names)])}
    )
    return datasets.Dataset.from_dict({"image": pictures, "label": list(labels)}, features=features)


def test_split_by_class_goes_by_names():
    def renamed(names):
        return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})

    train, evaluation = images([0, 1, 2, 0, 1, 2], 3), images([0, 1, 2], 3)
    other = renamed(["c2", "c0", "c1"])
    split = split_by_class(train, evaluation.cast(other), 3)
    assert [task.eval_dataset["label"][:] for task in split] == [[1], [2], [0]]  # in its own numbers: c0, c1, c2
    lacking = renamed(["c0", "c1", "owl"])
    with pytest.raises(InputError, match="owl"):
        split_by_class(train, evaluation.cast(lacking), 3)


def test_what_cannot_be_split_is_named():
    train = images([0, 1, 2], 3)
    texts = datasets.Dataset.from_dict({"image": train["image"][:], "label": ["a", "b", "c"]})
    with pytest.raises(InputError, match=r"label: got 'a', expected the number of a class; class_encode_column"):
        split_by_class(texts, texts, 3)
    with pytest.raises(InputError, match=r"got the columns .*'breed'.*, expected .* the column label"):
        split_by_class(train.rename_column("label", "breed"), train, 3)
    with pytest.raises(InputError, match=r"got list, expected a datasets\.Dataset"):
        split_by_class([1, 2], train, 3)


def test_split_by_class():
    train, evaluation = images([0, 1, 2, 3, 4, 0, 1, 2, 3, 4]), images([4, 3, 2, 1, 0])
    tasks = split_by_class(train, evaluation, 2, order=[3, 0, 4, 1, 2])
    assert [task.classes for task in tasks] == [[3, 0, 4], [1, 2]]
    assert [task.train_dataset["label"][:] for task in tasks] == [[0, 3, 4, 0, 3, 4], [1, 2, 1, 2]]
    assert [task.eval_dataset["label"][:] for task in tasks] == [[4, 3, 0], [2, 1]]
    assert [task.classes for task in split_by_class(train, evaluation, 5)] == [[0], [1], [2], [3], [4]]
    for number, order, message in (
        (0, None, "tasks: got 0, expected a number from 1 to that of the classes, 5"),
        (6, None, "tasks: got 6"),
        (2, [0, 0, 1], r"the classes \[0\] are named twice"),
        (2, [0, 5, 1], r"the classes \[5\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            split_by_class(train, evaluation, number, order)


def test_images_of_a_data_set_go_through_the_processor():
    model = tuned(processor=ViTImageProcessorPil(size={"height": 16, "width": 16}))
    tasks = split_by_class(images([0, 1, 2, 3, 4, 5] * 4), images([5, 4, 3, 2, 1, 0]), 3)
    by_hand = [
        ContinualTask(
            task.classes,
            *(
                [
                    {
                        "pixel_values": model.processor(row["image"], return_tensors="pt").pixel_values[0],
                        "labels": row["label"],
                    }
                    for row in split
                ]
                for split in (task.train_dataset, task.eval_dataset)
            ),
        )
        for task in tasks
    ]
    other = tuned()
    assert fit_continual(model, tasks, CONFIG).accuracy_matrix == fit_continual(other, by_hand, CONFIG).accuracy_matrix
    assert equal(weights(model), weights(other))
    wrong = [ContinualTask([0, 1], tasks[0].train_dataset, tasks[1].eval_dataset)]
    with pytest.raises(InputError, match=r"got \[2, 3\]"):
        fit_continual(tuned(processor=model.processor), wrong, CONFIG)


def test_the_order_of_classes_is_codas():
    import random

    assert class_order(5, 0) == [0, 1, 2, 3, 4]
    random.seed(2)
    shuffled = list(range(100))
    random.shuffle(shuffled)
    assert class_order(100, 2) == shuffled
