"""Metrics as classes of the `evaluate` library, which need no download."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


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
