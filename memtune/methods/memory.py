"""Learnable memory tokens.

"Fine-tuning Image Transformers using Learnable Memory" (Sandler et al., CVPR 2022, https://arxiv.org/abs/2203.15243).

Each block has `m` memory tokens M of its own, which its queries attend to beside the tokens X (figures 1 and 2):

    X' = X + Wo softmax(Wq N(X) [Wk N(X); Wk N(M)]^T / sqrt(d)) [Wv N(X); Wv N(M)],   N the block's first norm

Memory is never a query and is not propagated; it has no position. Unmasked, it equals VPT-deep. In a block whose keys
and values are those of a reduced map (Segformer's), it joins the reduced tokens: N(M) then also passes their norm.

Parameters: L m D for L blocks of width D; the class token of the task adds D, the head D C + C for C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbones import Backbone, Block
from ..errors import ConfigError
from ..streams import AdaptedStream, KeysValues, Pass, Stack, TaskStream
from .adapter import Adapter, AdapterConfig
from .registry import register_method


@dataclass(frozen=True)
class MemoryConfig(AdapterConfig):
    """Settings of learnable memory.

    Args:
        tokens: Memory tokens in each block, m (table 2: "cells"). 0 leaves the class token and the head to train.
        init_std: Standard deviation of the initial values, which are N(0, 0.02) in the paper.
        class_token: Whether unmasked mode trains a copy of the class token too (table 2, as the paper does).
        blocks: Indices of the blocks that get memory; None for all, as in the paper.
    """

    method: ClassVar[str] = "memory"

    tokens: int = 4
    init_std: float = 0.02
    class_token: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 0:
            raise ConfigError(f"tokens: got {self.tokens!r}, expected a whole number of memory tokens, 0 or more")
        if not isinstance(self.init_std, (int, float)) or not 0 <= self.init_std < float("inf"):
            raise ConfigError(f"init_std: got {self.init_std!r}, expected a standard deviation, 0 or more")
        if not isinstance(self.class_token, bool):
            raise ConfigError(f"class_token: got {self.class_token!r}, expected True or False")

    def trains_class_token(self) -> bool:
        """As the settings say; the paper does."""
        return self.class_token


class BlockMemory(nn.Module):
    """The memory tokens of one block.

    Args:
        tokens: Their number, m.
        width: The block's width, D.
        init_std: Standard deviation of the initial values.
    """

    def __init__(self, tokens: int, width: int, init_std: float) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.empty(tokens, width).normal_(std=init_std))
        self._kept: tuple[Any, KeysValues] | None = None

    def keys_values(self, block: Block, current: Pass | None = None) -> KeysValues:
        """Keys and values of the memory by the block's norm and projections, each (1, 1, heads, m, head width).

        They do not depend on the images, so in evaluation they are kept until a parameter behind them changes.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _project(self.memory.expand(1, 1, -1, -1), block)
        state = self._state(block)
        kept = self._kept
        if kept is None or kept[0] != state:
            # Detached, as a view of a parameter says that it requires a gradient also where none is recorded.
            kept = self._kept = (state, _project(self.memory.detach().expand(1, 1, -1, -1), block))
        return kept[1]

    def _state(self, block: Block) -> Any:
        """What changes whenever the keys and values do: the parameters' places and versions, and the precision."""
        modules = (self, *block.key_norms, block["key"], block["value"])
        parameters = [parameter for module in modules for parameter in module.parameters()]
        versions = [(parameter.data_ptr(), parameter._version, parameter.dtype) for parameter in parameters]
        device = self.memory.device.type
        return versions, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class MemoryStack:
    """The memory of several tasks in one block.

    Args:
        stack: The tasks' parts.
        block: The block of the view, or None to project at each pass, by projections that may be the tasks' own.
    """

    def __init__(self, stack: Stack, block: Block | None) -> None:
        self._stack = stack
        self._present = stack.present(lambda part: part.memory)
        memory = stack.rows(lambda part: part.memory)  # (tasks, m, width)
        self._memory = memory if block is None else None
        self._projected = None if block is None else _project(memory.unsqueeze(0), block)

    def __call__(self, block: Block, current: Pass) -> KeysValues:
        """Keys and values of the tasks that the pass is for; tasks with fewer tokens than others have them masked."""
        present = None if self._present is None else self._stack.chosen(self._present)
        if self._projected is None:
            assert self._memory is not None
            return _project(self._stack.chosen(self._memory), block)._replace(present=present)
        key, value = (self._stack.chosen(part[0]) for part in self._projected[:2])
        return KeysValues(key, value, present)


def _project(memory: Tensor, block: Block) -> KeysValues:
    """Keys and values (rows, tasks, heads, m, head width) of memory (rows, tasks, m, width)."""
    rows, tasks, number, _ = memory.shape
    memory = memory.to(block["norm1"].weight.dtype)
    for norm in block.key_norms:
        memory = norm(memory)
    memory = memory.flatten(1, 2)
    shape = (rows, tasks, number, -1, block.head_width)
    key, value = (block[role](memory).view(shape).transpose(2, 3) for role in ("key", "value"))
    return KeysValues(key, value)


@register_method
class MemoryAdapter(Adapter[MemoryConfig]):
    """Memory tokens for the blocks of one backbone; in masked mode only the task token sees them."""

    config_class = MemoryConfig
    stackable = True

    def __init__(self, config: MemoryConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        chosen = config.select(backbone) if config.tokens else []
        self.blocks = nn.ModuleDict(
            {str(block.index): BlockMemory(config.tokens, block.width, config.init_std) for block in chosen}
        )

    def changed_blocks(self, backbone: Backbone) -> list[int]:
        """Those that have memory."""
        return [int(index) for index in self.blocks]

    def attach(self, stream: AdaptedStream | TaskStream) -> None:
        """Give each block's attention the keys and values of its memory."""
        for index, memory in self.blocks.items():
            assert isinstance(memory, BlockMemory)
            memory._kept = None  # a new parameter may lie where one that is gone lay
            stream.sites[int(index)].sources.append(memory.keys_values)

    @classmethod
    def attach_stack(cls, adapters: Sequence[Any], stream: AdaptedStream | TaskStream) -> None:
        """Give each block's attention the keys and values of all tasks' memory.

        A task stream projects by the backbone's own weights, so its keys and values are made once, now.
        """
        for index, parts in cls.block_parts(adapters, stream.view.depth):
            block = stream.view.blocks[index] if stream.masked else None
            stream.sites[index].sources.append(MemoryStack(Stack(parts, stream.selection), block))
