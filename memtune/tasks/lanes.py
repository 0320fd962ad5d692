"""Lanes: streams for one or more tasks of a multi-task model, with the tasks' heads at their end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..streams import AdaptedStream, Follower, KeysValues, Pass, Selection, Stack, TaskStream, per_task
from .task import Task

eager = torch.compiler.disable(recursive=False)
"""Keeps the names of tasks out of what `torch.compile` compiles: it would compile again for each choice of them."""


@dataclass
class Seen:
    """What one pass of the trunk knows of a batch of images.

    Attributes:
        pixel_values: The images, (batch, channels, height, width).
        current: The pass that the trunk has filled.
        interpolate: Whether positions are interpolated.
        followed: The features of lanes that went along with the trunk.
    """

    pixel_values: Tensor
    current: Pass
    interpolate: bool
    followed: Mapping[Lane, Tensor] = field(default_factory=dict)

    def images(self, index: Tensor) -> Seen:
        """The same for some of the images, (number,)."""
        current = self.current
        return Seen(
            self.pixel_values.index_select(0, index),
            Pass(
                trunk=[block.images(index) for block in current.trunk],
                query=None if current.query is None else current.query.index_select(0, index),
                kept={block: states.index_select(0, index) for block, states in current.kept.items()},
            ),
            self.interpolate,
            self.followed,
        )


class Lane(ABC):
    """A stream for some of the tasks.

    Attributes:
        reads_trunk: Whether it reads the trunk's keys and values.

    Args:
        tasks: The tasks, by name.
        selection: That of the stream.
    """

    reads_trunk = False

    def __init__(self, tasks: Mapping[str, Task], selection: Selection) -> None:
        self.names = list(tasks)
        self.numbers = {name: number for number, name in enumerate(tasks)}
        self.selection = selection
        parts = list(tasks.values())
        self._classes = [len(task.labels) or None for task in parts]  # None for a whole feature
        self._heads: tuple[Tensor, Tensor] | None = None
        if all(task.head is not None for task in parts):
            heads = Stack(parts, self.selection)
            weights = heads.rows(lambda task: task.require_head("tasks").weight.T)  # (tasks, width, classes)
            self._heads = weights, heads.rows(lambda task: task.require_head("tasks").bias)

    def follow(
        self, names: Sequence[str], *, by_row: bool, images: Tensor | None, device: torch.device
    ) -> Follower | None:
        """A pass for some tasks that goes along with the trunk, if the lane can do that.

        Args:
            names: The tasks; where each image has its own, one for each.
            by_row: Whether each image has its own.
            images: The images, (number,); None for all.
            device: Where they are.
        """
        return None

    @abstractmethod
    def features(self, seen: Seen) -> Tensor:
        """What the heads read: (batch, tasks, width), or (batch, 1, width) where each image has its own task."""

    def run(self, seen: Seen, index: Tensor | None, *, by_row: bool) -> Tensor:
        """Logits, (batch, tasks, most classes); those beyond a task's own classes mean nothing. Without heads features.

        Args:
            seen: The images.
            index: Numbers of the tasks, one for each token or for each image; None for all of them.
            by_row: Whether each image has its own.
        """
        self.selection.choose(index, by_row=by_row)
        features = self.features(seen)
        if self._heads is None:
            return features
        weights, biases = self._heads
        return per_task(features.to(weights.dtype), self.selection.spread(weights)) + self.selection.spread(biases)

    @eager
    def all(self, seen: Seen, names: Sequence[str]) -> dict[str, Tensor]:
        """The logits (batch, classes), or features (batch, width), of some of the lane's tasks for all images."""
        logits = self.run(seen, self._index(names, seen.pixel_values.device, by_row=False), by_row=False)
        return {name: logits[:, place, : self._classes[self.numbers[name]]] for place, name in enumerate(names)}

    @eager
    def each(self, seen: Seen, names: Sequence[str]) -> list[Tensor]:
        """The logits (1, classes), or features (1, width), of one task for each image."""
        logits = self.run(seen, self._index(names, seen.pixel_values.device, by_row=True), by_row=True)
        return [logits[row, :, : self._classes[self.numbers[name]]] for row, name in enumerate(names)]

    @eager
    def _index(self, names: Sequence[str], device: torch.device, *, by_row: bool) -> Tensor | None:
        """The numbers of tasks; None for all of them in their order, for all images."""
        numbers = [self.numbers[name] for name in names]
        whole = not by_row and numbers == list(range(len(self.names)))
        return None if whole else torch.tensor(numbers, device=device)


class HeadLane(Lane):
    """Tasks that change nothing: their heads read the trunk's own feature."""

    def features(self, seen: Seen) -> Tensor:
        """The trunk's feature, for each task."""
        assert seen.current.query is not None
        index = self.selection.index
        tasks = len(self.names) if index is None else len(index)
        return seen.current.query.unsqueeze(1).expand(-1, 1 if self.selection.by_row else tasks, -1)


