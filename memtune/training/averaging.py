"""Other values of a task than the last ones: their moving average, and those that were best in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import CheckpointError, ConfigError
from ..preparation import TrainingConfig
from ..tasks import Objective, Task

_ERRORS = ("loss", "mse", "mae", "rmse", "error")
"""Scores of which, or of whose last part, less is better."""


class MovingAverage:
    """The exponential moving average of what is trained.

    Args:
        task: The task.
        decay: The share of itself that the average keeps at each step.
    """

    def __init__(self, task: Task, decay: float) -> None:
        self._average: Any = AveragedModel(task, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update(self, task: Task) -> None:
        """Take the task's present values in; at first they are the average."""
        self._average.update_parameters(task)

    def tensors(self) -> dict[str, Tensor]:
        """The average, as `Task.tensors` gives it."""
        return self._average.module.tensors()

    @contextmanager
    def in_place(self, task: Task, whole: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
        """Within this context the task has the average in place of its own values.

        Args:
            task: The task.
            whole: Makes a context within which the task's values can be read and written.
        """
        with whole():
            own = {key: tensor.clone() for key, tensor in task.tensors().items()}
            task.load_tensors(self.tensors())
        try:
            yield
        finally:
            with whole():
                task.load_tensors(own)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"tensors": self.tensors(), "steps": int(self._average.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._average.module.load_tensors(state["tensors"])
        self._average.n_averaged.fill_(state["steps"])


def score_to_compare(config: TrainingConfig, objective: Objective) -> str:
    """The name of the score that evaluations are compared by."""
    return (config.metric_for_best_model or objective.metric).removeprefix("eval_")


def is_better_greater(metric: str, asked: bool | None = None) -> bool:
    """Whether larger values of a score are better: what was asked for, else what its name says."""
    return metric.rpartition("_")[2] not in _ERRORS if asked is None else asked


class BestValues:
    """The values of a task that had the best evaluation so far.

    Attributes:
        tensors: The values, as `Task.tensors` gives them; None before the first evaluation.
        waited: Evaluations since then.
        scores: Those of that evaluation; none before the first.

    Args:
        metric: The score that says so.
        greater_is_better: Whether larger ones are better; None for what its name says.
    """

    def __init__(self, metric: str, *, greater_is_better: bool | None = None) -> None:
        self.tensors: dict[str, Tensor] | None = None
        self.waited = 0
        self._metric = metric
        self._greater = is_better_greater(metric, greater_is_better)
        self.scores: dict[str, float] = {}

    def update(self, scores: dict[str, float], task: Task) -> None:
        """Take an evaluation in, and the task's values if it is the best one.

        Raises:
            ConfigError: It has no such score.
        """
        if self._metric not in scores:
            raise ConfigError(f"metric_for_best_model: got {self._metric!r}, but evaluations give {sorted(scores)}")
        score, best = scores[self._metric], self.scores.get(self._metric)
        better = best is None or (score > best if self._greater else score < best)
        self.waited = 0 if better else self.waited + 1
        if better:
            self.scores = dict(scores)
            self.tensors = {key: tensor.detach().clone() for key, tensor in task.tensors().items()}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"tensors": self.tensors, "waited": self.waited, "scores": self.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: It is none.
        """
        tensors, waited, scores = state["tensors"], state["waited"], state["scores"]
        numbers = isinstance(scores, dict) and all(type(value) in (int, float) for value in scores.values())
        if type(waited) is not int or not numbers or not isinstance(tensors, (dict, type(None))):
            raise CheckpointError(f"the best values so far have waited {str(waited)[:50]}, scores {str(scores)[:100]}")
        self.tensors, self.waited, self.scores = tensors, waited, scores
