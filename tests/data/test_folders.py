"""Folders of images as people have them."""

import gc
import logging

import pytest
from PIL import Image

from memtune.data import held_out, load_folder, load_splits
from memtune.errors import InputError


def fill(folder, count=3, ending="png"):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (8, 8), (9 * number, 0, 0)).save(folder / f"{number}.{ending}")


def summary(data):
    names = data.features["label"].names
    return {name: data["label"].count(place) for place, name in enumerate(names)}


def test_a_folder_for_each_class(tmp_path):
    fill(tmp_path / "cat", 2)
    fill(tmp_path / "ant", 3, "jpg")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    assert summary(load_folder(tmp_path)) == {"ant": 3, "cat": 2}
    assert list(load_splits(tmp_path)) == ["train"]


def test_links_are_followed_and_circles_end(tmp_path):
    fill(tmp_path / "real" / "a")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "ant").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "real" / "a" / "again").symlink_to(tmp_path / "real")
    assert summary(load_folder(tmp_path / "linked")) == {"ant": 3}


def test_folders_within_a_class_belong_to_it(tmp_path, caplog):
    fill(tmp_path / "ant" / "day1")
    fill(tmp_path / "bee" / "day1")
    fill(tmp_path / "bee" / "day2")
    with caplog.at_level(logging.WARNING):
        assert summary(load_folder(tmp_path)) == {"ant": 3, "bee": 6}
    assert "have folders in their folders" in caplog.text


def test_splits_are_taken_as_such(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        fill(tmp_path / split / "ant", count)
        fill(tmp_path / split / "bee", count)
    splits = load_splits(tmp_path)
    assert {name: len(data) for name, data in splits.items()} == {"train": 6, "test": 4}


def test_a_class_may_be_called_as_a_split(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "plane")
    assert summary(load_splits(tmp_path)["train"]) == {"plane": 3, "train": 3}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_metadata_is_that_of_datasets(tmp_path):
    fill(tmp_path / "pictures")
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(f"pictures/{n}.png,ant\n" for n in range(3)))
    data = load_folder(tmp_path)
    assert data["label"] == ["ant"] * 3
    gc.collect()  # of the file that `datasets` leaves open


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not there"),
        (lambda path: path.write_text("x"), "is a file"),
        (lambda path: path.mkdir(), "no folders, and 0 images"),
        (lambda path: fill(path), "no folders, and 3 images in itself; expected a folder of images for each class"),
        (lambda path: (path / "ant").mkdir(parents=True), "no image in any of them"),
    ],
)
def test_what_is_no_such_folder(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        load_folder(tmp_path / "data")


def test_a_class_keeps_an_image_to_train_on():
    labels = [0] * 20 + [1] * 20 + [2]
    for seed in range(40):
        assert 40 not in held_out(labels, 0.15, seed)
