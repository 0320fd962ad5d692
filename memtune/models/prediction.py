"""`predict()`: from image files, pictures and folders to labels with scores, by one task or by many."""

from __future__ import annotations

import csv
import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..drawing import draw_sheet
from ..errors import ConfigError, InputError
from ..storage import decode, image_files, pixel_values_of
from ..tasks import Regression, Task

Answers: TypeAlias = list[dict[str, Any]]
"""The best labels of an image, the best first: {"label", "score"} of each, as transformers' pipelines give them."""


@dataclass(frozen=True)
class Prediction:
    """What the tasks say of one image.

    Attributes:
        image: Its path; "image 3" of a picture that has none.
        tasks: The answers by the task's name; that of a tuned model's task is "".
        problem: Why it has no answers; empty if it has.
    """

    image: str
    tasks: Mapping[str, Answers]
    problem: str = ""


class Predictions(list[Any]):
    """The answers for some images, in their order: of each image its `Answers`, or by task a dictionary of these.

    Attributes:
        images: The path of each image; "image 3" of a picture that has none.
        problems: What is wrong with the images that were skipped, by path; they are not in the list.
    """

    def __init__(self, found: Iterable[Prediction]) -> None:
        super().__init__()
        self.images: list[str] = []
        self.problems: dict[str, str] = {}
        for each in found:
            if each.problem:
                self.problems[each.image] = each.problem
            else:
                self.images.append(each.image)
                self.append(each.tasks[""] if each.tasks.keys() == {""} else dict(each.tasks))

    def _by_task(self) -> Iterator[tuple[str, Mapping[str, Answers]]]:
        for image, answer in zip(self.images, self, strict=True):
            yield image, answer if isinstance(answer, dict) else {"": answer}

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each image, task and answer: `image`, `task` (of many), `rank` from 1, `label`, `score`.

        Args:
            path: The file; replaced if it is there.
        """
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = TableWriter(file)
            for image, tasks in self._by_task():
                writer.write(Prediction(image, tasks))

    def draw(self, path: str | Path) -> None:
        """Draw the images, at most 60, each with its name and the best answer of each task.

        Args:
            path: The picture's file; its ending says the format.

        Raises:
            MemtuneError: matplotlib is not installed.
            InputError: An image is no file, or one that is gone.
        """
        draw_sheet([(decode(image), caption(image, tasks)) for image, tasks in islice(self._by_task(), 60)], path)

    def __str__(self) -> str:
        return "\n".join(line for image, tasks in self._by_task() for line in lines_of(image, tasks))


class TableWriter:
    """Writes predictions as CSV, one after another.

    Args:
        file: Where to; an open text file.
    """

    def __init__(self, file: Any) -> None:
        self._writer = csv.writer(file)
        self._begun = False

    def write(self, found: Prediction) -> None:
        """Write the lines of one image."""
        several = found.tasks.keys() != {""}
        if not self._begun:
            self._writer.writerow(["image", *(["task"] if several else []), "rank", "label", "score"])
            self._begun = True
        for name, answers in found.tasks.items():
            for rank, each in enumerate(answers, 1):
                row = [found.image, *([name] if several else []), rank, each["label"], f"{each['score']:.6f}"]
                self._writer.writerow(row)


def lines_of(image: str, tasks: Mapping[str, Answers]) -> list[str]:
    """A line for people for each task."""
    return [
        "\t".join(
            [image, *([name] if name else []), ", ".join(f"{each['label']} {each['score']:.3f}" for each in answers)]
        )
        for name, answers in tasks.items()
    ]


def caption(image: str, tasks: Mapping[str, Answers]) -> str:
    """What stands above an image in a picture: its name, and the best answer of each task."""
    best = [(f"{name}: " if name else "", answers[0]) for name, answers in tasks.items() if answers]
    lines = [f"{prefix}{answer['label']} ({answer['score']:.2f})" for prefix, answer in best]
    return "\n".join([Path(image).name, *lines])


@dataclass(frozen=True)
class TaskScores:
    """What a task says of some images.

    Attributes:
        task: The task.
        logits: Its logits, (images, labels).
    """

    task: Task
    logits: Tensor

    def best(self, top_k: int | None) -> list[Answers]:
        """For each image the best labels; of a task of numbers all, in their order."""
        labels, scores = self.task.labels, self.task.objective.scores(self.logits.float()).cpu()
        if isinstance(self.task.objective, Regression):
            values, places = scores, torch.arange(len(labels)).expand_as(scores)
        else:
            values, places = scores.topk(len(labels) if top_k is None else min(top_k, len(labels)))
        pairs = zip(values.tolist(), places.tolist(), strict=True)
        return [
            [{"label": labels[place], "score": score} for score, place in zip(own, found, strict=True)]
            for own, found in pairs
        ]


Classify: TypeAlias = Callable[[Tensor], Mapping[str, TaskScores]]
"""What gives for images (batch, channels, height, width) what each task says of them, by its name."""


def predict_each(
    images: Any,
    classify: Classify,
    processor: Any,
    *,
    channels: int,
    place: tuple[torch.device, torch.dtype],
    top_k: int | None,
    batch_size: int,
    on_error: Literal["raise", "skip"],
) -> Iterator[Prediction]:
    """The prediction for each image, in their order, made as they are asked for.

    Args:
        images: See `SharedModel.predict`.
        classify: The model.
        processor: The image processor.
        channels: Those that the model takes.
        place: Device and type of numbers of what it takes.
        top_k: How many answers of each task; None for one for each label.
        batch_size: Images a pass.
        on_error: "raise" at an image that cannot be read, or "skip" it, and say so in its prediction.
    """
    named = _named(images)
    for start in tqdm(range(0, len(named), batch_size), unit="batch", disable=None):
        batch = [
            (name, *_pixels(name, value, processor, channels)) for name, value in named[start : start + batch_size]
        ]
        if on_error == "raise" and (wrong := next((problem for _, _, problem in batch if problem), "")):
            raise InputError(f"{wrong}; repair it, or skip such with on_error='skip'")
        read = [values for _, values, _ in batch if values is not None]
        if others := [tuple(values.shape) for values in read if values.shape != read[0].shape]:
            raise InputError(
                f"the processor makes images of different shapes, {tuple(read[0].shape)} and {others[0]}; pass "
                "batch_size=1, or a processor that makes all of one size"
            )
        device, dtype = place
        found = classify(torch.stack(read).to(device, dtype)) if read else {}
        by_task = {name: iter(scores.best(top_k)) for name, scores in found.items()}
        for name, values, problem in batch:
            answers = {} if values is None else {task: next(own) for task, own in by_task.items()}
            yield Prediction(name, answers, problem)


def check_options(top_k: int | None, batch_size: int, on_error: str, processor: Any) -> None:
    """Raise `ConfigError` at an option that is wrong."""
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}: got {value!r}, expected a number from 1")
    if batch_size is None:
        raise ConfigError("batch_size: got None, expected a number from 1")
    if on_error not in ("raise", "skip"):
        raise ConfigError(f"on_error: got {on_error!r}, expected 'raise' or 'skip'")
    if not callable(processor):
        raise ConfigError(
            f"image_processor: got {processor!r}; pass one, such as AutoImageProcessor.from_pretrained(...)"
        )


def is_one(images: Any) -> bool:
    """Whether what is to be predicted is one image, whose answer is no list of answers."""
    if isinstance(images, (str, Path)):
        return not Path(images).is_dir() and not _matches(images)
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(images, (Image.Image, bytes, bytearray, Mapping))


def _matches(images: str | Path) -> list[str]:
    """The files that a pattern such as `photos/*.jpg` names; none for a file's own name."""
    return [] if Path(images).exists() else sorted(glob.glob(str(images), recursive=True))  # noqa: PTH207 - any root


