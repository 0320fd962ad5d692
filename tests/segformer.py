"""Segformer's tower with memory tokens, written out slowly: from its parameters alone, without a module's forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu


class SlowSegformer:
    """A tower of which each block may have memory, seen beside the tokens of its reduced map.

    Args:
        tower: A `SegformerModel`.
        memory: Memory tokens (number, width) of blocks, by the block's number.
    """

    def __init__(self, tower: nn.Module, memory: Mapping[int, Tensor]) -> None:
        self.settings: Any = tower.config
        self.parameters = dict(tower.named_parameters())
        self.memory = memory

    def maps(self, images: Tensor) -> list[Tensor]:
        """The map (batch, width, height, width) that each stage gives for images (batch, channels, height, width)."""
        states, maps, number = images, [], 0
        for stage, depth in enumerate(self.settings.depths):
            name, padding = f"stages.{stage}", self.settings.patch_sizes[stage] // 2
            weight, bias = (self.parameters[f"{name}.patch_embeddings.proj.{part}"] for part in ("weight", "bias"))
            states = conv2d(states, weight, bias, stride=self.settings.strides[stage], padding=padding)
            shape = tuple(states.shape[2:])
            tokens = self.norm(f"{name}.patch_embeddings.layer_norm", states.flatten(2).mT)
            for index in range(depth):
                block = f"{name}.blocks.{index}"
                tokens = tokens + self.attend(block, tokens, shape, stage, self.memory.get(number))
                inner = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.layernorm_after", tokens))
                inner = self.convolve(f"{block}.mlp.dwconv.dwconv", inner, shape, padding=1, groups=inner.shape[-1])
                tokens = tokens + self.linear(f"{block}.mlp.fc2", gelu(inner))
                number += 1
            states = self.norm(f"{name}.layer_norm", tokens).mT.unflatten(2, shape)
            maps.append(states)
        return maps

    def attend(self, block: str, tokens: Tensor, shape: tuple[int, ...], stage: int, memory: Tensor | None) -> Tensor:
        """What a block's attention adds to tokens (batch, tokens, width) of a map of this height and width."""
        asking = seen = self.norm(f"{block}.layernorm_before", tokens)
        memory = tokens[0, :0] if memory is None else memory
        further = self.norm(f"{block}.layernorm_before", memory).expand(len(tokens), -1, -1)
        ratio, reduction = self.settings.sr_ratios[stage], f"{block}.attention.sequence_reduction"
        if ratio > 1:
            seen = self.convolve(f"{reduction}.sequence_reduction", seen, shape, stride=ratio)
        seen = torch.cat([seen, further], dim=1)
        if ratio > 1:
            seen = self.norm(f"{reduction}.layer_norm", seen)
        query, key, value = (
            self.linear(f"{block}.attention.{part}_proj", rows).chunk(self.settings.num_attention_heads[stage], dim=-1)
            for part, rows in (("q", asking), ("k", seen), ("v", seen))
        )
        contexts = [
            (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v for q, k, v in zip(query, key, value, strict=True)
        ]
        return self.linear(f"{block}.attention.o_proj", torch.cat(contexts, dim=-1))

    def norm(self, name: str, rows: Tensor) -> Tensor:
        """A layer norm of rows (..., width)."""
        centred = rows - rows.mean(dim=-1, keepdim=True)
        normal = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return normal * self.parameters[f"{name}.weight"] + self.parameters[f"{name}.bias"]

    def linear(self, name: str, rows: Tensor) -> Tensor:
        """A linear layer of rows (..., width)."""
        return rows @ self.parameters[f"{name}.weight"].T + self.parameters[f"{name}.bias"]

    def convolve(self, name: str, tokens: Tensor, shape: tuple[int, ...], **options: Any) -> Tensor:
        """A convolution of tokens (batch, tokens, width), laid out as a map of this height and width."""
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        return conv2d(tokens.mT.unflatten(2, shape), weight, bias, **options).flatten(2).mT
