import numpy as np
import pytest
from transformers import EvalPrediction

from memtune.evaluation.metrics import Accuracy, compute_metrics


def test_accuracy_is_the_share_of_right_answers():
    assert Accuracy().compute(predictions=[0, 1, 2, 2], references=[0, 1, 2, 1]) == {"accuracy": 0.75}


def test_accuracy_adds_up_over_batches():
    accuracy = Accuracy()
    accuracy.add_batch(predictions=[0, 0, 0], references=[0, 1, 1])
    accuracy.add_batch(predictions=[5], references=[5])
    assert accuracy.compute() == {"accuracy": 0.5}


@pytest.mark.parametrize("wrapped", [False, True])
def test_compute_metrics_takes_the_logits_of_a_trainer(wrapped):
    logits = np.array([[0.1, 0.9], [0.8, 0.2]])
    prediction = EvalPrediction((logits,) if wrapped else logits, np.array([1, 1]))
    assert compute_metrics(prediction) == {"accuracy": 0.5}
