"""Lanes: a stream for one task or for several, with the tasks' heads at its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backbones import Backbone
from ..streams import (
    AdaptedStream,
    Follower,
    KeysValues,
    Pass,
    Selection,
    Stack,
    StateStream,
    Stream,
    TaskStream,
)
from .heads import RandomFeatureHead
from .stacked_heads import StackedHeads, uncompiled
from .task import Task

outside_graphs = torch.compiler.disable(recursive=False)
"""Keeps the names of tasks out of what `torch.compile` compiles: it would compile again for each choice of them."""


@dataclass
class Batch:
    """Images, and what one pass of the trunk knows of them.

    Attributes:
        current: The pass: a new one, or one that the trunk has filled.
        pixel_values: The images, (batch, channels, height, width); None where the pass of the trunk is all there is.
        interpolate: Whether positions are interpolated.
        followed: The features of lanes that went along with the trunk.
    """

    current: Pass
    pixel_values: Tensor | None = None
    interpolate: bool = False
    followed: Mapping[Lane, Tensor] = field(default_factory=dict)

    def images(self, index: Tensor) -> Batch:
        """The same for some of the images, (number,)."""
        current = self.current
        return Batch(
            Pass(
                trunk=[block.images(index) for block in current.trunk],
                query=None if current.query is None else current.query.index_select(0, index),
                kept={block: states.index_select(0, index) for block, states in current.kept.items()},
            ),
            None if self.pixel_values is None else self.pixel_values.index_select(0, index),
            self.interpolate,
            self.followed,
        )


class Lane(ABC):
    """A stream for one task or for several.

    Attributes:
        kind: What `plan` calls it.
        reads_trunk: Whether it reads the trunk's keys and values.
        names: The names of the tasks.
        numbers: For each name the task's number.
        shared_blocks: Blocks of the backbone that the tasks share with it.
        needed_blocks: Blocks of the trunk that it reads, counted from the first.

    Args:
        tasks: The tasks, by name.
        selection: That of the stream.
        stream: The stream; None for tasks that change nothing.
    """

    kind: ClassVar[str]
    reads_trunk: ClassVar[bool] = False

    def __init__(self, tasks: Mapping[str, Task], selection: Selection, stream: Stream | None) -> None:
        self.names = list(tasks)
        self.numbers = {name: number for number, name in enumerate(tasks)}
        self.selection = selection
        self.shared_blocks = 0
        self.needed_blocks = 0
        self._stream = stream
        self._stacks: list[Stack] = []
        parts = list(tasks.values())
        if stream is not None:
            attach(parts, stream)
        self._classes = [len(task.labels) or None for task in parts]  # None for a whole feature
        own = [task.head for task in parts if task.head is not None]
        self._heads = StackedHeads(own, selection) if len(own) == len(parts) else None
        first = parts[0].head  # all read the same random features, or none do
        self._expansion = first if isinstance(first, RandomFeatureHead) else None

    def _stack(self, parts: Sequence[Any]) -> Stack:
        stack = Stack(parts, self.selection)
        self._stacks.append(stack)
        return stack

    @uncompiled
    def begin(self, index: Tensor | None = None, *, by_row: bool = False) -> None:
        """Say which of several tasks the next pass is for; a lane of one task need not be told.

        Args:
            index: Numbers of the tasks, one for each token or for each image; None for all of them.
            by_row: Whether each image has its own.
        """
        self.selection.choose(index, by_row=by_row)
        if self._heads is not None:
            self._heads.begin(index, by_row=by_row)
        for stack in self._stacks:
            stack.refresh()
        if self._stream is not None:
            self._stream.refresh()

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
    def features(self, batch: Batch) -> Tensor:
        """What the heads read: (batch, tasks, width), or (batch, 1, width) where each image has its own task."""

    def run(self, batch: Batch) -> Tensor:
        """Logits, (batch, tasks, most classes); those beyond a task's own classes mean nothing. Without heads features.

        For the tasks that `begin` was told.
        """
        features = self.features(batch)
        if self._heads is None:
            return features
        return self._heads(features if self._expansion is None else self._expansion.expand(features))

    @outside_graphs
    def all(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """The logits (batch, classes), or features (batch, width), of some of the lane's tasks for all images."""
        assert batch.pixel_values is not None
        self.begin(self._index(names, batch.pixel_values.device, by_row=False))
        logits = self.run(batch)
        return {name: logits[:, place, : self._classes[self.numbers[name]]] for place, name in enumerate(names)}

    @outside_graphs
    def each(self, batch: Batch, names: Sequence[str]) -> list[Tensor]:
        """The logits (1, classes), or features (1, width), of one task for each image."""
        assert batch.pixel_values is not None
        self.begin(self._index(names, batch.pixel_values.device, by_row=True), by_row=True)
        logits = self.run(batch)
        return [logits[image, :, : self._classes[self.numbers[name]]] for image, name in enumerate(names)]

    @outside_graphs
    def _index(self, names: Sequence[str], device: torch.device, *, by_row: bool) -> Tensor | None:
        """The numbers of tasks; None for all of them in their order, for all images."""
        numbers = [self.numbers[name] for name in names]
        whole = not by_row and numbers == list(range(len(self.names)))
        return None if whole else torch.tensor(numbers, device=device)


