"""The heads of a lane's tasks: a product for those of about the same number of classes, so that each costs its own."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..streams import Selection, Stack, linear_per_task

_SMALL = 64
"""Classes up to which it is not worth a product of its own to leave out what pads a head."""

_SPREAD = 1.15
"""How much larger than the smallest of its group a head may be, beyond that."""

uncompiled = torch.compiler.disable(recursive=True)
"""Keeps a function and all that it calls out of what `torch.compile` compiles."""


class StackedHeads:
    """The heads of several tasks, or of one.

    Args:
        heads: The head of each task.
        selection: That of the lane.
    """

    def __init__(self, heads: Sequence[nn.Linear], selection: Selection) -> None:
        sizes: dict[int, list[int]] = {}
        for number, head in enumerate(heads):
            over = max(len(head.weight) / _SMALL, 1)
            sizes.setdefault(math.ceil(math.log(over, _SPREAD)), []).append(number)
        alike = len(sizes) == 1
        self._groups = [_Group(heads, own, selection if alike else Selection()) for own in sizes.values()]
        self._alone = self._groups[0] if alike else None
        self._most = max(len(head.weight) for head in heads)
        self._count = len(heads)
        self._asked = threading.local()

    def begin(self, index: Tensor | None, *, by_row: bool) -> None:
        """Say which tasks the next pass is for (see `Lane.begin`)."""
        if self._alone is not None:
            self._alone.stack.refresh()
            return
        numbers = list(range(self._count)) if index is None else index.tolist()
        self._asked.by_row = by_row
        self._asked.groups = [
            (group, places) for group in self._groups if (places := group.begin(numbers, by_row=by_row)) is not None
        ]

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (batch, tasks, most classes) of features (batch, tasks, width)."""
        return self._of_sizes(features) if self._alone is None else self._alone(features)

    @uncompiled
    def _of_sizes(self, features: Tensor) -> Tensor:
        by_row = self._asked.by_row
        parts = [
            (places, group(features[places] if by_row else features[:, places])) for group, places in self._asked.groups
        ]
        logits = parts[0][1].new_zeros(*features.shape[:2], self._most)
        for places, own in parts:
            if by_row:
                logits[places, :, : own.shape[-1]] = own
            else:
                logits[:, places, : own.shape[-1]] = own
        return logits

    def __iter__(self) -> Iterator[Tensor]:
        """What the heads hold, as it is held."""
        for group in self._groups:
            yield from group.tensors()


class _Group:
    """Heads of about the same number of classes, side by side.

    Args:
        heads: Those of all tasks.
        numbers: The tasks whose heads these are.
        selection: Which of them the next pass is for.
    """

    def __init__(self, heads: Sequence[nn.Linear], numbers: Sequence[int], selection: Selection) -> None:
        self._numbers = {number: place for place, number in enumerate(numbers)}
        self._selection = selection
        self.stack = Stack([heads[number] for number in numbers], selection)
        self._weight, self._bias = self.stack.tensor("weight"), self.stack.tensor("bias")
        self._first = heads[numbers[0]]

    def begin(self, numbers: Sequence[int], *, by_row: bool) -> Tensor | None:
        """Choose those that are asked for; gives the places of their features, or None if none is asked for."""
        places = [place for place, number in enumerate(numbers) if number in self._numbers]
        if not places:
            return None
        own = [self._numbers[numbers[place]] for place in places]
        device = self._first.weight.device
        whole = not by_row and own == list(range(len(self._numbers)))
        self._selection.choose(None if whole else torch.tensor(own, device=device), by_row=by_row)
        self.stack.refresh()
        return torch.tensor(places, device=device)

    def __call__(self, features: Tensor) -> Tensor:
        """Logits of the chosen ones' features."""
        return linear_per_task(features, self._weight(), self._bias())

    def tensors(self) -> list[Tensor]:
        """The stacked weights and biases."""
        alone = self.stack.alone
        return [
            self.stack.entries(name).home() if alone is None else getattr(alone, name) for name in ("weight", "bias")
        ]
