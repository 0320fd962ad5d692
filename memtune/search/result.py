"""What a search found: its trials, the best of them, and how that one does on the test images."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..drawing import new_figure
from ..errors import MemtuneError

_SHARES = ("accuracy", "balanced_accuracy", "top5_accuracy", "subset_accuracy")
"""Scores that are shown in per cent."""

_ROWS = 20
"""Trials that the text of a result shows."""


@dataclass
class Trial:
    """One setting that was tried: trained on one part of the training images, measured on the other.

    Attributes:
        number: Its place in the search, from 0 on.
        values: The value of each setting that is searched.
        score: On the images held out, by the search's metric.
        loss: The mean loss on them.
        seconds: Its training and evaluation.
        same_as: The earlier trial with the same values, whose figures these are: nothing was trained again.
    """

    number: int
    values: dict[str, Any]
    score: float
    loss: float
    seconds: float = field(default=0.0, compare=False)
    same_as: int | None = None

    @property
    def accuracy(self) -> float:
        """The score, by its name where an image has one class."""
        return self.score


@dataclass
class FinalRun:
    """The best setting, trained on all training images with one seed.

    Attributes:
        seed: The seed.
        score: On the test images, by the search's metric; None where there are none.
        loss: The mean loss on them.
        seconds: Training and evaluation.
    """

    seed: int
    score: float | None = None
    loss: float | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def accuracy(self) -> float | None:
        """The score, by its name where an image has one class."""
        return self.score


@dataclass
class SweepResult:
    """A search. `str(result)` is a table of it.

    Attributes:
        kinds: For each setting searched how it varies: "choices", "linear" or "log".
        trials: The trials in order.
        finals: The runs with the best setting on all training images.
        metric: The score that trials are compared by.
        greater_is_better: Whether larger ones are better.
    """

    kinds: dict[str, str]
    trials: list[Trial] = field(default_factory=list)
    finals: list[FinalRun] = field(default_factory=list)
    metric: str = "accuracy"
    greater_is_better: bool = True

    @property
    def ranking(self) -> list[Trial]:
        """The trials from the best on: by their score, then by loss, then the earlier one first."""
        sign = -1 if self.greater_is_better else 1
        return sorted(
            self.trials,
            key=lambda each: (sign * each.score, each.loss if math.isfinite(each.loss) else math.inf, each.number),
        )

    @property
    def best(self) -> Trial:
        """The best trial.

        Raises:
            MemtuneError: None has been finished.
        """
        if not self.trials:
            raise MemtuneError("no trial has been finished yet, so there is no best one")
        return self.ranking[0]

    @property
    def test_scores(self) -> list[float]:
        """The score of each final run on the test images."""
        return [run.score for run in self.finals if run.score is not None]

    @property
    def test_score(self) -> float | None:
        """Mean of `test_scores`; None if there are none."""
        return fmean(self.test_scores) if self.test_scores else None

    @property
    def test_accuracy(self) -> float | None:
        """`test_score`, by its name where an image has one class."""
        return self.test_score

    @property
    def test_deviation(self) -> float | None:
        """Standard deviation of `test_scores` (n - 1 in the denominator); None if there are fewer than two."""
        return stdev(self.test_scores) if len(self.test_scores) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values; a loss that is no finite number is None."""
        runs = {"trials": [asdict(each) for each in self.trials], "finals": [asdict(each) for each in self.finals]}
        for each in (*runs["trials"], *runs["finals"]):
            each["loss"] = each["loss"] if each["loss"] is not None and math.isfinite(each["loss"]) else None
        return {
            "best": self.best.number if self.trials else None,
            "best_values": self.best.values if self.trials else None,
            "metric": self.metric,
            "validation_score": self.best.score if self.trials else None,
            "test_score": self.test_score,
            "test_standard_deviation": self.test_deviation,
            "test_runs": len(self.test_scores),
            "kinds": self.kinds,
            **runs,
        }

    def write_table(self, path: str | Path) -> None:
        """Write the trials as a table of comma-separated values, a row for each."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["trial", *self.kinds, self.metric, "loss", "seconds", "same_as"])
            for each in self.trials:
                chosen = [each.values[key] for key in self.kinds]
                values = [value if isinstance(value, (int, float, str)) else json.dumps(value) for value in chosen]
                writer.writerow([each.number, *values, each.score, each.loss, round(each.seconds, 3), each.same_as])

    def plot(self, path: str | Path) -> None:
        """Draw the score of the trials over each setting.

        Args:
            path: The picture's file; its ending says the format (.png, .svg, .pdf).

        Raises:
            MemtuneError: No trial has been finished, or matplotlib is not installed.
        """
        best, columns = self.best, min(3, len(self.kinds))
        rows = math.ceil(len(self.kinds) / columns)
        figure = new_figure(figsize=(4 * columns, 3.2 * rows + 0.3))
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for place, axes in enumerate(grid.flat):
            if place >= len(self.kinds):
                axes.set_axis_off()
                continue
            key = list(self.kinds)[place]
            self._draw(axes, key, best)
            unit = ", %" if self._is_share else ""
            label = f"{self.metric.replace('_', ' ')} on held-out images{unit}"
            axes.set(xlabel=key, ylabel=label if place % columns == 0 else None)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right")
        figure.savefig(path)

    def _draw(self, axes: Any, key: str, best: Trial) -> None:
        """The trials over one setting, on matplotlib's axes."""
        places = [each.values[key] for each in self.trials]
        best_place = best.values[key]
        if self.kinds[key] == "choices":
            names = sorted({_text(value) for value in places}, key=_number_first)
            axes.set_xticks(range(len(names)), names)
            axes.margins(x=0.2)
            places, best_place = [names.index(_text(value)) for value in places], names.index(_text(best_place))
        elif self.kinds[key] == "log":
            axes.set_xscale("log")
            axes.tick_params(axis="x", which="both", labelrotation=45)
        elif all(isinstance(place, int) for place in places):
            axes.locator_params(axis="x", integer=True)
        scale = 100 if self._is_share else 1
        axes.scatter(places, [scale * each.score for each in self.trials], alpha=0.7)
        axes.scatter([best_place], [scale * best.score], marker="*", s=160, color="tab:red", label="best")
        axes.grid(alpha=0.3)

    def __str__(self) -> str:
        shown = self.ranking[:_ROWS]
        header = ["trial", *self.kinds, self.metric, "loss"]
        table = [header] + [
            [str(each.number), *(_text(each.values[key]) for key in self.kinds),
             self._in_words(each.score), f"{each.loss:.4f}"]
            for each in shown
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in table]
        if len(self.trials) > len(shown):
            lines.append(f"... and {len(self.trials) - len(shown)} more")
        return "\n".join([*lines, *self._summary()])

    def _summary(self) -> Sequence[str]:
        if not self.trials:
            return ()
        values = ", ".join(f"{key}={_text(value)}" for key, value in self.best.values.items())
        lines = [f"best: trial {self.best.number} of {len(self.trials)}: {values}"]
        if self.test_score is not None:
            words = self._in_words(self.test_score, self.test_deviation)
            count = len(self.test_scores)
            lines.append(f"test: {words} (mean{' ± standard deviation' * (count > 1)}, n = {count})")
        return lines

    @property
    def _is_share(self) -> bool:
        """Whether the score is shown in per cent."""
        return self.metric in _SHARES

    def _in_words(self, score: float, deviation: float | None = None) -> str:
        """A score for people, with its spread if there is one."""
        values = [score] if deviation is None else [score, deviation]
        if self._is_share:
            return " ± ".join(f"{100 * value:.2f}" for value in values) + " %"
        return " ± ".join(f"{value:.4g}" for value in values)


def _text(value: Any) -> str:
    """A value for people: numbers short, the rest as JSON without quotes around a name."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _number_first(text: str) -> tuple[bool, float, str]:
    """A key that sorts numbers by size and before words."""
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text
