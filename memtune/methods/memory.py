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
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbones import Backbone, Block
from ..errors import ConfigError
from ..streams import KeysValues, KeyValueSource, Pass, Stack, Stream, in_front
from .adapter import Adapter, AdapterConfig
from .registry import register_method


@dataclass(frozen=True)
class MemoryConfig(AdapterConfig):
    """Settings of learnable memory.

    Example:
        >>> model = memtune.wrap(backbone, memtune.MemoryConfig(tokens=4), labels=["cat", "dog"])

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


def _source(stack: Stack, block: Block, *, masked: bool) -> KeyValueSource:
    """Keys and values of the tasks' memory in a block of a view, by the block's norm and projections.

    Tasks with fewer tokens than others have them masked. A task stream projects by the backbone's own weights, so that
    keys and values need not be made at each pass; in an adapted stream the projections may be the tasks' own.
    """
    present = stack.present("memory") or (lambda: None)
    if masked:
        layers = [*block.key_norms, block["key"], block["value"]]
        projected = stack.made(partial(_project, block=block), "memory", of=layers)

        def made(block: Block, current: Pass) -> KeysValues:
            key, value = (in_front(each, 5) for each in projected())
            return KeysValues(key, value, present())

        return made
    memory = stack.tensor("memory")

    def project(block: Block, current: Pass) -> KeysValues:
        tokens = in_front(memory(), 4)  # (1 or images, 1, m, width)
        key, value = _project(tokens.squeeze(1), block)
        return KeysValues(key.unsqueeze(1), value.unsqueeze(1), present())

    return project


def _project(memory: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Keys and values (..., heads, m, head width) of memory (..., m, width)."""
    memory = memory.to(block["norm1"].weight.dtype)
    for norm in block.key_norms:
        memory = norm(memory)
    key, value = (
        block[role](memory).unflatten(-1, (-1, block.head_width)).transpose(-3, -2) for role in ("key", "value")
    )
    return key, value


@register_method
class MemoryAdapter(Adapter[MemoryConfig]):
    """Memory tokens for the blocks of one backbone; in masked mode only the task token sees them."""

    config_class = MemoryConfig

    def __init__(self, config: MemoryConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        chosen = config.select(backbone) if config.tokens else []
        self.blocks = nn.ModuleDict(
            {str(block.index): BlockMemory(config.tokens, block.width, config.init_std) for block in chosen}
        )

    def changed_blocks(self, backbone: Backbone) -> list[int]:
        """Those that have memory."""
        return [int(index) for index in self.blocks]

    def merge_into(self, backbone: Backbone) -> None:
        """Do nothing where there is no memory, so that a head alone can be merged.

        Raises:
            ConfigError: There is: it is not a change of weights.
        """
        if self.blocks:
            super().merge_into(backbone)

    @classmethod
    def attach(cls, stream: Stream, adapters: Sequence[Any]) -> None:
        """Give each block's attention the keys and values of its memory."""
        for block, stack in stream.stacks(adapters):
            stream.sites[block.index].sources.append(_source(stack, block, masked=stream.masked))