class HeadLane(Lane):
    """Tasks that change nothing: their heads read the trunk's own feature."""

    kind = "head alone"

    def __init__(self, backbone: Backbone, tasks: Mapping[str, Task]) -> None:
        super().__init__(tasks, Selection(), None)
        self.shared_blocks = self.needed_blocks = backbone.depth

    def features(self, batch: Batch) -> Tensor:
        """The trunk's feature, for each task."""
        assert batch.current.query is not None
        index = self.selection.index
        tasks = len(self.names) if index is None else len(index)
        return batch.current.query.unsqueeze(1).expand(-1, 1 if self.selection.by_row else tasks, -1)


class MaskedLane(Lane):
    """Tasks of masked mode in one task stream.

    Args:
        backbone: The backbone.
        tasks: The tasks, by name.
        extend: Gives the pass as tasks see it that extend others; None for the trunk's own.
    """

    kind = "task stream"
    reads_trunk = True

    def __init__(
        self, backbone: Backbone, tasks: Mapping[str, Task], extend: Callable[[Batch], Pass] | None = None
    ) -> None:
        parts = list(tasks.values())
        self.stream = TaskStream(backbone) if parts[0].has_token else StateStream(backbone)
        super().__init__(tasks, self.stream.selection, self.stream)
        self.shared_blocks = self.needed_blocks = backbone.depth
        self._tokens = self._stack(parts).tensor("class_token") if parts[0].has_token else None
        self._extend = extend

    @outside_graphs
    def follow(
        self, names: Sequence[str], *, by_row: bool, images: Tensor | None, device: torch.device
    ) -> Follower | None:
        """A pass that goes along with the trunk, unless it needs what is known only after the trunk."""
        if self._extend is not None or self.stream.needs_query:
            return None
        self.begin(self._index(names, device, by_row=by_row), by_row=by_row)
        return Follower(self.stream, self._class_tokens(), images)

    def features(self, batch: Batch) -> Tensor:
        """The features of the task tokens."""
        if self in batch.followed:
            return batch.followed[self]
        return self.stream.features(self.extended(batch), self._class_tokens())

    def _class_tokens(self) -> Tensor | None:
        """The class tokens, (1 or images, 1 or tasks, width); None if the tasks have none."""
        return None if self._tokens is None else _in_tokens(self._tokens(), alone=len(self.names) == 1)

    def record(self, batch: Batch) -> list[list[KeysValues]]:
        """For each block the keys and values of all tasks' tokens, and of what is theirs."""
        record: list[list[KeysValues]] = []
        self.begin()
        current = replace(self.extended(batch), record=record, weights=None)
        self.stream.features(current, self._class_tokens())
        return record

    def extended(self, batch: Batch) -> Pass:
        """The pass of the trunk as these tasks see it, with what belongs to those that they extend."""
        return batch.current if self._extend is None else self._extend(batch)


