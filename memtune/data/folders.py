"""Folders of images: one folder for each class, or one for each split with those in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from ..errors import InputError
from ..storage import image_files, is_image

logger = logging.getLogger(__name__)

_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
_SPLITS |= {"dev": "validation", "test": "test", "testing": "test", "eval": "test"}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def load_splits(folder: str | Path) -> dict[str, datasets.Dataset]:
    """The data sets of a folder: `train`, and where it has folders for them `validation` and `test`.

    A folder whose folders are all named as splits (train, val, test ...) holds these; any other one class in each.

    Raises:
        InputError: There is no such folder, or no image in it where it should be.
    """
    path = _existing(folder)
    named = {_SPLITS[each.name.lower()]: each for each in _folders(path) if each.name.lower() in _SPLITS}
    if "train" in named and len(named) == len(_folders(path)) and all(map(_folders, named.values())):
        logger.warning("%s holds the splits %s, which are taken as such", path, sorted(named))
        return {name: load_folder(each) for name, each in named.items()}
    return {"train": load_folder(path)}


def load_folder(folder: str | Path) -> datasets.Dataset:
    """The images of a folder with one folder for each class, in the columns `image` and `label`.

    Links are followed; what lies in folders of a class's folder belongs to the class; other files than images are left
    out. A folder with a metadata file of `datasets` is read as `load_dataset("imagefolder")` does it.

    Raises:
        InputError: There is no such folder, or no image in it where it should be.
    """
    path = _existing(folder)
    if any((path / name).is_file() for name in _METADATA):
        try:
            return datasets.load_dataset("imagefolder", data_dir=str(path), data_files="**", split="train")
        except Exception as error:
            raise InputError(f"{path} cannot be loaded with its metadata: {error}") from error
    classes = _folders(path)
    if not classes:
        found = sum(1 for each in path.iterdir() if is_image(each))
        raise InputError(
            f"{path} has no folders, and {found} images in itself; expected a folder of images for each class, such as "
            f"{path / 'cat' / '1.jpg'}"
        )
    files = {each.name: sorted(image_files(each)) for each in classes}
    if without := [name for name, images in files.items() if not images]:
        logger.warning("%s: the folders %s hold no images and are left out", path, without)
    names = sorted(name for name, images in files.items() if images)
    if not names:
        raise InputError(f"{path} has the folders {sorted(files)}, but no image in any of them")
    if deeper := sorted({name for name in names for each in files[name] if each.parent.name != name}):
        logger.warning("%s: the classes %s have folders in their folders, whose images are theirs", path, deeper)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [(str(image), place) for place, name in enumerate(names) for image in files[name]]
    columns: Mapping[str, Any] = {"image": [image for image, _ in rows], "label": [label for _, label in rows]}
    return datasets.Dataset.from_dict(dict(columns), features=features)


def _existing(folder: str | Path) -> Path:
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "is not there"
        raise InputError(f"{path} {what}; expected a folder with a folder of images for each class")
    return path


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
