"""What an evaluation found, to be read: by class and pair of classes, how sure answers are, where they err most."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..drawing import as_picture, draw_sheet
from ..errors import MemtuneError
from .pages import draw_confusion, draw_numbers, draw_reliability, page, picture, short, table

_BINS = 15
"""Equal parts of the range of confidences, in which these are compared with accuracies."""

SHOWN_ERRORS = 16
"""So many of the worst errors are drawn."""


@dataclass
class EvaluationReport:
    """What `memtune.evaluate(..., report=True)` found. `print` shows a summary, `save` writes a page with pictures.

    Attributes:
        labels: The task's labels.
        problem_type: What they are, by transformers' name.
        scores: What `memtune.evaluate` gives.
        images: The path of each image, or "image 3" where it has none.
        answers: What was answered, (images, labels): probabilities, or the numbers themselves.
        targets: The right classes, (images,); of several classes an image, or of numbers, (images, labels).
        losses: The loss of each image.
        skipped: The images that were left out, or could not be read.
        pictures: The images with the largest losses as the model saw them, by their places.
    """

    labels: list[str]
    problem_type: str
    scores: dict[str, float]
    images: list[str]
    answers: np.ndarray
    targets: np.ndarray
    losses: np.ndarray
    skipped: list[str] = field(default_factory=list)
    pictures: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def single(self) -> bool:
        """Whether an image has one class."""
        return self.problem_type == "single_label_classification"

    @property
    def numbers(self) -> bool:
        """Whether the labels are numbers."""
        return self.problem_type == "regression"

    @cached_property
    def predicted(self) -> np.ndarray:
        """The class answered, (images,); of several classes an image which are, (images, labels)."""
        return self.answers.argmax(axis=1) if self.single else self.answers if self.numbers else self.answers >= 0.5

    @cached_property
    def confusion(self) -> np.ndarray:
        """How many images of each class (row) were answered with each (column).

        Raises:
            MemtuneError: The images have not one class each.
        """
        if not self.single:
            raise MemtuneError(f"a confusion matrix needs one class an image; this is a report of {self.problem_type}")
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.targets, self.predicted, labels=range(len(self.labels)))

    @cached_property
    def per_class(self) -> list[dict[str, Any]]:
        """Of each class `label`, `precision`, `recall`, `f1`, `images`; of each number `label`, `r2`, `mse`, `mae`."""
        if self.numbers:
            return [_of_numbers(label, self.targets[:, n], self.answers[:, n]) for n, label in enumerate(self.labels)]
        from sklearn.metrics import precision_recall_fscore_support

        true = self.targets if self.single else self.targets >= 0.5
        options: Any = {"labels": range(len(self.labels)), "zero_division": 0}
        found = precision_recall_fscore_support(true, self.predicted, **options)
        rows = zip(self.labels, *(np.asarray(part).tolist() for part in found), strict=True)
        return [
            {"label": label, "precision": precision, "recall": recall, "f1": f1, "images": int(images)}
            for label, precision, recall, f1, images in rows
        ]

    @cached_property
    def summary(self) -> dict[str, float]:
        """The scores; for one class an image also `balanced_accuracy`, `top_5_accuracy`, `macro_f1`, and calibration.

        `calibration_error` is the expected one (Guo et al., 2017, https://arxiv.org/abs/1706.04599), over 15 equal
        parts of the range of confidences; `temperature` what the logits would be divided by for the least
        cross-entropy, and `calibration_error_at_temperature` the error with it.
        """
        if not self.single:
            return dict(self.scores)
        rows = [row for row in self.per_class if row["images"]]
        own = self.answers[np.arange(len(self.targets)), self.targets]
        better = (self.answers > own[:, None]).sum(axis=1)
        temperature = self._temperature()
        return {
            **self.scores,
            "balanced_accuracy": float(np.mean([row["recall"] for row in rows])),
            "macro_f1": float(np.mean([row["f1"] for row in rows])),
            "top_5_accuracy": float((better < 5).mean()),
            "calibration_error": self._calibration_error(self.answers),
            "temperature": temperature,
            "calibration_error_at_temperature": self._calibration_error(self._at(temperature)),
        }

    def _at(self, temperature: float) -> np.ndarray:
        """The probabilities of logits that are divided by a temperature."""
        logits = np.log(np.clip(self.answers, 1e-30, None)) / temperature
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)

    def _temperature(self) -> float:
        """What the logits are best divided by."""
        from scipy.optimize import minimize_scalar

        places = np.arange(len(self.targets))

        def loss(exponent: float) -> float:
            return float(-np.log(np.clip(self._at(math.exp(exponent))[places, self.targets], 1e-30, None)).mean())

        found: Any = minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded")
        return math.exp(float(found.x))

    def _bins(self, answers: np.ndarray) -> list[tuple[float, float, int]]:
        """For each part of the range of confidences that has images: mean confidence, accuracy, number of images."""
        sure, right = answers.max(axis=1), answers.argmax(axis=1) == self.targets
        places = np.clip(np.ceil(sure * _BINS).astype(int) - 1, 0, _BINS - 1)
        chosen = [places == place for place in range(_BINS)]
        return [(float(sure[each].mean()), float(right[each].mean()), int(each.sum())) for each in chosen if each.any()]

    def _calibration_error(self, answers: np.ndarray) -> float:
        bins = self._bins(answers)
        return sum(count * abs(sure - right) for sure, right, count in bins) / len(answers)

    @cached_property
    def confused(self) -> list[tuple[str, str, int]]:
        """The pairs of classes (true, answered) that are confused, with numbers of images, the most first."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")
        pairs = [divmod(int(place), len(self.labels)) for place in order[: int((wrong > 0).sum())]]
        return [(self.labels[row], self.labels[column], int(wrong[row, column])) for row, column in pairs]

    @cached_property
    def worst(self) -> list[int]:
        """The places of the images with the largest losses, of classes those that are answered wrongly."""
        order = np.argsort(-self.losses, kind="stable")
        if self.numbers:
            return order.tolist()
        true = self.targets if self.single else self.targets >= 0.5
        wrong = (self.predicted != true).reshape(len(true), -1).any(axis=1)
        return [int(place) for place in order if wrong[place]]

    def rows(self) -> list[dict[str, Any]]:
        """For each image `image`, what is true, what was answered, and the loss."""
        rows = []
        for place, image in enumerate(self.images):
            true, answered = self._words(place)
            row: dict[str, Any] = {"image": image, "true": true, "answered": answered}
            if self.single:
                row["probability"] = float(self.answers[place].max())
            rows.append(row | {"loss": float(self.losses[place])})
        return rows

    def _words(self, place: int) -> tuple[str, str]:
        """What is true of an image and what was answered, in words."""
        if self.single:
            return self.labels[int(self.targets[place])], self.labels[int(self.predicted[place])]
        both = self.targets[place], self.predicted[place]
        if self.numbers:
            true, answered = (", ".join(f"{value:.6g}" for value in values) for values in both)
        else:
            true, answered = (
                ", ".join(label for label, there in zip(self.labels, values, strict=True) if there >= 0.5)
                for values in both
            )
        return true, answered

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values, without the single images."""
        values = {"images": len(self.images), "skipped": self.skipped, "scores": self.summary}
        values |= {"classes": self.per_class}
        return values | ({"confusion": self.confusion.tolist()} if self.single else {})

    def __str__(self) -> str:
        lines = [f"{len(self.images)} images" + (f", {len(self.skipped)} left out" if self.skipped else "")]
        lines += [f"{name.replace('_', ' '):34} {value:.4f}" for name, value in self.summary.items()]
        names = [name for name in self.per_class[0] if name != "label"]
        width = max(5, *(len(row["label"]) for row in self.per_class))
        lines += ["", f"{'label':{width}}" + "".join(f"{name:>10}" for name in names)]
        for row in self.per_class:
            lines.append(f"{row['label']:{width}}" + "".join(f"{short(row[name]):>10}" for name in names))
        if self.single and self.confused:
            lines += ["", "most often confused (true, answered, images):"]
            lines += [f"  {true} as {answered}: {count}" for true, answered, count in self.confused[:5]]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        scores = table((), [(name.replace("_", " "), value) for name, value in self.summary.items()])
        return scores + table(list(self.per_class[0]), [list(row.values()) for row in self.per_class])

    def save(self, folder: str | Path) -> None:
        """Write `report.html`, a page with all figures and pictures in one file; `report.json`; `predictions.csv`.

        Args:
            folder: Where to; made if it is not there, files of these names are replaced.

        Raises:
            MemtuneError: matplotlib is not installed, or nothing can be written there.
        """
        folder = Path(folder)
        text, rows = self._page(), self.rows()  # all of it is made before anything is written
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.html").write_text(text, encoding="utf-8")
            (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise MemtuneError(f"the report cannot be written to {folder}: {error}") from error

    def _page(self) -> str:
        parts = [f"<p>{len(self.images):,} images.</p>", self._repr_html_()]
        if self.skipped:
            parts.append(f"<p>Left out: {html.escape(', '.join(self.skipped[:20]))}</p>")
        if self.single:
            parts.append(picture("Confusion matrix", draw_confusion(self.confusion, self.labels)))
            if self.confused:
                parts.append("<h2>Most often confused</h2>")
                parts.append(table(("true", "answered", "images"), self.confused[:30]))
            parts.append(picture("Reliability", draw_reliability(self._bins(self.answers))))
        if self.numbers:
            parts.append(picture("Answered over true", draw_numbers(self.targets, self.answers, self.labels)))
        if self.pictures:
            parts.append(picture("Worst errors: what is true, and what was answered", self._draw_worst()))
        return page("Evaluation", parts)

    def _draw_worst(self) -> bytes:
        shown = [place for place in self.worst if place in self.pictures]
        words = [(Path(self.images[place]).name, *self._words(place)) for place in shown]
        captions = [f"{name}\ntrue: {true}\nanswered: {answered}" for name, true, answered in words]
        file = io.BytesIO()
        draw_sheet([(as_picture(self.pictures[each]), text) for each, text in zip(shown, captions, strict=True)], file)
        return file.getvalue()


def _of_numbers(label: str, true: np.ndarray, answered: np.ndarray) -> dict[str, Any]:
    errors, spread = answered - true, float(((true - true.mean()) ** 2).sum())
    r2 = 1 - float((errors**2).sum()) / spread if spread else 0.0
    return {"label": label, "r2": r2, "mse": float((errors**2).mean()), "mae": float(np.abs(errors).mean())}