class AdaptedLane(Lane):
    """Tasks of unmasked mode that first change the same block, in one adapted stream.

    Args:
        backbone: The backbone.
        tasks: The tasks, by name.
        first_block: The block at which the stream starts, from the states that the trunk kept; 0 to run from images on.
        options: Further ones of the stream.
    """

    kind = "adapted stream"

    def __init__(self, backbone: Backbone, tasks: Mapping[str, Task], first_block: int = 0, **options: Any) -> None:
        self.stream = AdaptedStream(backbone, first_block=first_block, **options)
        super().__init__(tasks, self.stream.selection, self.stream)
        self.shared_blocks = first_block
        self.needed_blocks = backbone.depth if self.stream.needs_query else first_block
        parts = [None if task.class_token is None else task for task in tasks.values()]
        if any(part is not None for part in parts):
            self._tokens = self._stack(parts).tensor("class_token", neutral=torch.nan)
            self.stream.view.set_class_token(self._class_tokens)

    def _class_tokens(self) -> Tensor:
        """The class tokens, (1 or images, 1, width): the backbone's own for a task without one."""
        tokens = _in_tokens(self._tokens(), alone=len(self.names) == 1)
        if self._tokens.complete:
            return tokens
        own = self.stream.view.class_token
        assert own is not None
        return torch.where(tokens.isnan(), own.view(1, 1, -1).to(tokens.dtype), tokens)

    def features(self, batch: Batch) -> Tensor:
        """Features of the images for each of the tasks: where all images ask for several, from a pass for each."""
        chosen, by_row = self.selection.index, self.selection.by_row
        if len(self.names) == 1 or by_row or (chosen is not None and len(chosen) == 1):
            return self._run(batch).unsqueeze(1)
        assert batch.pixel_values is not None
        index = torch.arange(len(self.names), device=batch.pixel_values.device) if chosen is None else chosen
        features = []
        for number in index.split(1):
            self.selection.choose(number, by_row=False)
            features.append(self._run(batch))
        self.selection.choose(chosen, by_row=False)
        return torch.stack(features, dim=1)

    @outside_graphs
    def all(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """The same as of other lanes, task by task: one pass is compiled, whatever the number of tasks.

        And its products are plain: as rows of one batch each would be as many small ones as there are images.
        """
        answers: dict[str, Tensor] = {}
        for name in names:
            answers |= super().all(batch, [name])
        return answers

    def _run(self, batch: Batch) -> Tensor:
        assert batch.pixel_values is not None
        known, images = batch.current, batch.pixel_values
        current = Pass(query=known.query, weights=known.weights)
        if self.shared_blocks:
            current.states = known.kept[self.shared_blocks]
            images = images[:1]  # which the tower asks for; what follows from them is not used
        return self.stream.features(images, interpolate_pos_encoding=batch.interpolate, current=current)


def _in_tokens(values: Tensor, *, alone: bool) -> Tensor:
    """Class tokens, of one task in whatever shape its backbone has them, in three dimensions."""
    return values.view(1, 1, -1) if alone else values.flatten(2)


def attach(tasks: Sequence[Task], stream: Stream) -> None:
    """Make a stream use the adapters of its tasks."""
    kinds = dict.fromkeys(type(adapter) for task in tasks for adapter in task.adapters)
    for kind in sorted(kinds, key=lambda kind: kind.attached_last):
        own = [[adapter for adapter in task.adapters if type(adapter) is kind] for task in tasks]
        for number in range(max(len(adapters) for adapters in own)):  # a task may have several of one method
            kind.attach(stream, [adapters[number] if number < len(adapters) else None for adapters in own])
        for site in stream.sites:
            site.source_methods += [kind.config_class.method] * (len(site.sources) - len(site.source_methods))
