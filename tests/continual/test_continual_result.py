import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtune.continual.result import ContinualResult
from memtune.errors import MemtuneError

THREE = [[0.9], [0.8, 0.7], [0.6, 0.75, 0.5]]
"""Accuracies of three tasks, whose measures are worked out by hand below."""


def result(matrix, sizes=None, images=None):
    starts, classes = 0, []
    for size in sizes or [10] * len(matrix):
        classes.append(list(range(starts, starts + size)))
        starts += size
    return ContinualResult(matrix, classes, images or [20] * len(matrix), [[]] * len(matrix))


@st.composite
def results(draw):
    count = draw(st.integers(1, 6))
    share = st.floats(0, 1)
    matrix = [draw(st.lists(share, min_size=row, max_size=row)) for row in range(1, count + 1)]
    sizes = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    images = draw(st.lists(st.integers(1, 99), min_size=count, max_size=count))
    return result(matrix, sizes, images)


def test_three_tasks_by_hand():
    measured = result(THREE)
    assert measured.average_accuracies == pytest.approx([0.9, 0.75, 1.85 / 3])
    assert measured.average_accuracy == pytest.approx(1.85 / 3)
    assert measured.incremental_accuracy == pytest.approx((0.9 + 0.75 + 1.85 / 3) / 3)
    # from task 1 to 2: 0.1; from 2 to 3: (0.2 - 0.05) / 2
    assert measured.forgetting_per_step == pytest.approx((0.1 + 0.075) / 2)
    # after task 2: 0.1 / 2; after task 3: (0.3 - 0.05) / 3
    assert measured.forgetting_since_learned == pytest.approx((0.05 + 0.25 / 3) / 2)
    # task 1: 0.9 - 0.6; task 2 is at its peak
    assert measured.forgetting_from_peak == pytest.approx(0.3 / 2)


def test_tasks_of_unequal_sizes_by_hand():
    measured = result(THREE[:2], sizes=[3, 1], images=[30, 10])
    assert measured.image_accuracies == pytest.approx([0.9, (0.8 * 30 + 0.7 * 10) / 40])
    assert measured.forgetting_since_learned == pytest.approx(0.1 * 3 / 4)


@given(results())
def test_measures_are_the_formulas(measured):
    """Against transcriptions with the papers' indices, which start at 1."""
    n = measured.tasks_done
    r = {(i + 1, j + 1): value for i, row in enumerate(measured.accuracy_matrix) for j, value in enumerate(row)}
    size = {j + 1: len(classes) for j, classes in enumerate(measured.classes)}
    images = {j + 1: count for j, count in enumerate(measured.eval_images)}
    assert measured.average_accuracy == pytest.approx(sum(r[n, j] for j in range(1, n + 1)) / n)
    stages = [sum(r[i, j] for j in range(1, i + 1)) / i for i in range(1, n + 1)]
    assert measured.incremental_accuracy == pytest.approx(sum(stages) / n)
    right = sum(r[n, j] * images[j] for j in range(1, n + 1))
    assert measured.image_accuracies[-1] == pytest.approx(right / sum(images.values()))
    per_step = since_learned = from_peak = 0.0
    for t in range(2, n + 1):
        per_step += sum(r[t - 1, j] - r[t, j] for j in range(1, t)) / (t - 1)
        for j in range(1, t):
            since_learned += size[j] / sum(size[k] for k in range(1, t + 1)) * (r[j, j] - r[t, j])
    for j in range(1, n):
        from_peak += max(r[t, j] for t in range(j, n + 1)) - r[n, j]
    last = max(n - 1, 1)
    assert measured.forgetting_per_step == pytest.approx(per_step / last, abs=1e-12)
    assert measured.forgetting_since_learned == pytest.approx(since_learned / last, abs=1e-12)
    assert measured.forgetting_from_peak == pytest.approx(from_peak / last, abs=1e-12)
    assert measured.forgetting_from_peak >= 0


def test_metrics_has_every_measure():
    measured = result(THREE)
    assert measured.metrics() == {
        "average_accuracy": measured.average_accuracy,
        "incremental_accuracy": measured.incremental_accuracy,
        "image_accuracy": measured.image_accuracies[-1],
        "forgetting_per_step": measured.forgetting_per_step,
        "forgetting_since_learned": measured.forgetting_since_learned,
        "forgetting_from_peak": measured.forgetting_from_peak,
    }


@given(results())
def test_json_keeps_a_result_exactly(measured):
    assert ContinualResult.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def test_no_task_no_measures():
    with pytest.raises(MemtuneError, match="no task has been trained yet"):
        ContinualResult().metrics()


def test_a_plot_of_finished_and_of_unfinished_runs(tmp_path):
    for count in (1, 2, 3):
        result(THREE[:count], sizes=[10] * 3).plot(tmp_path / f"{count}.svg")
        drawing = (tmp_path / f"{count}.svg").read_text()
        assert drawing.startswith("<?xml")
        assert "<!-- average accuracy, % -->" in drawing
        assert "<!-- 90 -->" in drawing
        assert ("<!-- 75 -->" in drawing) == (count == 3)


def test_a_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MemtuneError, match="need matplotlib"):
        result(THREE).plot(tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
