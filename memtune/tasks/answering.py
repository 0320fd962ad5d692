"""One pass over images for a choice of tasks: the trunk, and of each lane what is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..streams import Pass
from .arrangement import Arrangement
from .lanes import Batch, Lane, outside_graphs


@dataclass
class _Share:
    """What a pass asks of one lane.

    Attributes:
        lane: The lane.
        names: The tasks; where each image has its own, one for each of `places`.
        places: The images that have one of the lane's tasks as their own; None where all images ask for all of `names`.
        images: The same as a tensor, or None for all images.
    """

    lane: Lane
    names: list[str]
    places: list[int] | None = None
    images: Tensor | None = None


@torch.no_grad()
@outside_graphs
def answer_all(
    arrangement: Arrangement, pixel_values: Tensor, names: Sequence[str], *, interpolate: bool, base: bool
) -> tuple[dict[str, Tensor], Any]:
    """The logits (batch, classes), or features, of some tasks by name; and the backbone's own output, if `base`."""
    lanes = arrangement.lanes
    shares = [_Share(lane, own) for lane in lanes if (own := [name for name in names if name in lane.numbers])]
    batch, output = _run_trunk(arrangement, shares, pixel_values, interpolate, base)
    answers: dict[str, Tensor] = {}
    for share in shares:
        answers |= share.lane.all(batch, share.names)
    return answers, output


@torch.no_grad()
@outside_graphs
def answer_each(
    arrangement: Arrangement, pixel_values: Tensor, names: Sequence[str], *, interpolate: bool, base: bool
) -> tuple[list[Tensor], Any]:
    """The logits (1, classes), or features, of each image by its own task; and the backbone's own output, if `base`."""
    shares = []
    for lane in arrangement.lanes:
        if places := [place for place, name in enumerate(names) if name in lane.numbers]:
            images = None if len(places) == len(names) else torch.tensor(places, device=pixel_values.device)
            shares.append(_Share(lane, [names[place] for place in places], places, images))
    batch, output = _run_trunk(arrangement, shares, pixel_values, interpolate, base)
    answers: dict[int, Tensor] = {}
    for share in shares:
        assert share.places is not None
        own = batch if share.images is None else batch.images(share.images)
        answers |= zip(share.places, share.lane.each(own, share.names), strict=True)
    return [answers[place] for place in range(len(names))], output


@outside_graphs
def _run_trunk(
    arrangement: Arrangement, shares: Sequence[_Share], pixel_values: Tensor, interpolate: bool, base: bool
) -> tuple[Batch, Any]:
    """Run the trunk as far as it is asked for, with the streams that can go along with it."""
    needed = arrangement.backbone.depth if base else max((share.lane.needed_blocks for share in shares), default=0)
    if not needed:
        return Batch(Pass(), pixel_values, interpolate), None
    trunk, followers = arrangement.trunk_until(needed), {}
    for share in shares:
        follower = share.lane.follow(
            share.names, by_row=share.places is not None, images=share.images, device=pixel_values.device
        )
        if follower is not None:
            followers[share.lane] = follower
    keep = any(share.lane.reads_trunk and share.lane not in followers for share in shares)
    with trunk.followers.along(list(followers.values()), keep=keep):
        run = trunk.answer if base else trunk.run
        current, output = run(pixel_values, interpolate_pos_encoding=interpolate)
    found = {lane: follower.features() for lane, follower in followers.items()}
    followed = {lane: features for lane, features in found.items() if features is not None}
    return Batch(current, pixel_values, interpolate, followed), output if base else None
