"""What is measured of answers, by what the labels are; accuracy as a class of `evaluate` that needs no download."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..errors import MemtuneError
from ..tasks import MultiLabel, Objective, Regression


class Accuracy(evaluate.Metric):
    """The share of predictions that are right. `compute(predictions=, references=)` takes class indices."""

    def __init__(self, *, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        integer = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="The share of predictions that are right.",
            citation="",
            inputs_description="predictions and references: class indices",
            features=datasets.Features({"predictions": integer, "references": integer}),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The accuracy of logits (images, classes), in the form that `transformers.Trainer` asks for."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    result = Accuracy().compute(predictions=np.argmax(logits, axis=-1), references=prediction.label_ids)
    assert result is not None
    return result


def check_metrics(objective: Objective, *, report: bool = False) -> None:
    """Raise `MemtuneError` if what is measured, or a report, needs a library that is not installed."""
    if (report or isinstance(objective, (MultiLabel, Regression))) and find_spec("sklearn") is None:
        what = "a report" if report else f"to evaluate {objective.problem_type}"
        raise MemtuneError(f"{what} takes scikit-learn: pip install scikit-learn, or 'memtune[metrics]'")


def make_scores(objective: Objective) -> Scores:
    """What collects the answers of an evaluation."""
    check_metrics(objective)
    if isinstance(objective, MultiLabel):
        return _MultiLabelScores(objective)
    return _RegressionScores(objective) if isinstance(objective, Regression) else _SingleLabelScores(objective)


class Scores(ABC):
    """Collects answers, and gives `loss` and what else is measured.

    Args:
        objective: What the labels are.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._losses: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in the logits (batch, outputs) and labels of images, none of which is left out."""
        self._losses.append(self._objective.losses(logits, labels).cpu())
        if len(labels):
            self._keep(logits, labels)

    @property
    def images(self) -> int:
        """How many there were."""
        return sum(map(len, self._losses))

    def compute(self) -> dict[str, float]:
        """The scores, of one image or more."""
        return {**self._measure(), "loss": torch.cat(self._losses).mean().item()}

    @abstractmethod
    def _keep(self, logits: Tensor, labels: Tensor) -> None:
        """Keep what is needed of them."""

    @abstractmethod
    def _measure(self) -> dict[str, float]:
        """The scores but the loss."""


class _SingleLabelScores(Scores):
    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self._accuracy = Accuracy()

    def _keep(self, logits: Tensor, labels: Tensor) -> None:
        self._accuracy.add_batch(predictions=logits.argmax(dim=-1).cpu(), references=labels.cpu())

    def _measure(self) -> dict[str, float]:
        scores = self._accuracy.compute()
        assert scores is not None
        return {"accuracy": scores["accuracy"]}


class _WholeScores(Scores):
    """Those that need all answers at once."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []

    def _keep(self, logits: Tensor, labels: Tensor) -> None:
        self._scores.append(self._objective.scores(logits).cpu())
        self._labels.append(labels.reshape(logits.shape).cpu())

    def _whole(self) -> tuple[np.ndarray, np.ndarray]:
        return torch.cat(self._scores).numpy(), torch.cat(self._labels).numpy()


class _MultiLabelScores(_WholeScores):
    def _measure(self) -> dict[str, float]:
        """A class is answered from a probability of 0.5, and is in an image from a share of 0.5."""
        from sklearn.metrics import average_precision_score, f1_score

        scores, labels = self._whole()
        true, answered = labels >= 0.5, scores >= 0.5
        there = true.any(axis=0)  # of a class that no image shows, precision means nothing
        options: Any = {"zero_division": 0}
        found = {"mean_average_precision": 0.0, "f1": 0.0}
        if there.any():
            found["mean_average_precision"] = average_precision_score(true[:, there], scores[:, there])
            found["f1"] = f1_score(true[:, there], answered[:, there], average="macro", **options)
        found["f1_micro"] = f1_score(true, answered, average="micro", **options)
        found["subset_accuracy"] = (true == answered).all(axis=1).mean()
        return {name: float(value) for name, value in found.items()}


class _RegressionScores(_WholeScores):
    def _measure(self) -> dict[str, float]:
        from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

        answers, labels = self._whole()
        return {
            "r2": float(r2_score(labels, answers)) if len(labels) > 1 else 0.0,
            "mse": float(mean_squared_error(labels, answers)),
            "mae": float(mean_absolute_error(labels, answers)),
        }