class MaskedLane(Lane):
    """Tasks of masked mode in one task stream.

    Args:
        backbone: The backbone.
        tasks: The tasks, by name; more than one only of stackable methods.
        extend: Gives the pass as tasks see it that extend others; None for the trunk's own.
    """

    reads_trunk = True

    def __init__(
        self, backbone: Backbone, tasks: Mapping[str, Task], extend: Callable[[Seen], Pass] | None = None
    ) -> None:
        self.stream = TaskStream(backbone)
        super().__init__(tasks, self.stream.selection)
        parts = list(tasks.values())
        attach(parts, self.stream)
        self._tokens = Stack(parts, self.selection).rows(lambda task: task.token()[0, 0])  # (tasks, width)
        self._extend = extend

    @eager
    def follow(
        self, names: Sequence[str], *, by_row: bool, images: Tensor | None, device: torch.device
    ) -> Follower | None:
        """A pass that goes along with the trunk, unless it needs what is known only after the trunk."""
        if self._extend is not None or self.stream.needs_query:
            return None
        self.selection.choose(self._index(names, device, by_row=by_row), by_row=by_row)
        return Follower(self.stream, self.selection.spread(self._tokens), images)

    def features(self, seen: Seen) -> Tensor:
        """The features of the task tokens."""
        if self in seen.followed:
            return seen.followed[self]
        return self.stream.features(self._current(seen), self.selection.spread(self._tokens))

    def record(self, seen: Seen) -> list[list[KeysValues]]:
        """For each block the keys and values of all tasks' tokens, and of what is theirs."""
        record: list[list[KeysValues]] = []
        self.selection.choose(None, by_row=False)
        current = replace(self._current(seen), record=record)
        self.stream.features(current, self.selection.spread(self._tokens))
        return record

    def _current(self, seen: Seen) -> Pass:
        return seen.current if self._extend is None else self._extend(seen)


class AdaptedLane(Lane):
    """Tasks of unmasked mode that first change the same block, in one adapted stream.

    Args:
        backbone: The backbone.
        tasks: The tasks, by name; more than one only of stackable methods.
        first_block: The block at which the stream starts.
    """

    def __init__(self, backbone: Backbone, tasks: Mapping[str, Task], first_block: int) -> None:
        self.stream = AdaptedStream(backbone, first_block=first_block)
        super().__init__(tasks, self.stream.selection)
        self.first_block = first_block
        parts = list(tasks.values())
        attach(parts, self.stream)
        self._tokens: Tensor | None = None
        if any(task.class_token is not None for task in parts):
            own = backbone.class_token
            assert own is not None
            tokens = [task.token() if task.class_token is not None else own.view(1, 1, -1) for task in parts]
            self._tokens = torch.cat([token.detach().float() for token in tokens])  # (tasks, 1, width)
            self.stream.view.set_class_token(self._class_tokens)

    def _class_tokens(self) -> Tensor:
        assert self._tokens is not None
        return self.selection.spread(self._tokens).flatten(0, 1)

    def features(self, seen: Seen) -> Tensor:
        """Features of the images for each of the tasks: the rows of one batch, task after task."""
        if self.selection.by_row:
            return self._run(seen, copies=1).unsqueeze(1)
        index, batch = self.selection.index, seen.pixel_values.shape[0]
        if index is None:
            index = torch.arange(len(self.names), device=seen.pixel_values.device)
        self.selection.choose(index.repeat_interleave(batch), by_row=True)
        features = self._run(seen, copies=len(index))
        self.selection.choose(index, by_row=False)
        return features.unflatten(0, (len(index), batch)).transpose(0, 1)

    def _run(self, seen: Seen, copies: int) -> Tensor:
        current = Pass()
        if self.stream.needs_query:
            assert seen.current.query is not None
            current.query = seen.current.query.repeat(copies, 1)
        if self.first_block:
            current.states = seen.current.kept[self.first_block].repeat(copies, 1, 1)
            images = seen.pixel_values[:1]  # which the tower asks for; what follows from them is not used
        else:
            images = seen.pixel_values.repeat(copies, 1, 1, 1)
        return self.stream.features(images, interpolate_pos_encoding=seen.interpolate, current=current)


def attach(tasks: Sequence[Task], stream: AdaptedStream | TaskStream) -> None:
    """Make a stream use the adapters of one task, or of several."""
    if len(tasks) == 1 and not tasks[0].stackable:
        for adapter in tasks[0].adapters:
            adapter.attach(stream)
        return
    for kind in dict.fromkeys(type(adapter) for task in tasks for adapter in task.adapters):
        own = [[adapter for adapter in task.adapters if type(adapter) is kind] for task in tasks]
        for number in range(max(len(adapters) for adapters in own)):  # a task may have several of one method
            kind.attach_stack([_get(adapters, number) for adapters in own], stream)


def _get(adapters: Sequence[Any], number: int) -> Any:
    return adapters[number] if number < len(adapters) else None
