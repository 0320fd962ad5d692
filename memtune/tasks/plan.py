"""What a multi-task model shares between its tasks, and what it costs in multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from ..backbones import Backbone
from ..streams import Trunk
from .lanes import Batch, Lane


@dataclass(frozen=True)
class PlannedLane:
    """Tasks that run together.

    Attributes:
        tasks: Their names.
        stream: "task stream" (masked), "adapted stream" (unmasked), or "head alone".
        shared_blocks: Blocks of the backbone that the tasks share with it: all of them for a task stream, which reads
            the trunk; those before the first changed one for an adapted stream.
        multiply_adds: What the tasks together add to a pass over one image.
    """

    tasks: tuple[str, ...]
    stream: str
    shared_blocks: int
    multiply_adds: int


@dataclass(frozen=True)
class Plan:
    """How a multi-task model answers; as a string, a table.

    Attributes:
        backbone: The name of the backbone's class.
        blocks: Its number of blocks.
        multiply_adds: Those of the backbone's own pass over one image.
        lanes: What runs beside it.
    """

    backbone: str
    blocks: int
    multiply_adds: int
    lanes: tuple[PlannedLane, ...]

    @property
    def total(self) -> int:
        """The multiply-adds of a pass over one image that answers every task."""
        return self.multiply_adds + sum(lane.multiply_adds for lane in self.lanes)

    def __str__(self) -> str:
        rows = [f"{self.backbone}, {self.blocks} blocks: {self.multiply_adds / 1e6:,.1f} M multiply-adds an image"]
        for lane in self.lanes:
            share = 100 * lane.multiply_adds / self.multiply_adds
            rows.append(
                f"  {lane.stream}, sharing {lane.shared_blocks} of {self.blocks} blocks: {_names(lane.tasks)}; "
                f"+ {lane.multiply_adds / 1e6:,.1f} M ({share:.2f} %, {share / len(lane.tasks):.2f} % a task)"
            )
        rows.append(f"all: {self.total / 1e6:,.1f} M, {self.total / self.multiply_adds:.3f} of the backbone's own")
        return "\n".join(rows)


def _names(tasks: Sequence[str], most: int = 6) -> str:
    more = len(tasks) - most
    return ", ".join(tasks[:most]) + (f" and {more} more" if more > 0 else "")


@torch.no_grad()
def make_plan(trunk: Trunk, lanes: Sequence[Lane]) -> Plan:
    """Count what a pass over one blank image takes.

    Args:
        trunk: The trunk of the lanes.
        lanes: The lanes of all tasks.
    """
    backbone: Backbone = trunk.view
    model = backbone.model
    image = torch.zeros(1, backbone.channels, *backbone.image_size, dtype=model.dtype, device=model.device)
    current, _ = trunk.answer(image)
    batch = Batch(current, image)
    own = _count(lambda: trunk.answer(image))
    planned = [_plan_lane(lane, batch) for lane in lanes]
    return Plan(type(model).__name__, backbone.depth, own, tuple(planned))


def _plan_lane(lane: Lane, batch: Batch) -> PlannedLane:
    lane.begin()
    lane.run(batch)  # which makes what is kept
    return PlannedLane(tuple(lane.names), lane.kind, lane.shared_blocks, _count(lambda: lane.run(batch)))


def _count(function: Callable[[], Any]) -> int:
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        function()
    return counter.get_total_flops() // 2


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop(query, key, value)
