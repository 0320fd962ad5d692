"""The side network: features of all tokens, narrow and beside the trunk, which task tokens read in each block.

Ours; of the kind of "Ladder Side-Tuning" (https://arxiv.org/abs/2206.06522) and LAST
(https://arxiv.org/abs/2402.04009), whose features are as wide as the trunk's, or make the answer by themselves.

V (T, D) are the values of the trunk in a block, all heads side by side. In each block the state s (T, r) goes on by

    d = LN(V W),   u = s + d,   h = LN(u)
    y = GELU(conv3x3(h) + b) for the patches on their grid,  GELU(h C + b) for the class token and registers
    s = u + y O + o

and the task token sees K + s U_K and V + s U_V in place of K and V. Neither is formed: to a scaled query q_i of head i

    scores    q_i K_i^T + (q_i (U_K)_i^T) s^T
    context   p V_i + (p s) (U_V)_i,   p what softmax gives the trunk's tokens

With `readout="pool"` there is no task token: the head reads LN(mean over the patches of the last s) and, where the
backbone has one, LN(s of the class token), side by side; there are no U_K and U_V.

The first s is 0: a trained start would be the bias of the first norm. U_K = U_V = 0 at first, so that a new adapter
changes nothing. The trunk stays as it is, and its values are all that is read of it: masked mode alone.

Parameters: L (3 D r + 11 r^2 + 6 r) for L blocks, without a convolution L (3 D r + 2 r^2 + 6 r);
with one, on a backbone whose tokens are all patches, C is left out: L r^2 fewer. Multiply-adds in each
block for T tokens, P of them patches, and H heads: T D r + 9 P r^2 + (T - P) r^2 + T r^2 + 2 H T r + 2 D r; without a
convolution T D r + 2 T r^2 + 2 H T r + 2 D r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, layer_norm, linear, pad

from ..backbones import Backbone
from ..errors import ConfigError, InputError
from ..streams import Pass, Stack, Stream, TrunkBlock, in_front, per_task, side_by_side
from .adapter import Adapter, AdapterConfig
from .registry import register_method

MIXINGS = ("conv", "none")

READOUTS = ("token", "pool")

EPS = 1e-5
"""What layer norms add to the variance."""


@dataclass(frozen=True)
class SideNetworkConfig(AdapterConfig):
    """Settings of the side network, for masked mode.

    Example:
        >>> configs = [memtune.MemoryConfig(4), memtune.SideNetworkConfig(width=32)]
        >>> model = memtune.wrap(backbone, configs, labels=["cat", "dog"], masked=True)

    Args:
        width: Width of the state, r.
        mixing: "conv" for a convolution over the grid of patches in each block; "none" to leave each token to itself,
            for fewer multiply-adds.
        readout: "token" for a task token that reads the states in each block; "pool" for no token at all: the head
            reads the mean of the patches' last states, and the class token's. No other method goes with the latter.
        blocks: Indices of the blocks in which the state goes on and is read; None for all.
    """

    method: ClassVar[str] = "side_network"

    width: int = 32
    mixing: str = "conv"
    readout: str = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ConfigError(f"width: got {self.width!r}, expected a whole number from 1 on")
        if self.mixing not in MIXINGS:
            raise ConfigError(f"mixing: got {self.mixing!r}, expected one of {MIXINGS}")
        if self.readout not in READOUTS:
            raise ConfigError(f"readout: got {self.readout!r}, expected one of {READOUTS}")

    def feature_width(self, backbone: Backbone) -> int | None:
        """With `readout="pool"` that of one state, or of two where the backbone has a class token."""
        if self.readout == "token":
            return None
        return self.width if _patches_alone(backbone) else 2 * self.width

    def for_mode(self, masked: bool) -> SideNetworkConfig:
        """The settings as they are.

        Raises:
            ConfigError: The mode is the unmasked one.
        """
        if not masked:
            raise ConfigError(
                "side_network: got masked=False, and a side network reads the untouched backbone, which an adapter of "
                "unmasked mode changes; pass masked=True"
            )
        return self


class BlockSide(nn.Module):
    """The side network in one block.

    Args:
        block_width: The block's width, D.
        config: The method's settings.
        patches_alone: Whether all of the backbone's tokens are those of patches.
    """

    def __init__(self, block_width: int, config: SideNetworkConfig, *, patches_alone: bool) -> None:
        super().__init__()
        wide, narrow = block_width, config.width
        self.down = nn.Parameter(torch.empty(wide, narrow).normal_(std=wide**-0.5))
        self.down_norm = nn.Parameter(torch.ones(narrow))
        self.down_norm_bias = nn.Parameter(torch.zeros(narrow))
        self.norm = nn.Parameter(torch.ones(narrow))
        self.norm_bias = nn.Parameter(torch.zeros(narrow))
        if config.mixing == "conv":
            self.conv = nn.Parameter(torch.empty(narrow, narrow, 3, 3).normal_(std=(9 * narrow) ** -0.5))
        if config.mixing == "none" or not patches_alone:
            self.own = nn.Parameter(torch.empty(narrow, narrow).normal_(std=narrow**-0.5))
        self.own_bias = nn.Parameter(torch.zeros(narrow))
        self.out = nn.Parameter(torch.empty(narrow, narrow).normal_(std=0.5 * narrow**-0.5))
        self.out_bias = nn.Parameter(torch.zeros(narrow))
        if config.readout == "token":
            self.up_key = nn.Parameter(torch.zeros(narrow, wide))
            self.up_value = nn.Parameter(torch.zeros(narrow, wide))


class Pool(nn.Module):
    """The norms of what a head reads that no token goes to.

    Args:
        config: The method's settings.
        patches_alone: Whether all of the backbone's tokens are those of patches.
    """

    def __init__(self, config: SideNetworkConfig, *, patches_alone: bool) -> None:
        super().__init__()
        for name in ("mean",) if patches_alone else ("mean", "first"):
            self.register_parameter(name, nn.Parameter(torch.ones(config.width)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(config.width)))


class _Norm:
    """The tasks' layer norms of states (rows, tokens, tasks, r), each over its task's own width.

    Args:
        stack: The tasks' `BlockSide`.
        name: The name of the weight.
    """

    def __init__(self, stack: Stack, name: str) -> None:
        self._weight, self._bias = stack.tensor(name), stack.tensor(f"{name}_bias")
        widths = stack.sizes(lambda part: len(getattr(part, name)))
        self._widths: Tensor | None = None
        if len(set(widths) - {0}) > 1:
            device = getattr(stack.parts[0], name).device
            self._widths = torch.tensor(widths, device=device).clamp_min(1).unsqueeze(1)
        self._spread = stack.spread

    def __call__(self, states: Tensor) -> Tensor:
        weight, bias = self._weight(), self._bias()
        if weight.ndim == 1:
            return layer_norm(states, weight.shape, weight, bias, EPS)
        weight, bias = weight.unsqueeze(1), bias.unsqueeze(1)  # (1 or rows, 1, tasks, r)
        if self._widths is None:
            return torch.addcmul(bias, layer_norm(states, states.shape[-1:], eps=EPS), weight)
        # What is beyond a task's own width is 0.
        width = self._spread(self._widths).unsqueeze(1)
        states = states.to(weight.dtype)
        mean = states.sum(dim=-1, keepdim=True) / width
        variance = states.square().sum(dim=-1, keepdim=True) / width - mean.square()
        return (states - mean) * (variance.clamp_min(0) + EPS).rsqrt() * weight + bias


class _SideBlock:
    """What the side networks of a stream's tasks do in one block (a `memtune.streams.SideStates`).

    Args:
        stack: The tasks' `BlockSide`, all of them with the same mixing.
        key: Where a pass has the state that leaves the block.
        before: Where it has that of the block before; None if there is none.
    """

    def __init__(self, stack: Stack, key: tuple[int, int], before: tuple[int, int] | None) -> None:
        self._key, self._before = key, before
        self._down, self._out = stack.tensor("down"), stack.tensor("out")
        self._own = stack.tensor("own") if hasattr(stack.parts[0], "own") else None
        self._own_bias, self._out_bias = stack.tensor("own_bias"), stack.tensor("out_bias")
        if hasattr(stack.parts[0], "up_key"):
            self._up_key, self._up_value = stack.tensor("up_key"), stack.tensor("up_value")
        self._conv = stack.tensor("conv") if hasattr(stack.parts[0], "conv") else None
        self._down_norm, self._norm = _Norm(stack, "down_norm"), _Norm(stack, "norm")

    def states(self, trunk: TrunkBlock, current: Pass) -> Tensor:
        """The states (rows, tokens, tasks, r) that leave the block; the pass has them for the next."""
        if trunk.grid is None:
            raise InputError(
                "trunk: got a pass that does not say how its patches lie, which a side network has to know; make it "
                "with the model's trunk_pass"
            )
        prefix, height, width = trunk.grid
        down = self._down()
        values = side_by_side(trunk.value)[:, : prefix + height * width].to(down.dtype)
        states = self._down_norm(_all_tasks(values, down))
        if self._before is not None:
            states = states + current.side[self._before]
            if not torch.is_grad_enabled():
                del current.side[self._before]
        normed = self._norm(states)
        bias = self._own_bias()
        alone = normed if self._conv is None else normed[:, :prefix]
        mixed = [] if self._own is None else [_each_task(alone, self._own(), bias)]
        if self._conv is not None:
            mixed.append(_convolved(normed[:, prefix:].unflatten(1, (height, width)), self._conv(), bias))
        mixed = gelu(torch.cat(mixed, dim=1))
        states = states + _each_task(mixed, self._out(), self._out_bias())
        current.side[self._key] = states
        return states

    def scores(self, query: Tensor, states: Tensor, tokens: int) -> Tensor:
        """What scaled queries (rows, heads, tasks, head width) score more, (rows, heads, tasks, tokens)."""
        up = in_front(self._up_key(), 4).unflatten(-1, (query.shape[1], -1))  # (1 or rows, 1 or tasks, r, heads, ...)
        narrow = torch.einsum("nhkd,nkrhd->nkhr", query, up.to(query.dtype))
        scores = (narrow @ states.permute(0, 2, 3, 1).to(narrow.dtype)).transpose(1, 2)
        return pad(scores, (0, tokens - scores.shape[-1]))

    def context(self, weights: Tensor, states: Tensor) -> Tensor:
        """What weights (rows, heads, tasks, tokens) take more of the values, (rows, heads, tasks, head width)."""
        up = in_front(self._up_value(), 4).unflatten(-1, (weights.shape[1], -1)).to(weights.dtype)
        weights = weights[..., : states.shape[1]].transpose(1, 2)
        return torch.einsum("nkhr,nkrhd->nhkd", weights @ states.transpose(1, 2).to(weights.dtype), up)


class _Pooled:
    """What heads read that no token goes to.

    Args:
        stack: The tasks' `Pool`, all of the same width.
        key: Where a pass has the states that leave the last block.
    """

    def __init__(self, stack: Stack, key: tuple[int, int]) -> None:
        self._key = key
        self._mean = _Norm(stack, "mean")
        self._first = _Norm(stack, "first") if hasattr(stack.parts[0], "first") else None

    def __call__(self, current: Pass) -> Tensor:
        """The features (rows, tasks, r or 2 r)."""
        states = current.side[self._key]
        grid = (current.present or current.trunk[0]).grid
        assert grid is not None
        parts = [self._mean(states[:, grid.prefix :].mean(dim=1, keepdim=True))]
        if self._first is not None:
            parts.append(self._first(states[:, :1]))
        return torch.cat(parts, dim=-1).squeeze(1)


def _patches_alone(backbone: Backbone) -> bool:
    """Whether all tokens of a backbone are those of patches: no class token, no registers."""
    # timm's towers say how many tokens stand before the patches; transformers' without a class token have none.
    return not getattr(backbone.tower, "num_prefix_tokens", backbone.class_token is not None)


def _all_tasks(values: Tensor, down: Tensor) -> Tensor:
    """Values (rows, tokens, D) by the matrices of all tasks at once: (rows, tokens, tasks, r).

    Args:
        values: Those of the trunk.
        down: (D, r) of one task, else (1 or rows, 1 or tasks, D, r).
    """
    if down.ndim == 2:
        return (values @ down).unsqueeze(2)
    if down.shape[0] > 1:
        return (values @ down.squeeze(1)).unsqueeze(2)
    return (values @ down.squeeze(0).transpose(0, 1).flatten(1)).unflatten(2, down.shape[1::2])


def _each_task(states: Tensor, matrices: Tensor, biases: Tensor) -> Tensor:
    """States by their tasks' matrices, and a bias.

    Args:
        states: (rows, tokens, tasks, r).
        matrices: (r, r) of one task, else (1 or rows, 1 or tasks, r, r).
        biases: (r,) of one task, else (1 or rows, 1 or tasks, r).
    """
    if matrices.ndim == 2:
        return linear(states, matrices.mT.to(states.dtype), biases.to(states.dtype))
    if matrices.shape[0] > 1:
        return per_task(states.squeeze(2), matrices).unsqueeze(2) + biases.unsqueeze(1)
    return per_task(states.flatten(0, 1), matrices).unflatten(0, states.shape[:2]) + biases.unsqueeze(1)


def _convolved(states: Tensor, kernels: Tensor, biases: Tensor) -> Tensor:
    """The 3x3 convolution of each task over the grid of patches, with a border of zeros, and a bias.

    Args:
        states: (rows, height, width, tasks, r).
        kernels: (r, r, 3, 3) of one task, else (1 or rows, 1 or tasks, r, r, 3, 3).
        biases: (r,) of one task, else (1 or rows, 1 or tasks, r).

    Returns:
        (rows, patches, tasks, r).
    """
    rows, height, width, tasks, narrow = states.shape
    kernels = in_front(kernels, 6).to(states.dtype)
    bias = biases.flatten().to(states.dtype)
    groups = kernels.shape[0] * kernels.shape[1]
    if kernels.shape[0] == 1:
        grids = states.flatten(3).permute(0, 3, 1, 2)  # in memory as it was: channels last
    else:
        grids = states.squeeze(3).permute(0, 3, 1, 2).reshape(1, rows * narrow, height, width)
    grids = conv2d(grids, kernels.flatten(0, 2), bias, padding=1, groups=groups)
    if kernels.shape[0] == 1:
        return grids.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (tasks, narrow))
    return grids.view(rows, narrow, height * width).transpose(1, 2).unsqueeze(2)


@register_method
class SideNetworkAdapter(Adapter[SideNetworkConfig]):
    """A side network for the blocks of one backbone; only the task token reads it."""

    config_class = SideNetworkConfig

    def __init__(self, config: SideNetworkConfig, backbone: Backbone) -> None:
        super().__init__(config.for_mode(masked=True), backbone)
        alone = _patches_alone(backbone)
        self.blocks = nn.ModuleDict(
            {str(block.index): BlockSide(block.width, config, patches_alone=alone) for block in config.select(backbone)}
        )
        if config.readout == "pool":
            if not self.blocks:
                raise ConfigError("blocks: got none, and with readout='pool' the head reads the last block's states")
            self.pool = Pool(config, patches_alone=alone)

    @classmethod
    def attach(cls, stream: Stream, adapters: Sequence[Any]) -> None:
        """Give each block's attention the states that the tasks have beside it."""
        for mixing in MIXINGS:
            same = [each if each and each.config.mixing == mixing else None for each in adapters]
            number = sum(len(site.sides) for site in stream.sites)  # another one for each network of the stream
            before = None
            for block, stack in stream.stacks(same):
                key = (number, block.index)
                stream.sites[block.index].sides.append(_SideBlock(stack, key, before))
                before = key
            pools = [each.pool for each in same if each and each.config.readout == "pool"]
            if pools and before is not None:  # then all of the stream are alike
                stream.readout = _Pooled(stream.stack(pools), before)
