"""Labels go by their names: whatever order, type or gaps a data set has, accuracy is that of a count by names."""

import datasets
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from training_runs import SHAPE
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune import TrainingConfig
from memtune.continual.protocol import ContinualTask, fit_continual
from memtune.data import LabelReader, as_items, class_names
from memtune.errors import ConfigError, InputError
from memtune.tasks import IGNORED

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
LABELS = ["ant", "bee", "cat"]
COLOURS = {"ant": (250, 10, 10), "bee": (10, 250, 10), "cat": (10, 10, 250), "dog": (250, 250, 10)}
QUIET = TrainingConfig(disable_tqdm=True, num_train_epochs=1, per_device_train_batch_size=8)


def model(labels=LABELS, **options):
    torch.manual_seed(0)
    backbone = ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8))
    config = memtune.MemoryConfig(2)
    return memtune.wrap(backbone, config, labels=labels, processor=PROCESSOR, **options)


def picture(name, seed=0):
    noise = np.random.default_rng(seed).integers(-9, 9, (36, 36, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8))


def column_of(kind, names, order):
    """The labels of images of some classes in a column of a kind, with the classes numbered in an order."""
    if kind == "texts":
        return names, datasets.Value("string")
    numbers = [order.index(name) for name in names]
    return numbers, datasets.ClassLabel(names=order) if kind == "classes" else datasets.Value("int64")


def data(names, kind="classes", order=LABELS, label_column="label"):
    labels, feature = column_of(kind, names, list(order))
    features = datasets.Features({"image": datasets.Image(), label_column: feature})
    images = [picture(name, seed) for seed, name in enumerate(names)]
    return datasets.Dataset.from_dict({"image": images, label_column: labels}, features=features)


class Folder(torch.utils.data.Dataset):
    """What torchvision's ImageFolder gives: pairs, and the names of the classes."""

    def __init__(self, names, order):
        self.classes = list(order)
        self._rows = [(picture(name, seed), self.classes.index(name)) for seed, name in enumerate(names)]

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]


def counted(tuned, names):
    """The accuracy and the loss, one image after the other, by names."""
    right, losses = [], []
    for seed, name in enumerate(names):
        with torch.no_grad():
            logits = tuned(PROCESSOR(picture(name, seed), return_tensors="pt").pixel_values).logits[0]
        right.append(tuned.task.labels[logits.argmax()] == name)
        losses.append(-logits.log_softmax(0)[tuned.task.labels.index(name)].item())
    return {"accuracy": np.mean(right), "loss": np.mean(losses)}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(COLOURS)), min_size=1, max_size=7),
    st.permutations(sorted(COLOURS)),
    st.sampled_from(["classes", "texts", "folder", "part of a folder", "items", "transformed"]),
    st.booleans(),
)
def test_evaluation_is_a_count_by_names(names, order, kind, spare):
    """Classes in any order, some lacking, some beyond the model's: a right count, or an error that names the class."""
    tuned = model().eval()
    order = [name for name in order if spare or name in names]
    if kind == "folder":
        given_data = Folder(names, order)
    elif kind == "part of a folder":
        given_data = torch.utils.data.Subset(
            Folder(["cat", *names], [*order, *{"cat"} - set(order)]), range(1, len(names) + 1)
        )
        given_data.dataset._rows[1:] = Folder(names, given_data.dataset.classes)._rows
    elif kind == "items":
        given_data = [{"image": picture(name, seed), "label": name} for seed, name in enumerate(names)]
    elif kind == "transformed":
        given_data = data(names, order=order).with_transform(
            lambda batch: {
                "pixel_values": [PROCESSOR(image, return_tensors="pt").pixel_values[0] for image in batch["image"]],
                "labels": batch["label"],
            }
        )
    else:
        given_data = data(names, kind, order)
    if "dog" in names:
        with pytest.raises(InputError, match="'dog'"):
            memtune.evaluate(tuned, given_data)
        return
    expected = counted(tuned, names)
    assert memtune.evaluate(tuned, given_data) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_every_entry_point_goes_by_names(kind, tmp_path):
    names, order = ["cat", "bee", "bee", "ant", "cat", "bee", "ant", "cat"], ["cat", "ant", "bee"]
    other, sorted_order = data(names, kind, order), data(names, "classes", LABELS)

    def fitted(train, evaluation):
        tuned = model()
        result = memtune.fit(tuned, train, evaluation, QUIET)
        return torch.cat([tensor.flatten() for tensor in tuned.task.tensors().values()]), result.scores

    expected, scores = fitted(sorted_order, sorted_order)
    values, found = fitted(other, other)
    torch.testing.assert_close(values, expected)
    assert found == pytest.approx(scores)

    alone = model()
    assert memtune.fit_closed_form(alone, other, QUIET).loo_score > 0.9
    assert memtune.evaluate(alone, sorted_order)["accuracy"] == 1

    tuned = model()
    parts = [ContinualTask([0, 1], data(["bee", "ant"] * 4, kind, order), data(["ant"], kind, order))]
    parts.append(ContinualTask([2], data(["cat"] * 8, kind, order), data(["cat"], kind, order)))
    assert fit_continual(tuned, parts, QUIET, solver="closed_form").average_accuracy == 1


