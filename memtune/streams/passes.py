"""What travels with one pass over a batch of images, from block to block and from the trunk to the streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..backbones import Block


class KeysValues(NamedTuple):
    """Further keys and values of a block: (1 or rows, 1 or tasks, heads, number, head width) each.

    A row is an image; `tasks` counts the task tokens of a stream, and is 1 in unmasked mode. `present` (1 or rows, 1 or
    tasks, number) is False where a task with fewer than others has none; None if all are there.
    """

    key: Tensor
    value: Tensor
    present: Tensor | None = None


KeyValueSource = Callable[[Block, "Pass"], KeysValues]
"""Gives a block's further keys and values, made from the block, the query of the pass, or neither."""


class TrunkUpdate(Protocol):
    """How the trunk's keys and values look to task tokens: K' and V', linear in K and V with all heads side by side.

    Neither is ever made: only queries that get from K what K' has more, and what V' has more of a context.
    """

    def queries(self, query: Tensor) -> Tensor | None:
        """Queries y on K that give what K' has more: y K^T = x (K' - K)^T.

        Args:
            query: x, (rows, heads, tasks, width): for each head and task a query on K with all heads side by side.

        Returns:
            The same shape, or None if K' is K.
        """
        ...

    def context(self, context: Tensor) -> Tensor | None:
        """What V' has more, p (V' - V).

        Args:
            context: p V, (rows, heads, tasks, width): for each head and task what it takes of V with all heads side by
                side.

        Returns:
            The same shape, or None if V' is V. Of it only what is the head's own counts.
        """
        ...


class SideStates(Protocol):
    """States of a few values beside the tokens of the trunk, of each task its own, which its token reads with them."""

    def states(self, trunk: TrunkBlock, current: Pass) -> Tensor:
        """The states (rows, tokens, tasks, r) in this block, made of the trunk's and of those of the block before."""
        ...

    def scores(self, query: Tensor, states: Tensor, tokens: int) -> Tensor:
        """What scaled queries (rows, heads, tasks, head width) score more, (rows, heads, tasks, tokens)."""
        ...

    def context(self, weights: Tensor, states: Tensor) -> Tensor:
        """What weights (rows, heads, tasks, tokens) take more of the values, (rows, heads, tasks, head width)."""
        ...


class Grid(NamedTuple):
    """How the trunk's tokens lie: the class token and registers, then the patches row by row."""

    prefix: int
    height: int
    width: int


class TrunkBlock(NamedTuple):
    """What the task stream reads of one block of the trunk."""

    key: Tensor  # (batch, heads, tokens, head width)
    value: Tensor  # (batch, heads, tokens, head width)
    bias: Tensor | None  # the class token's row of the additive mask, (1 or batch, 1 or heads, 1, tokens)
    grid: Grid | None = None  # of the trunk's own tokens; what earlier tasks add stands behind them

    def to(self, dtype: torch.dtype) -> TrunkBlock:
        """The same with keys and values of another type."""
        return self._replace(key=self.key.to(dtype), value=self.value.to(dtype))

    def images(self, index: Tensor) -> TrunkBlock:
        """The same of some of the images, (number,)."""
        bias = self.bias
        if bias is not None and bias.shape[0] > 1:
            bias = bias.index_select(0, index)
        return TrunkBlock(self.key.index_select(0, index), self.value.index_select(0, index), bias, self.grid)


Substitute = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]
"""Gives other keys, values and mask for those of a block."""


@dataclass
class Pass:
    """One pass over a batch of images: what its attention functions write and read.

    Attributes:
        visited: Indices of the blocks whose attention has run, in order.
        trunk: For each block what the trunk left for the task stream.
        patches: Height and width of the images in patches.
        present: The block of the trunk that a task stream reads, where it goes along with the trunk.
        side: The states beside the trunk, (rows, tokens, tasks, r), that later blocks go on from.
        own_key: Whether a task token sees its own key and value.
        query: The feature of the images by the unadapted backbone, (batch, width), or None if no source asks for it.
        kept: States (batch, tokens, width) that entered blocks of the trunk, by index, where they were to be kept.
        states: The states that an adapted stream starts from at a later block, (rows, tokens, width).
        record: Where a task stream is to leave, for each block, the keys and values of its tokens and of their own.
        weights: Where a stream is to leave, for each block, the attention weights of its task tokens, or of the first
            token of an adapted stream, (rows, heads, tokens, number) each: on the keys that the backbone has, on those
            of a task token itself, and on those of each source.
        side_parts: Where a task stream of one task is to leave, for each block, what part a side network has in all
            that its token takes of the values of the backbone's tokens, by token, (rows, heads, tokens).
        selected: Positions (batch, k) of the tokens that gradients pass through; None for all.
        substitute: Gives the keys, values and mask that the queries of an adapted stream attend to, before those of its
            sources, in place of the block's own; None for the block's own.
    """

    visited: list[int] = field(default_factory=list)
    trunk: list[TrunkBlock] = field(default_factory=list)
    patches: tuple[int, int] | None = None
    present: TrunkBlock | None = None
    side: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    own_key: bool = True
    query: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)
    states: Tensor | None = None
    record: list[list[KeysValues]] | None = None
    weights: list[list[Tensor]] | None = None
    side_parts: list[Tensor] | None = None
    selected: Tensor | None = None
    substitute: Substitute | None = None

    def block(self, index: int) -> TrunkBlock:
        """What the trunk left in a block."""
        return self.trunk[index] if self.present is None else self.present

    def with_keys_values(self, substitute: Substitute) -> Pass:
        """The same pass with other keys and values for the queries of one block."""
        return replace(self, substitute=substitute)


def extended(trunk: TrunkBlock, further: Sequence[KeysValues]) -> TrunkBlock:
    """A block of the trunk, as it looks to a task that also sees the keys and values of all tasks in `further`."""
    for each in further:
        batch = trunk.key.shape[0]
        key, value = (
            part.transpose(1, 2).flatten(2, 3).expand(batch, -1, -1, -1).to(trunk.key.dtype) for part in each[:2]
        )  # (batch, heads, tasks x number, head width)
        bias = trunk.bias
        if bias is None and each.present is not None:
            bias = trunk.key.new_zeros(1, 1, 1, trunk.key.shape[2])
        if bias is not None:
            more = bias.new_zeros(1, key.shape[2])
            if each.present is not None:
                more = more.masked_fill(~each.present.flatten(1), torch.finfo(more.dtype).min)
            rows = max(len(bias), len(more))
            more = more[:, None, None].expand(rows, *bias.shape[1:3], -1)
            bias = torch.cat([bias.expand(rows, -1, -1, -1), more], dim=-1)
        keys, values = torch.cat([trunk.key, key], dim=2), torch.cat([trunk.value, value], dim=2)
        trunk = TrunkBlock(keys, values, bias, trunk.grid)
    return trunk
