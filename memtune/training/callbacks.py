"""What others can do at each step of a training run."""

from __future__ import annotations

from typing import Any

from ..models import TunedModel


class TrainingCallback:
    """Does something at each step of `memtune.fit`. A subclass overrides what it needs.

    Attributes:
        should_training_stop: Set it, and the run ends after the present step, as if its steps were done; on several
            processes if it is set in one.
    """

    should_training_stop = False

    def on_train_begin(self, model: TunedModel) -> None:
        """Before the first step, once the optimizer has been made."""

    def on_step_begin(self, model: TunedModel) -> None:
        """Before the first forward pass of a step."""

    def on_step_end(self, model: TunedModel) -> None:
        """After the optimizer's step."""

    def on_log(self, model: TunedModel, entry: dict[str, float]) -> None:
        """After an entry of `TrainingResult.log_history`, each `logging_steps` steps."""

    def on_evaluate(self, model: TunedModel, scores: dict[str, float]) -> None:
        """After an evaluation, in all processes."""

    def on_epoch_end(self, model: TunedModel, entry: dict[str, float]) -> None:
        """After an epoch and its evaluation, with the epoch's entry of `TrainingResult.history`."""

    def on_train_end(self, model: TunedModel) -> None:
        """After the last step, also where an exception ended the run."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for a run to go on: tensors, numbers, texts, lists and dictionaries of these."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
