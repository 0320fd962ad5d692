"""How several tasks are arranged over one pass of the trunk: which of them share a lane, and what each starts from.

- tasks of masked mode share one task stream, their tokens side by side;
- tasks of unmasked mode that first change the same block share an adapted stream that starts there, their images one
  after the other;
- a task that only has a head reads the trunk's own feature;
- a task that extends others has a lane of its own;
- tasks without a head, which give features, have lanes of their own, as have those whose heads read the same random
  features; and tasks whose features a method makes without a token share one where they make them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..backbones import Backbone
from ..streams import Pass, Trunk, extended
from .lanes import AdaptedLane, Batch, HeadLane, Lane, MaskedLane
from .task import Task


class Earlier:
    """Earlier tasks that a task extends: it reads what their tokens and memory are made of, as it reads the trunk.

    "Extension" in table 1 of https://arxiv.org/abs/2203.15243; the earlier tasks do not know of the later one.

    Args:
        backbone: The backbone.
        tasks: The earlier tasks, by name.
    """

    def __init__(self, backbone: Backbone, tasks: Mapping[str, Task]) -> None:
        self._lanes = [lane for lane in make_lanes(backbone, tasks) if isinstance(lane, MaskedLane)]

    @torch.no_grad()
    def extend(self, batch: Batch) -> Pass:
        """The pass of the trunk as a task sees it that extends these."""
        trunk = batch.current.trunk
        for lane in self._lanes:
            trunk = [extended(block, further) for block, further in zip(trunk, lane.record(batch), strict=True)]
        return replace(batch.current, trunk=trunk)


def first_changed_block(task: Task, backbone: Backbone) -> int:
    """The first block whose states an unmasked task changes; the backbone's depth if it changes none."""
    changed = [block for adapter in task.adapters for block in adapter.changed_blocks(backbone)]
    if task.class_token is not None or not backbone.starts_later:
        return 0
    return min(changed, default=backbone.depth)


def make_lanes(backbone: Backbone, tasks: Mapping[str, Task]) -> list[Lane]:
    """The lanes for tasks, in the order of computation."""
    groups: dict[Any, dict[str, Task]] = {}
    for name, task in tasks.items():
        first = None if task.masked else first_changed_block(task, backbone)
        own = name if task.extends else None
        groups.setdefault((first, own, task.head is None, task.random_features, _feature(task)), {})[name] = task
    return [_make_lane(backbone, group, first) for (first, *_), group in groups.items()]


def _feature(task: Task) -> tuple[Any, ...]:
    """How a method makes the feature that is the head's; nothing where it is that of a token."""
    return () if task.has_token else tuple(task.configs)


@dataclass(frozen=True)
class Arrangement:
    """What a pass over several tasks runs.

    Attributes:
        trunk: What all of them read: it keeps the states that adapted streams start from.
        lanes: The lanes, in the order of computation.
        tasks: The tasks, by name.
        backbone: The backbone.
    """

    trunk: Trunk
    lanes: list[Lane]
    tasks: dict[str, Task]
    backbone: Backbone
    _short: dict[int, Trunk] = field(default_factory=dict)

    @classmethod
    def of(cls, backbone: Backbone, tasks: Mapping[str, Task], before: Arrangement | None = None) -> Arrangement:
        """The arrangement of tasks.

        Args:
            backbone: The backbone.
            tasks: The tasks, by name.
            before: An arrangement on the backbone that there is already; its trunk is taken if it will do, so that what
                `torch.compile` made of it is not made again.
        """
        lanes = make_lanes(backbone, tasks)
        starts = {lane.shared_blocks for lane in lanes if isinstance(lane, AdaptedLane)} - {0}
        if before is not None and before.trunk.keep_states == starts:
            return cls(before.trunk, lanes, dict(tasks), backbone)
        return cls(Trunk(backbone, keep_states=starts), lanes, dict(tasks), backbone)

    def trunk_until(self, block: int) -> Trunk:
        """A trunk without the blocks from this one on, for a pass that asks neither for these nor for the base."""
        if block == self.backbone.depth:
            return self.trunk
        if block not in self._short:
            starts = [start for start in self.trunk.keep_states if start <= block]
            self._short[block] = Trunk(self.backbone, keep_states=starts, until=block)
        return self._short[block]


def _make_lane(backbone: Backbone, tasks: Mapping[str, Task], first_block: int | None) -> Lane:
    if first_block is None:
        return _masked_lane(backbone, tasks)
    return HeadLane(backbone, tasks) if first_block == backbone.depth else AdaptedLane(backbone, tasks, first_block)


def _masked_lane(backbone: Backbone, tasks: Mapping[str, Task]) -> MaskedLane:
    extends = next(iter(tasks.values())).extends  # whoever extends others is alone
    return MaskedLane(backbone, tasks, Earlier(backbone, extends).extend if extends else None)


def lane_of(backbone: Backbone, task: Task, **options: Any) -> MaskedLane | AdaptedLane:
    """The lane of one task that answers by itself: a task stream, or an adapted stream that runs from images on.

    Args:
        backbone: The backbone.
        task: The task.
        options: Of an adapted stream.
    """
    return _masked_lane(backbone, {"": task}) if task.masked else AdaptedLane(backbone, {"": task}, **options)


def head_lane_of(backbone: Backbone, task: Task) -> HeadLane | None:
    """The lane of one task that only has a head, for passes of the trunk; None for a task that changes something."""
    alone = not task.masked and not task.backbone_head and first_changed_block(task, backbone) == backbone.depth
    return HeadLane(backbone, {"": task}) if alone and backbone.family.attention_function else None
