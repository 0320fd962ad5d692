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

_ROWS = 20
"""Trials that the text of a result shows."""


@dataclass
class Trial:
    """One setting that was tried: trained on one part of the training images, measured on the other.

    Attributes:
        number: Its place in the search, from 0 on.
        values: The value of each setting that is searched.
        accuracy: On the images held out, a share.
        loss: The mean loss on them.
        seconds: Its training and evaluation.
        same_as: The earlier trial with the same values, whose figures these are: nothing was trained again.
    """

    number: int
    values: dict[str, Any]
    accuracy: float
    loss: float
    seconds: float = field(default=0.0, compare=False)
    same_as: int | None = None


@dataclass
class FinalRun:
    """The best setting, trained on all training images with one seed.

    Attributes:
        seed: The seed.
        accuracy: On the test images, a share; None where there are none.
        loss: The mean loss on them.
        seconds: Training and evaluation.
    """

    seed: int
    accuracy: float | None = None
    loss: float | None = None
    seconds: float = field(default=0.0, compare=False)


@dataclass
class SweepResult:
    """A search. `str(result)` is a table of it.

    Attributes:
        kinds: For each setting searched how it varies: "choices", "linear" or "log".
        trials: The trials in order.
        finals: The runs with the best setting on all training images.
    """

    kinds: dict[str, str]
    trials: list[Trial] = field(default_factory=list)
    finals: list[FinalRun] = field(default_factory=list)

    @property
    def ranking(self) -> list[Trial]:
        """The trials from the best on: by accuracy, then by loss, then the earlier one first."""
        return sorted(
            self.trials,
            key=lambda each: (-each.accuracy, each.loss if math.isfinite(each.loss) else math.inf, each.number),
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
    def test_accuracies(self) -> list[float]:
        """The accuracy of each final run on the test images."""
        return [run.accuracy for run in self.finals if run.accuracy is not None]

    @property
    def test_accuracy(self) -> float | None:
        """Mean of `test_accuracies`; None if there are none."""
        return fmean(self.test_accuracies) if self.test_accuracies else None

    @property
    def test_deviation(self) -> float | None:
        """Standard deviation of `test_accuracies` (n - 1 in the denominator); None if there are fewer than two."""
        return stdev(self.test_accuracies) if len(self.test_accuracies) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values; a loss that is no finite number is None."""
        runs = {"trials": [asdict(each) for each in self.trials], "finals": [asdict(each) for each in self.finals]}
        for each in (*runs["trials"], *runs["finals"]):
            each["loss"] = each["loss"] if each["loss"] is not None and math.isfinite(each["loss"]) else None
        return {
            "best": self.best.number if self.trials else None,
            "best_values": self.best.values if self.trials else None,
            "validation_accuracy": self.best.accuracy if self.trials else None,
            "test_accuracy": self.test_accuracy,
            "test_standard_deviation": self.test_deviation,
            "test_runs": len(self.test_accuracies),
            "kinds": self.kinds,
            **runs,
        }

    def write_table(self, path: str | Path) -> None:
        """Write the trials as a table of comma-separated values, a row for each."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["trial", *self.kinds, "accuracy", "loss", "seconds", "same_as"])
            for each in self.trials:
                chosen = [each.values[key] for key in self.kinds]
                values = [value if isinstance(value, (int, float, str)) else json.dumps(value) for value in chosen]
                writer.writerow([each.number, *values, each.accuracy, each.loss, round(each.seconds, 3), each.same_as])

    def plot(self, path: str | Path) -> None:
        """Draw the accuracy of the trials over each setting.

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
            axes.set(xlabel=key, ylabel="accuracy on held-out images, %" if place % columns == 0 else None)
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
        axes.scatter(places, [100 * each.accuracy for each in self.trials], alpha=0.7)
        axes.scatter([best_place], [100 * best.accuracy], marker="*", s=160, color="tab:red", label="best")
        axes.grid(alpha=0.3)

    def __str__(self) -> str:
        shown = self.ranking[:_ROWS]
        header = ["trial", *self.kinds, "accuracy", "loss"]
        table = [header] + [
            [str(each.number), *(_text(each.values[key]) for key in self.kinds),
             f"{100 * each.accuracy:.2f} %", f"{each.loss:.4f}"]
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
        if self.test_accuracy is not None:
            spread = "" if self.test_deviation is None else f" ± {100 * self.test_deviation:.2f}"
            count = len(self.test_accuracies)
            lines.append(f"test: {100 * self.test_accuracy:.2f}{spread} % (mean{' ± standard deviation' * (count > 1)}"
                         f", n = {count})")  # fmt: skip
        return lines


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
