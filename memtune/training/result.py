"""How far a training run has come, and what it measured."""

from __future__ import annotations

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
        history: For each epoch `epoch`, `loss`, `learning_rate`, `seconds`, `images_per_second` (of training, over all
            processes), `peak_memory_gb` (1e9 bytes, on a GPU of what torch took there, else of this whole process), and
            what evaluation gave as `eval_...`.
        log_history: For each `logging_steps` steps `step`, `epoch`, `loss` (the mean since the entry before) and
            `learning_rate`.
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

    def plot(self, path: str | Path) -> None:
        """Draw the learning curves: loss by step, and loss and the first score of the evaluations by epoch.

        Args:
            path: The picture's file; its ending says the format (.png, .svg, .pdf).

        Raises:
            MemtuneError: No epoch has ended, or matplotlib is not installed.
        """
        if not self.history:
            raise MemtuneError("there is nothing to draw: no epoch of the run has ended")
        figure = new_figure(figsize=(10, 4.2))
        left, right = figure.subplots(1, 2)
        epochs = [entry["epoch"] for entry in self.history]
        left.plot([e["epoch"] for e in self.log_history], [e["loss"] for e in self.log_history], alpha=0.4)
        left.plot(epochs, [entry["loss"] for entry in self.history], marker="o", color="C0", label="training")
        left.set(xlabel="epochs", ylabel="loss")
        if "eval_loss" in self.history[0]:
            left.plot(epochs, [entry["eval_loss"] for entry in self.history], marker="o", label="evaluation")
            score = next(name for name in self.history[0] if name.startswith("eval_"))
            unit, factor = (", %", 100) if score == "eval_accuracy" else ("", 1)
            right.plot(epochs, [factor * entry[score] for entry in self.history], marker="o", color="C1")
            right.set(xlabel="epochs", ylabel=f"{score.removeprefix('eval_').replace('_', ' ')} in evaluation{unit}")
            right.grid(alpha=0.3)
        else:
            right.axis("off")
        left.legend()
        left.grid(alpha=0.3)
        figure.savefig(path)


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds all of it.

    Attributes:
        step: Steps done.
        batches: Batches of the present epoch that are done.
        order: State, before the present epoch, of the generator that orders the images.
        seconds: Time of the present epoch.
        all_seconds: Time of the run.
        sums: Of the present epoch: losses, images; those of all processes together in a checkpoint.
        log_sums: The same since the last entry of the log.
        history: As in `TrainingResult`.
        log_history: The same.
    """

    step: int = 0
    batches: int = 0
    order: Tensor = field(default_factory=lambda: torch.Generator().get_state())
    seconds: float = 0.0
    all_seconds: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(2))
    log_sums: Tensor = field(default_factory=lambda: torch.zeros(2))
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
