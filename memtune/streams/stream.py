"""What the streams of both modes have: a view of the backbone that one task or several are attached to."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..backbones import Backbone, Block
from .attention import Site
from .passes import Pass
from .stacking import Selection, Stack


class Stream(ABC):
    """A pass over a view of the backbone, which the adapters of its tasks have changed.

    Attributes:
        masked: Whether it is a task stream: its tokens read the trunk, and no other token sees them.
        view: The view.
        sites: What the attention modules of the view know, in block order; empty where these do not call an attention
            function by transformers' AttentionInterface.
        selection: Which of its tasks a pass is for, where there are several.
        needs_query: Whether a source asks for the feature of the untouched backbone.
        readout: Makes the features (rows, tasks, width) of a pass that has ended, where no token's are read.
    """

    masked: ClassVar[bool]

    def __init__(self, view: Backbone, sites: list[Site]) -> None:
        self.view = view
        self.sites = sites
        self.selection = Selection()
        self.needs_query = False
        self.readout: Callable[[Pass], Tensor] | None = None
        self._stacks: list[Stack] = []

    def require_query(self) -> None:
        """Give each pass the feature of the untouched backbone as its query."""
        self.needs_query = True

    def stack(self, parts: Sequence[Any]) -> Stack:
        """What the stream's tasks have in one place.

        Args:
            parts: For each task the module that has its parameters, or None; at least one.
        """
        stack = Stack(parts, self.selection)
        self._stacks.append(stack)
        return stack

    def stacks(self, adapters: Sequence[Any]) -> Iterator[tuple[Block, Stack]]:
        """For each block that one of the adapters changes, in order: the view's block, and what they have there.

        Args:
            adapters: For each task its adapter of one method, which keeps the parameters of a block in `blocks`, a
                `ModuleDict` by the block's index; or None.
        """
        trees = [{} if adapter is None else dict(adapter.blocks.items()) for adapter in adapters]
        for block in self.view.blocks:
            parts = [tree.get(str(block.index)) for tree in trees]
            if any(part is not None for part in parts):
                yield block, self.stack(parts)

    def refresh(self) -> None:
        """Before a pass: make anew what was kept of values that are others now."""
        for stack in self._stacks:
            stack.refresh()