def test_what_a_model_of_numbers_takes():
    """LABEL_0 ... are no names: indices are taken as they are."""
    torch.manual_seed(0)
    tuned = memtune.wrap(model().backbone, memtune.MemoryConfig(2), num_labels=3, processor=PROCESSOR)
    names = ["cat", "bee"]
    assert memtune.evaluate(tuned, data(names)) == memtune.evaluate(tuned, data(names, "numbers"))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (0.7, "expected the index or the name of a class"),
        (torch.tensor(1.0), "expected the index or the name of a class"),
        (None, "has no label"),
        ([0, 1], "several classes"),
        (torch.eye(3)[0], "several classes"),
        ("dog", "the model lacks"),
        (3, "from 0 to 2"),
        (-1, "from 0 to 2"),
    ],
)
def test_labels_that_are_none(label, message):
    with pytest.raises(InputError, match=message):
        LabelReader(LABELS, None)(label, "image 0")
    items = [{"pixel_values": torch.zeros(3, 32, 32), "labels": label}] * 2
    for run in (lambda: memtune.fit(model(), items, config=QUIET), lambda: memtune.evaluate(model(), items)):
        with pytest.raises(InputError, match=message):
            run()


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2), np.array(2), True + True, "cat"])
def test_labels_of_every_type(label):
    assert LabelReader(LABELS, None)(label, "image 0") == 2


def test_labels_that_are_left_out():
    tuned, ignored = model(), {"pixel_values": torch.randn(3, 32, 32), "labels": IGNORED}
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 3} for index in range(6)]
    assert memtune.evaluate(tuned, [*rows, *[ignored] * 5]) == pytest.approx(memtune.evaluate(tuned, rows))
    assert memtune.fit_closed_form(model(), [*rows, ignored], QUIET).images == 6
    with pytest.raises(InputError, match="no image of the data set has a label"):
        memtune.evaluate(tuned, [ignored] * 3)
    one, other = model(), model()
    same = {"learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 2, "disable_tqdm": True}
    for each, rows_of in ((one, [rows[0], ignored]), (other, [rows[0]])):
        memtune.fit(each, rows_of, config=TrainingConfig(**same))
    for tensor, expected in zip(one.task.tensors().values(), other.task.tensors().values(), strict=True):
        torch.testing.assert_close(tensor, expected)
    few = memtune.fit(one, [rows[0], *[ignored] * 3], config=TrainingConfig(**same))  # of two batches one has no label
    assert torch.tensor(few.history[0]["loss"]).isfinite()


def test_columns():
    other = data(["ant", "cat"], label_column="insect")
    assert as_items(other, PROCESSOR, None, "raise", labels=LABELS).labels() == [0, 2]  # the only one of classes
    two = other.add_column("label_of_text", ["bee", "bee"])
    found = as_items(two, PROCESSOR, None, "raise", labels=LABELS, label_column="label_of_text")
    assert found.labels() == [1, 1]
    assert memtune.evaluate(model(), two, label_column="label_of_text")["loss"] > 0
    numbers = data(["ant"], "numbers", label_column="breed")
    with pytest.raises(InputError, match=r"no column.*name the one to take by label_column"):
        as_items(numbers, PROCESSOR, None, "raise")
    assert class_names(two) is None
    assert class_names(two, "insect") == LABELS


def test_what_is_no_data_set_is_named():
    whole = data(["ant"])
    for given_data, message in (
        (datasets.DatasetDict(train=whole), r"the splits \['train'\]; pass one of them"),
        ("pets/train", "got the path 'pets/train'"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32)}, "got a dict"),
        (torch.zeros(2, 3, 32, 32), "got a Tensor"),
        (pandas.DataFrame({"image": ["a.png"], "label": [0]}), r"got a DataFrame; pass datasets\.Dataset\.from_pandas"),
        ([7, 8], "item 0 of the data set is a int"),
        ([{"pixel_values": torch.zeros(3, 32, 32 + 8 * odd), "labels": 0} for odd in (0, 1)], "differ in their shapes"),
    ):
        with pytest.raises(InputError, match=message):
            memtune.fit(model(), given_data, config=QUIET)


def test_mixing_needs_classes_of_one_task():
    with pytest.raises(ConfigError, match="mixup_alpha"):
        fit_continual(model(), [ContinualTask([0], data(["ant"]), data(["ant"]))], TrainingConfig(mixup_alpha=0.2))
