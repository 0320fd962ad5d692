"""The attention functions that views use, registered with transformers' `AttentionInterface`.

Each is called by the backbone's own attention module in place of its kernel, adds what the mode needs, and calls the
kernel that the user chose for the backbone (eager, SDPA, flash ...). The mode is the name of the function:

- `memtune_adapted`: the block's own keys and values, then those of its sources (memory, prefixes made of the images);
- `memtune_trunk`: nothing is added; keys and values are kept for the task stream;
- `memtune_stream`: task tokens read the trunk's keys and values, their own, and those of the sources.

Nothing is kept in a layer: what one pass records travels as the keyword argument `memtune_pass`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .backbones import Backbone, Block
from .errors import UnsupportedBackboneError
from .views import shadow_config

KeyValueSource = Callable[[Block], tuple[Tensor, Tensor]]
"""Gives a block's further keys and values, each (1 or batch, heads, number, head width)."""

ImageSource = Callable[[Block, Tensor], tuple[Tensor, Tensor]]
"""The same for keys and values that depend on the images: it also takes the query of the pass, (batch, width)."""

KeyValueReader = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Gives the trunk's keys and values as a task sees them, (batch, heads, tokens, head width) each, from its own."""

KernelWrapper = Callable[..., tuple[Tensor, Tensor | None]]
"""Takes an attention function and then its arguments (module, query, key, value, mask, ...), and runs it changed."""


class TrunkBlock(NamedTuple):
    """What the task stream reads of one block of the trunk."""

    key: Tensor  # (batch, heads, tokens, head width)
    value: Tensor  # (batch, heads, tokens, head width)
    bias: Tensor | None  # the class token's row of the additive mask, (1 or batch, 1 or heads, 1, tokens)


@dataclass
class Pass:
    """One pass over a batch of images: what its attention functions write and read.

    Attributes:
        visited: Indices of the blocks whose attention has run, in order.
        trunk: For each block what the trunk left for the task stream.
        own_key: Whether a task token sees its own key and value.
        query: The feature of the images by the unadapted backbone, (batch, width), or None if no source asks for it.
    """

    visited: list[int] = field(default_factory=list)
    trunk: list[TrunkBlock] = field(default_factory=list)
    own_key: bool = True
    query: Tensor | None = None


class Site:
    """What an attention module of a view knows of memtune."""

    def __init__(self, block: Block) -> None:
        attention = block["attention"]
        self.block = block
        self.sources: list[KeyValueSource] = []
        self.image_sources: list[ImageSource] = []
        self.readers: list[KeyValueReader] = []
        self.wrappers: list[KernelWrapper] = []
        self.config = attention.config
        self.eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)

    def kernel(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The attention function that the backbone is set to at this moment, within the site's wrappers."""
        name = self.config._attn_implementation
        kernel: Any = self.eager if name == "eager" else ALL_ATTENTION_FUNCTIONS.get_interface(name, self.eager)
        for wrapper in self.wrappers:
            kernel = partial(wrapper, kernel)
        return kernel

    def further(self, current: Pass, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of all sources, expanded to the batch of `like` and cast to its dtype."""
        pairs = [source(self.block) for source in self.sources]
        if self.image_sources:
            assert current.query is not None
            pairs += [source(self.block, current.query) for source in self.image_sources]
        return [_expand(key, like) for key, _ in pairs], [_expand(value, like) for _, value in pairs]


def _expand(part: Tensor, like: Tensor) -> Tensor:
    """Repeat each row of a part for all that `like` has of it: the whole batch, or the windows of one image."""
    part = part.to(like.dtype).unsqueeze(1)
    return part.expand(-1, like.shape[0] // part.shape[0], -1, -1, -1).flatten(0, 1)


def install(view: Backbone, mode: str) -> list[Site]:
    """Let every attention module of a view call the attention function `mode`; gives its sites in block order."""
    sites = []
    for block in view.blocks:
        attention = block["attention"]
        site = Site(block)
        attention.config = shadow_config(attention.config)
        attention.config._attn_implementation_internal = mode
        attention.memtune_site = site
        sites.append(site)
    return sites


def check_visited(view: Backbone, current: Pass) -> None:
    """Raise if a block did not call its attention function: it would ignore the adapter in silence."""
    if len(current.visited) < view.depth:
        raise UnsupportedBackboneError(
            f"{type(view.model).__name__} ran {len(current.visited)} of its {view.depth} blocks through the attention "
            "function that transformers' AttentionInterface gave it; an adapter would be ignored in the others"
        )


def adapted_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    memtune_pass: Pass,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the block's keys and values and those of its sources."""
    site: Site = module.memtune_site
    memtune_pass.visited.append(site.block.index)
    if site.sources or site.image_sources:
        keys, values = site.further(memtune_pass, like=key)
        key, value = torch.cat([key, *keys], dim=2), torch.cat([value, *values], dim=2)
        attention_mask = widen(attention_mask, sum(part.shape[2] for part in keys))
    return site.kernel()(module, query, key, value, attention_mask, **kwargs)


def trunk_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    memtune_pass: Pass,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The backbone's own attention; its keys and values are kept in the pass."""
    site: Site = module.memtune_site
    memtune_pass.visited.append(site.block.index)
    bias = None if attention_mask is None else attention_mask[..., :1, :]
    memtune_pass.trunk.append(TrunkBlock(key, value, bias))
    return site.kernel()(module, query, key, value, attention_mask, **kwargs)


def stream_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    memtune_pass: Pass,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Task tokens (batch, heads, 1, head width) attend to the trunk, to themselves and to the sources."""
    site: Site = module.memtune_site
    trunk = memtune_pass.trunk[site.block.index]
    keys, values = ([key], [value]) if memtune_pass.own_key else ([], [])
    if site.sources or site.image_sources:
        further_keys, further_values = site.further(memtune_pass, like=key)
        keys, values = keys + further_keys, values + further_values
    bias = trunk.bias
    if bias is not None:
        # A task token stands where the class token stands, so to itself it has the class token's bias to itself.
        bias = torch.cat([bias, bias[..., :1]], dim=-1) if memtune_pass.own_key else bias
        bias = widen(bias, sum(part.shape[2] for part in keys) - int(memtune_pass.own_key))
    trunk_key, trunk_value = trunk.key.to(key.dtype), trunk.value.to(value.dtype)
    for read in site.readers:
        trunk_key, trunk_value = read(trunk_key, trunk_value)
    key, value = torch.cat([trunk_key, *keys], dim=2), torch.cat([trunk_value, *values], dim=2)
    return site.kernel()(module, query, key, value, bias, **kwargs)


def widen(mask: Tensor | None, further: int) -> Tensor | None:
    """A mask (..., queries, keys) that lets every query see `further` more keys: zeros, or True in a boolean mask."""
    if mask is None or further == 0:
        return mask
    return pad(mask, (0, further), value=mask.dtype == torch.bool)


AttentionInterface.register("memtune_adapted", adapted_attention)
AttentionInterface.register("memtune_trunk", trunk_attention)
AttentionInterface.register("memtune_stream", stream_attention)
