"""What the labels of a task are, by transformers' `problem_type`: one class of an image, several, or numbers.

An objective knows how labels are put together to a batch, what is wrong with them, their loss, and what logits say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from ..errors import ConfigError, InputError
from .checks import describe_value

IGNORED = -100
"""The label of an image that is left out, in training and in evaluation, as torch's losses leave it out."""

_WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Objective(ABC):
    """What the labels of a task are.

    Attributes:
        problem_type: transformers' name for it.
        metric: The score that evaluations are compared by, unless another one is asked for.
        metrics: All scores that an evaluation gives.
    """

    problem_type: str
    metric: str
    metrics: tuple[str, ...]

    @abstractmethod
    def blank(self, outputs: int) -> Any:
        """The label of an image that is left out, for a head with so many outputs."""

    @abstractmethod
    def stack(self, labels: Sequence[Any], outputs: int) -> Tensor:
        """The labels of a batch as a tensor on the CPU.

        Raises:
            InputError: One is none.
        """

    @abstractmethod
    def check(self, labels: Any, batch: int, outputs: int) -> None:
        """Raise `InputError` unless `labels` are those of a batch.

        On an accelerator their values are left unchecked, as a look at them would wait for the device; `memtune.fit`
        checks them before the batch is moved there.
        """

    @abstractmethod
    def kept(self, labels: Tensor) -> Tensor:
        """Which images of a batch are not left out, (batch,)."""

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each image (batch,) that is not left out, for logits (batch, outputs)."""

    @abstractmethod
    def loss(
        self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """The mean loss of a batch, over the images that are not left out.

        Args:
            logits: Those of the model, (batch, outputs).
            labels: The labels.
            label_smoothing: Share of the target that is spread over all classes; of several classes an image, half of
                it is given to each.
            weights: The weight of each class.
        """

    @abstractmethod
    def scores(self, logits: Tensor) -> Tensor:
        """What is told of logits (..., outputs): probabilities, or the numbers themselves."""


class SingleLabel(Objective):
    """One class of an image: an index, (batch,); cross-entropy."""

    problem_type = "single_label_classification"
    metric = "accuracy"
    metrics = ("accuracy", "loss")

    def blank(self, outputs: int) -> Any:
        """-100."""
        return IGNORED

    def stack(self, labels: Sequence[Any], outputs: int) -> Tensor:
        """Indices, (batch,)."""
        stacked = torch.as_tensor([int(label) for label in labels])
        self._check_range(stacked, outputs)
        return stacked

    def check(self, labels: Any, batch: int, outputs: int) -> None:
        """Expected: whole numbers (batch,), from 0 to below `outputs`, or -100."""
        if not isinstance(labels, Tensor) or labels.dtype not in _WHOLE_NUMBERS or tuple(labels.shape) != (batch,):
            raise InputError(f"labels: got {describe_value(labels)}, expected a tensor of {batch} class indices")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_range(labels, outputs)

    @staticmethod
    def _check_range(labels: Tensor, outputs: int) -> None:
        wrong = labels[((labels < 0) | (labels >= outputs)) & (labels != IGNORED)]
        if wrong.numel():
            raise InputError(
                f"labels: got {sorted(set(wrong.tolist()))}, expected class indices from 0 to {outputs - 1}"
            )

    def kept(self, labels: Tensor) -> Tensor:
        """Those that are not labelled -100."""
        return labels != IGNORED

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(logits, labels, reduction="none")

    def loss(
        self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy; labels may be shares of the classes (batch, classes), too."""
        labels = labels if labels.is_floating_point() else labels.long()
        return cross_entropy(logits, labels, weight=weights, label_smoothing=label_smoothing)

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities, which add up to 1."""
        return logits.softmax(dim=-1)


class _Numbers(Objective):
    """A number for each output of the head, (batch, outputs); of an image that is left out they are NaN."""

    _expected: str

    def blank(self, outputs: int) -> Any:
        """NaN for each output."""
        return (float("nan"),) * outputs

    def stack(self, labels: Sequence[Any], outputs: int) -> Tensor:
        """Numbers, (batch, outputs), float32."""
        stacked = torch.stack([torch.as_tensor(label, dtype=torch.float32).reshape(-1) for label in labels])
        self.check(stacked, len(labels), outputs)
        return stacked

    def check(self, labels: Any, batch: int, outputs: int) -> None:
        """Expected: floats (batch, outputs), or for one output (batch,)."""
        shapes = [(batch, outputs)] + [(batch,)] * (outputs == 1)
        floats = isinstance(labels, Tensor) and labels.is_floating_point()
        if not floats or tuple(labels.shape) not in shapes:
            raise InputError(
                f"labels: got {describe_value(labels)}, expected {self._expected} as floats, ({batch}, {outputs})"
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and (wrong := self._wrong(labels)):
            raise InputError(f"labels: got {wrong}, expected {self._expected}")

    @staticmethod
    @abstractmethod
    def _wrong(labels: Tensor) -> list[float]:
        """Values that no label has."""

    def kept(self, labels: Tensor) -> Tensor:
        """Those without NaN."""
        return ~labels.reshape(len(labels), -1).isnan().any(dim=-1)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the outputs."""
        return self._each(logits, labels.reshape(logits.shape).to(logits.dtype)).mean(dim=-1)

    def loss(
        self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """The mean over images and outputs."""
        labels, kept = labels.reshape(logits.shape).to(logits.dtype), self.kept(labels)
        targets = labels.nan_to_num() * (1 - label_smoothing) + label_smoothing / 2
        each = self._each(logits, targets)
        each = (each if weights is None else each * weights).mean(dim=-1)
        return (each * kept).sum() / kept.sum()

    @staticmethod
    @abstractmethod
    def _each(logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each output, (batch, outputs)."""


class MultiLabel(_Numbers):
    """Any number of classes of an image: of each class its share, mostly 0 or 1; binary cross-entropy."""

    problem_type = "multi_label_classification"
    metric = "mean_average_precision"
    metrics = ("mean_average_precision", "f1", "f1_micro", "subset_accuracy", "loss")
    _expected = "a share from 0 to 1 of each class"

    @staticmethod
    def _wrong(labels: Tensor) -> list[float]:
        return labels[(labels < 0) | (labels > 1)].flatten()[:5].tolist()

    @staticmethod
    def _each(logits: Tensor, labels: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, labels, reduction="none")

    def scores(self, logits: Tensor) -> Tensor:
        """A probability for each class."""
        return logits.sigmoid()


class Regression(_Numbers):
    """Numbers; the squared error."""

    problem_type = "regression"
    metric = "r2"
    metrics = ("r2", "mse", "mae", "loss")
    _expected = "a number for each output"

    @staticmethod
    def _wrong(labels: Tensor) -> list[float]:
        return labels[labels.isinf()].flatten()[:5].tolist()

    def loss(
        self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """The mean over images and outputs; there are no classes to smooth or to weigh."""
        return super().loss(logits, labels)

    @staticmethod
    def _each(logits: Tensor, labels: Tensor) -> Tensor:
        return mse_loss(logits, labels, reduction="none")

    def scores(self, logits: Tensor) -> Tensor:
        """The numbers themselves."""
        return logits


OBJECTIVES: dict[str, Objective] = {each.problem_type: each for each in (SingleLabel(), MultiLabel(), Regression())}
"""Each by its problem type."""


def find_objective(problem_type: Any) -> Objective:
    """The objective of a problem type; None stands for one class an image.

    Raises:
        ConfigError: There is none.
    """
    name = SingleLabel.problem_type if problem_type is None else problem_type
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ConfigError(f"problem_type: got {problem_type!r}, expected one of {sorted(OBJECTIVES)}")
    return OBJECTIVES[name]