def _named(images: Any) -> list[tuple[str, Any]]:
    """Each image with its name."""
    values = [images] if is_one(images) or isinstance(images, (str, Path)) else images
    if values is images and not hasattr(images, "__iter__") and not hasattr(images, "__getitem__"):
        raise InputError(f"images: got {type(images).__name__}, expected paths, a folder, PIL images, or arrays")
    named = []
    for value in values:
        if isinstance(value, (str, Path)):
            named += [(path, path) for path in _files(value)]
        else:
            if isinstance(value, Mapping) and "image" in value:
                value = value["image"]
            path = value.get("path") if isinstance(value, Mapping) else getattr(value, "filename", None)
            named.append((str(path) if path else f"image {len(named)}", value))
    return named


def _files(path: str | Path) -> list[str]:
    """The files that a path names: itself, those of a folder, or those of a pattern."""
    if Path(path).is_dir():
        found = [str(each) for each in sorted(image_files(Path(path)))]
        if not found:
            raise InputError(f"{path}: there is no image in this folder")
        return found
    return [each for match in _matches(path) for each in _files(match)] or [str(path)]


def _pixels(name: str, value: Any, processor: Any, channels: int) -> tuple[Tensor | None, str]:
    """What the model takes of an image (channels, height, width), or what is wrong with it."""
    try:
        image = decode(value, channels)
    except InputError as error:
        return None, f"{name} {error}"
    try:
        return pixel_values_of(processor, image, name), ""
    except InputError as error:
        return None, str(error)
