"""Masked mode: the task stream, a pass of task tokens beside the trunk."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..backbones import Backbone
from .attention import install
from .casting import keep_casts
from .passes import Pass
from .stream import Stream


class TaskStream(Stream):
    """The pass of task tokens through the backbone's blocks, reading the trunk and never writing to it.

    Where a source asks for the query, that is there only when the trunk has ended.
    """

    masked = True

    def __init__(self, backbone: Backbone) -> None:
        view = backbone.view()
        super().__init__(view, install(view, "memtune_stream"))
        for block in self.view.blocks:
            self.view.family.prepare_stream(block.module)
            keep_casts(block.module)

    def features(self, current: Pass, class_tokens: Tensor | None) -> Tensor:
        """Features (batch, tasks, width) of tasks.

        Args:
            current: A pass that the trunk has filled.
            class_tokens: The class tokens of the tasks, (1 or batch, tasks, width); None in a stream without tokens.
        """
        current = replace(current, side={})
        tokens = self.start(class_tokens, batch=current.trunk[0].key.shape[0])
        for block in self.view.blocks:
            tokens = self.step(block.index, tokens, current)
        return self.finish(tokens, current)

    def start(self, class_tokens: Tensor | None, *, batch: int) -> Tensor:
        """The tokens (batch, tasks, width) that enter the first block."""
        assert class_tokens is not None
        return self.view.start(class_tokens).expand(batch, -1, -1)

    def step(self, index: int, tokens: Tensor, current: Pass) -> Tensor:
        """The tokens after one block."""
        module = self.view.blocks[index].module
        arguments = self.view.family.stream_arguments(module, self.view.tower, tokens)
        output = module(tokens, **arguments, memtune_pass=current)
        return output[0] if isinstance(output, tuple) else output

    def finish(self, tokens: Tensor, current: Pass) -> Tensor:
        """The features of the tokens that leave the last block."""
        return self.view.finish(tokens)
