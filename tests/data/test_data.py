import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from memtune.data.images import Collator, ImageDataset, as_items
from memtune.errors import InputError

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
MODES = {"cat/0.png": "RGB", "cat/1.png": "L", "dog/0.png": "RGBA", "dog/1.png": "P"}


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name, mode in MODES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (40, 48, 3), dtype=np.uint8)).convert(mode).save(path)
    return tmp_path


def read(folder, **options):
    return ImageDataset(datasets.load_dataset("imagefolder", data_dir=folder, split="train"), PROCESSOR, **options)


def test_images_of_every_mode_become_three_channels(folder):
    items = [read(folder)[index] for index in range(4)]
    assert {tuple(item["pixel_values"].shape) for item in items} == {(3, 32, 32)}
    assert [item["labels"] for item in items] == [0, 0, 1, 1]


def test_the_processor_does_what_it_does_alone(folder):
    image = Image.open(folder / "cat/0.png")
    assert torch.equal(read(folder)[0]["pixel_values"], PROCESSOR(image, return_tensors="pt").pixel_values[0])


def test_another_size(folder):
    assert read(folder, image_size=64)[0]["pixel_values"].shape == (3, 64, 64)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named(folder, content):
    path = folder / "dog/0.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(InputError, match=r"image 2 \(.*dog/0.png\) cannot be read.*on_error='skip'"):
        read(folder)[2]


def test_an_unreadable_image_is_skipped_by_choice(folder, caplog):
    (folder / "dog/0.png").write_bytes(b"no image")
    items = read(folder, on_error="skip")
    with caplog.at_level(logging.WARNING):
        batch = Collator(2)([items[index] for index in range(4)])
    assert batch["labels"].tolist() == [0, 0, -100, 1]
    assert batch["pixel_values"][2].count_nonzero() == 0
    assert "dog/0.png" in caplog.text


def test_no_readable_image_at_all(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the 4 images"):
        read(folder, on_error="skip")[0]


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_outside_the_range(label):
    with pytest.raises(InputError, match=rf"got \[{label}\], expected class indices from 0 to 1"):
        Collator(2)([{"pixel_values": torch.zeros(3, 8, 8), "labels": label}])


def test_an_item_that_lacks_something():
    with pytest.raises(InputError, match=r"lacks \['labels'\]; it has \['pixel_values'\]"):
        as_items([{"pixel_values": torch.zeros(3, 8, 8)}], PROCESSOR, None, "raise")[0]


def test_columns_that_are_not_there(folder):
    with pytest.raises(InputError, match=r"no column \['picture'\]; it has \['image', 'label'\]"):
        read(folder, image_column="picture")


def test_no_processor(folder):
    images = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
    with pytest.raises(InputError, match="no image processor"):
        as_items(images, None, None, "raise")


@pytest.mark.parametrize(("dataset", "message"), [([], "empty"), (7, "got a int"), (iter([1]), "expected a data set")])
def test_what_is_no_data_set(dataset, message):
    with pytest.raises(InputError, match=message):
        as_items(dataset, PROCESSOR, None, "raise")
