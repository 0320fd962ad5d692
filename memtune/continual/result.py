"""What a class-incremental run measured: the accuracy matrix, and the published measures made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..drawing import new_figure
from ..errors import MemtuneError


@dataclass
class ContinualResult:
    """The accuracy matrix of a class-incremental run, and what papers report of it.

    In the formulas, `R[i][j]` is the accuracy on the test images of task j after training task i, predicted among the
    classes of tasks 0 to i; `n` is the number of tasks trained so far. All figures are shares, not per cent.

    "CODA" is https://arxiv.org/abs/2211.13218 and its code (https://github.com/GT-RIPL/CODA-Prompt, commit 6417d4f).

    Attributes:
        accuracy_matrix: R, a row for each trained task i, with the entries j = 0 to i.
        classes: The class indices of each task of the sequence, in order.
        eval_images: Number of test images of each task of the sequence.
        histories: The training history of each trained task (see `memtune.training.TrainingResult`).
        seconds: Training and evaluation of all trained tasks, over all calls where the run was resumed.
    """

    accuracy_matrix: list[list[float]] = field(default_factory=list)
    classes: list[list[int]] = field(default_factory=list)
    eval_images: list[int] = field(default_factory=list)
    histories: list[list[dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tasks_done(self) -> int:
        """Number of tasks trained so far, n."""
        return len(self.accuracy_matrix)

    @property
    def average_accuracy(self) -> float:
        """A_N, the final average accuracy: `sum_j R[n-1][j] / n`, each task with equal weight.

        Source: CODA. Others call it FAA, "last accuracy" or "average accuracy".
        """
        return self.average_accuracies[-1]

    @property
    def average_accuracies(self) -> list[float]:
        """A_N after each task: `sum_{j<=i} R[i][j] / (i + 1)` for each i."""
        return [fmean(row) for row in self._rows()]

    @property
    def incremental_accuracy(self) -> float:
        """The mean over the stages of A_N: `sum_i A_i / n`.

        Source: "cumulative average accuracy" (CAA) or "Inc-Acc" of prompt papers after CODA.
        """
        return fmean(self.average_accuracies)

    @property
    def image_accuracies(self) -> list[float]:
        """After each task i, the accuracy over all test images of tasks 0 to i, each image with equal weight.

        Source: A_b of PILOT (https://github.com/LAMDA-CL/LAMDA-PILOT), which reports its last value as "last" and its
        mean as "average accuracy". It equals `average_accuracies` where tasks have equally many test images.
        """
        rows = self._rows()
        return [
            sum(value * count for value, count in zip(row, self.eval_images, strict=False))
            / sum(self.eval_images[: len(row)])
            for row in rows
        ]

    @property
    def forgetting_per_step(self) -> float:
        """F_N as CODA's code has it: the mean drop from one task to the next, small by construction.

        `1/(n-1) sum_{i>=1} 1/i sum_{j<i} (R[i-1][j] - R[i][j])`; 0 for a single task. Source: `calc_forgetting` of
        CODA's code; its tables hold this one.
        """
        rows = self._rows()
        drops = [
            fmean(before - after for before, after in zip(rows[i - 1], rows[i], strict=False))
            for i in range(1, len(rows))
        ]
        return fmean(drops) if drops else 0.0

    @property
    def forgetting_since_learned(self) -> float:
        """F_N as the same authors write it: the drop from the accuracy right after a task was learnt, over all stages.

        `1/(n-1) sum_{i>=1} sum_{j<i} |T_j| / |T_0..i| (R[j][j] - R[i][j])`, with |T| a number of classes; 0 for a
        single task. Source: https://arxiv.org/abs/2203.17269.
        """
        rows, sizes = self._rows(), [len(classes) for classes in self.classes]
        drops = [
            sum(sizes[j] * (rows[j][j] - rows[i][j]) for j in range(i)) / sum(sizes[: i + 1])
            for i in range(1, len(rows))
        ]
        return fmean(drops) if drops else 0.0

    @property
    def forgetting_from_peak(self) -> float:
        """The classical measure: how far the tasks before the last one lie below their best accuracy at the end.

        `1/(n-1) sum_{j<n-1} (max_i R[i][j] - R[n-1][j])`; 0 for a single task. Source: Chaudhry et al.,
        https://arxiv.org/abs/1801.10112, with the last stage among those of the maximum, as PILOT has it, so that it is
        never negative.
        """
        rows = self._rows()
        drops = [max(row[j] for row in rows[j:]) - rows[-1][j] for j in range(len(rows) - 1)]
        return fmean(drops) if drops else 0.0

    def metrics(self) -> dict[str, float]:
        """All measures by name."""
        return {
            "average_accuracy": self.average_accuracy,
            "incremental_accuracy": self.incremental_accuracy,
            "image_accuracy": self.image_accuracies[-1],
            "forgetting_per_step": self.forgetting_per_step,
            "forgetting_since_learned": self.forgetting_since_learned,
            "forgetting_from_peak": self.forgetting_from_peak,
        }

    def plot(self, path: str | Path) -> None:
        """Draw the accuracy matrix and the average accuracy after each task.

        Args:
            path: The picture's file; its ending says the format (.png, .svg, .pdf).

        Raises:
            MemtuneError: No task has been trained, or matplotlib is not installed.
        """
        rows = self._rows()
        figure = new_figure(figsize=(10, 4.2))
        left, right = figure.subplots(1, 2)
        _draw_matrix(left, rows)
        tasks = range(1, len(rows) + 1)
        right.plot(tasks, [100 * value for value in self.average_accuracies], marker="o")
        right.set(xlabel="tasks trained", ylabel="average accuracy, %", xticks=tasks, ylim=(0, 100))
        right.grid(alpha=0.3)
        figure.savefig(path)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ContinualResult:
        """Read what `to_dict` gave.

        Raises:
            TypeError: It is none of that.
        """
        result = cls(**values)
        rows = result.accuracy_matrix
        right = [
            all(map(_is_list_of_numbers, [*rows, *result.classes, result.eval_images, [result.seconds]])),
            all(len(row) == number + 1 for number, row in enumerate(rows)),
            len(rows) == len(result.histories) <= len(result.classes) == len(result.eval_images),
            all(isinstance(entry, dict) for history in result.histories for entry in history),
        ]
        if not all(right):
            raise TypeError(f"no result of a run: {str(values)[:200]}")
        return result

    def _rows(self) -> list[list[float]]:
        if not self.accuracy_matrix:
            raise MemtuneError("no task has been trained yet, so there is nothing to measure")
        return self.accuracy_matrix


def _is_list_of_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def _draw_matrix(axes: Any, rows: Sequence[Sequence[float]]) -> None:
    """The matrix in per cent as a heat map on matplotlib's axes, a row for each stage."""
    count = len(rows)
    cells = [[100 * value for value in row] + [float("nan")] * (count - len(row)) for row in rows]
    image = axes.imshow(cells, vmin=0, vmax=100, cmap="viridis")
    numbers = range(count)
    for i, row in enumerate(cells):
        for j, value in enumerate(row[: i + 1]):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="black" if value > 60 else "white")
    axes.set(xlabel="accuracy on task, %", ylabel="after task", xticks=numbers, yticks=numbers)
    axes.set_xticklabels([each + 1 for each in numbers])
    axes.set_yticklabels([each + 1 for each in numbers])
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
