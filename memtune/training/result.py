"""How far a training run has come, and what it measured."""

from __future__ import annotations

import csv
import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..drawing import new_figure
from ..errors import CheckpointError, MemtuneError


@dataclass
class TrainingResult:
    """What a run did.

    Attributes:
        history: For each epoch `epoch`, `loss` (what was minimised), `task_loss` (as evaluations measure it: without
            smoothing, weights and what the methods add), `learning_rate`, `seconds`, `images_per_second` (of training,
            over all processes), `peak_memory_gb` (1e9 bytes, on a GPU of what torch took there, else of this whole
            process), and what evaluation gave as `eval_...`.
        log_history: For each `logging_steps` steps `step`, `epoch`, `loss` (the mean since the entry before),
            `learning_rate` and `grad_norm` (before it is clipped); and for each evaluation between two epochs `step`,
            `epoch` and its `eval_...`.
        steps: Steps of the optimizer.
        scores: What the evaluation's images say of the values that the model has at the end: `accuracy` and `loss`, or
            what else `memtune.evaluate` measures; nothing without an evaluation.
        seconds: The whole run, the filling of a trunk cache included; of a resumed run all its parts.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    log_history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join("  ".join(f"{value:>14}" for value in row) for row in self._rows()) or "no epoch has ended"

    def _repr_html_(self) -> str:
        header, *rows = self._rows() or [["no epoch has ended"]]
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join(f"<tr>{''.join(f'<td>{value}</td>' for value in row)}</tr>" for row in rows)
        return f"<table><tr>{head}</tr>{body}</table>"

    def _rows(self) -> list[list[str]]:
        """The history as a table, its header first."""
        if not self.history:
            return []
        shown = ("epoch", "task_loss", "learning_rate", "seconds")
        names = [name for name in self.history[-1] if name in shown or name.startswith("eval_")]
        return [names, *([f"{entry[name]:.4g}" for name in names] for entry in self.history)]

    def plot(self, path: str | Path) -> None:
        """Draw the learning curves: the same loss of training and evaluation, and the first score of the evaluations.

        Args:
            path: The picture's file; its ending says the format (.png, .svg, .pdf).

        Raises:
            MemtuneError: No epoch has ended, or matplotlib is not installed.
        """
        if not self.history:
            raise MemtuneError("there is nothing to draw: no epoch of the run has ended")
        figure = new_figure(figsize=(10, 4.2))
        left, right = figure.subplots(1, 2)
        epochs, losses = [entry["epoch"] for entry in self.history], [entry["task_loss"] for entry in self.history]
        left.plot(epochs, losses, marker="o", label="training")
        left.set(xlabel="epochs", ylabel="loss")
        if evaluated := [entry for entry in (*self.history, *self.log_history) if "eval_loss" in entry]:
            epochs = [entry["epoch"] for entry in evaluated]
            left.plot(epochs, [entry["eval_loss"] for entry in evaluated], marker="o", label="evaluation")
            score = next(name for name in evaluated[0] if name.startswith("eval_"))
            unit, factor = (", %", 100) if score == "eval_accuracy" else ("", 1)
            right.plot(epochs, [factor * entry[score] for entry in evaluated], marker="o", color="C1")
            right.set(xlabel="epochs", ylabel=f"{score.removeprefix('eval_').replace('_', ' ')} in evaluation{unit}")
            right.grid(alpha=0.3)
        else:
            right.axis("off")
        left.legend()
        left.grid(alpha=0.3)
        figure.savefig(path)

    def to_csv(self, path: str | Path) -> None:
        """Write `history` as a table, a line for each epoch.

        Args:
            path: The file; replaced if it is there.
        """
        names = list(dict.fromkeys(name for entry in self.history for name in entry))
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.history)


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds all of it.

    Attributes:
        step: Steps done.
        batches: Batches of the present epoch that are done.
        order: State, before the present epoch, of the generator that orders the images.
        seconds: Time of the present epoch.
        all_seconds: Time of the run.
        sums: Of the present epoch: losses, images, losses as evaluations measure them; those of all processes together
            in a checkpoint.
        log_sums: The same since the last entry of the log.
        history: As in `TrainingResult`.
        log_history: The same.
    """

    step: int = 0
    batches: int = 0
    order: Tensor = field(default_factory=lambda: torch.Generator().get_state())
    seconds: float = 0.0
    all_seconds: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3))
    log_sums: Tensor = field(default_factory=lambda: torch.zeros(3))
    history: list[dict[str, float]] = field(default_factory=list)
    log_history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: Any) -> Progress:
        """Take up what a checkpoint holds.

        Raises:
            CheckpointError: It is no progress of a run.
        """
        fresh = vars(cls())
        if not isinstance(state, dict) or not {"step", "batches", "order"} <= state.keys() <= fresh.keys():
            raise CheckpointError(f"the run's progress is {str(state)[:200]}, expected {', '.join(fresh)}")
        for name, value in state.items():
            right, like = type(value) is type(fresh[name]), fresh[name]
            if right and isinstance(like, Tensor):
                right = value.shape == like.shape and value.dtype == like.dtype
            elif right and isinstance(like, list):
                right = all(isinstance(entry, dict) and _are_numbers(entry) for entry in value)
            elif right:
                right = value >= 0
            if not right:
                raise CheckpointError(f"the run's progress has {name} {str(value)[:100]}, which no run has")
        return cls(**state)

    def result(self) -> TrainingResult:
        """What was measured so far."""
        return TrainingResult(self.history, self.log_history, self.step, self.all_seconds)


def _are_numbers(entry: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) and type(value) in (int, float) for name, value in entry.items())
