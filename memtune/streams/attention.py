"""The attention functions that views use, registered with transformers' `AttentionInterface`.

Each is called by the backbone's own attention module in place of its kernel, adds what the mode needs, and calls the
kernel that the user chose for the backbone (eager, SDPA, flash ...) for all image tokens. The mode is the name of the
function:

- `memtune_adapted`: the block's own keys and values, then those of its sources (memory, prefixes made of the images);
- `memtune_trunk`: nothing is added; keys and values are kept for the task stream;
- `memtune_stream`: task tokens read the trunk's keys and values, their own, and those of the sources.

Nothing is kept in a layer: what one pass records travels as the keyword argument `memtune_pass`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..backbones import Backbone, Block, shadow_config
from ..errors import UnsupportedBackboneError
from .passes import Grid, KeysValues, KeyValueSource, Pass, SideStates, TrunkBlock, TrunkUpdate
from .stacking import fit_rows

Follow: TypeAlias = Callable[[int, TrunkBlock], bool]
"""Reads a block of the trunk, of this index, as soon as it is there; gives whether it has to be kept as well."""


class Site:
    """What an attention module of a view knows of memtune."""

    def __init__(self, block: Block) -> None:
        attention = block["attention"]
        self.block = block
        self.sources: list[KeyValueSource] = []
        self.source_methods: list[str] = []  # of each source, the method that it belongs to
        self.updates: list[TrunkUpdate] = []
        self.sides: list[SideStates] = []
        self.follower: Follow | None = None
        self.config = attention.config
        self._plain: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)

    def kernel(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The attention function that the backbone is set to at this moment."""
        name = self.config._attn_implementation
        return self._plain if name == "eager" else ALL_ATTENTION_FUNCTIONS.get_interface(name, self._plain)

    def further(self, current: Pass) -> list[KeysValues]:
        """Keys and values of all sources."""
        return [source(self.block, current) for source in self.sources]


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


def skip(blocks: Sequence[Block]) -> None:
    """Let blocks of a view hand on the states that enter them."""
    for block in blocks:
        block.module.forward = _pass_on


def _pass_on(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return states


def check_visited(view: Backbone, current: Pass, skipped: int = 0) -> None:
    """Raise if a block that is not skipped did not call its attention function: it would ignore its adapter."""
    expected = view.depth - skipped
    if len(current.visited) < expected:
        raise UnsupportedBackboneError(
            f"{type(view.model).__name__} ran {len(current.visited)} of its {expected} blocks through the attention "
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
    if memtune_pass.substitute is not None:
        key, value, attention_mask = memtune_pass.substitute(key, value, attention_mask)
    widths = [key.shape[2]]
    for further in site.further(memtune_pass):
        widths.append(further.key.shape[-2])
        attention_mask = widen(attention_mask, further, like=key)
        key, value = (
            torch.cat([own, _rows_of(own, more.squeeze(1)).to(own.dtype)], dim=2)
            for own, more in ((key, further.key), (value, further.value))
        )
    if memtune_pass.weights is not None:
        first = _first_weights(query, key, attention_mask, kwargs.get("scaling"))
        memtune_pass.weights.append(list(first.split(widths, dim=-1)))
    return site.kernel()(module, query, key, value, attention_mask, **kwargs)


def _first_weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """The attention weights of the first token, (rows, heads, 1, keys), which most kernels do not give."""
    scores = (query[:, :, :1] @ key.mT).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        mask = mask[..., :1, :]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


def _rows_of(own: Tensor, more: Tensor) -> Tensor:
    """Further keys or values of one row, or of each image, for all rows that a block has."""
    rows = own.shape[0]
    return fit_rows(more, rows).expand(rows, -1, -1, -1)


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
    """The backbone's own attention; its keys and values go to those who follow, or are kept in the pass."""
    site: Site = module.memtune_site
    memtune_pass.visited.append(site.block.index)
    bias = None if attention_mask is None else attention_mask[..., :1, :]
    grid = None
    if memtune_pass.patches is not None:
        height, width = memtune_pass.patches
        grid = Grid(key.shape[2] - height * width, height, width)
    block = TrunkBlock(key, value, bias, grid)
    # torch.compile traces the trunk alone, so that it need not do it again for other tasks.
    if torch.compiler.is_compiling() or site.follower is None or site.follower(site.block.index, block):
        memtune_pass.trunk.append(block)
    return site.kernel()(module, query, key, value, attention_mask, **kwargs)


def stream_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    memtune_pass: Pass,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Task tokens (rows, heads, tasks, head width) attend to the trunk, each to itself, and to its own sources.

    One softmax over parts that are never put side by side as keys: tasks share the trunk's, and a frozen part needs no
    gradient. Any kernel that a backbone can be set to computes the same sums.
    """
    site: Site = module.memtune_site
    trunk = memtune_pass.block(site.block.index).to(query.dtype)  # once for all that read it
    further = site.further(memtune_pass)
    if memtune_pass.record is not None:
        own_token = KeysValues(key.transpose(1, 2).unsqueeze(3), value.transpose(1, 2).unsqueeze(3))
        memtune_pass.record.append([own_token, *further])
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = _trunk_scores(site, trunk, query)
    sides = [(side, side.states(trunk, memtune_pass)) for side in site.sides]
    for side, states in sides:
        scores = scores + side.scores(query, states, tokens=scores.shape[-1])
    parts = [scores]
    if memtune_pass.own_key:
        # A task token stands where the class token stands, so to itself it has the class token's bias to itself.
        own = (query * key).sum(dim=-1, keepdim=True)
        parts.append(own if trunk.bias is None else own + trunk.bias[..., :1])
    parts += [_further_scores(each, query) for each in further]
    widths = [part.shape[-1] for part in parts]
    exact = torch.promote_types(query.dtype, torch.float32)
    weights = torch.cat([part.to(exact) for part in parts], dim=-1).softmax(dim=-1).to(query.dtype)
    on_trunk, *on_own = weights.split(widths, dim=-1)
    if memtune_pass.weights is not None:
        memtune_pass.weights.append([on_trunk, *on_own])
    if memtune_pass.side_parts is not None:
        memtune_pass.side_parts.append(_side_parts(trunk.value, on_trunk, sides))
    context = _trunk_context(site, trunk, on_trunk)
    for side, states in sides:
        context = context + side.context(on_trunk, states).to(context.dtype)
    if memtune_pass.own_key:
        context = context + on_own.pop(0) * value
    for each, weight in zip(further, on_own, strict=True):
        context = context + torch.einsum("nhkm,nkhmd->nhkd", weight, each.value.to(weight.dtype)).to(context.dtype)
    return context.transpose(1, 2), None


def _trunk_scores(site: Site, trunk: TrunkBlock, query: Tensor) -> Tensor:
    """Scores of scaled queries on the trunk's keys, (rows, heads, tasks, tokens)."""
    key = trunk.key
    if _reads_side_by_side(site, query):
        wide = _in_own_part(query)
        for more in [update.queries(wide) for update in site.updates]:
            wide = wide if more is None else wide + more.to(wide.dtype)
        scores = (wide.flatten(1, 2) @ side_by_side(key).mT).unflatten(1, query.shape[1:3])
    else:
        # Made contiguous first: a copy of whole rows is far cheaper than the transposed one that the product makes.
        scores = query @ key.contiguous().mT
    return scores if trunk.bias is None else scores + trunk.bias


def _trunk_context(site: Site, trunk: TrunkBlock, weights: Tensor) -> Tensor:
    """What weights (rows, heads, tasks, tokens) take of the trunk's values, (rows, heads, tasks, head width)."""
    value = trunk.value
    if not _reads_side_by_side(site, weights):
        return weights @ value
    wide = (weights.flatten(1, 2) @ side_by_side(value)).unflatten(1, weights.shape[1:3])
    for more in [update.context(wide) for update in site.updates]:
        wide = wide if more is None else wide + more.to(wide.dtype)
    return _own_part(wide)


def _side_parts(value: Tensor, weights: Tensor, sides: Sequence[tuple[SideStates, Tensor]]) -> Tensor:
    """The part of side networks in what one task token takes of each token's values, (rows, heads, tokens).

    The length of what weights p take of the states of each token, p s U_V, over the sum of the lengths of these and of
    p V over all tokens.

    Args:
        value: V, (rows, heads, tokens, head width).
        weights: p, (rows, heads, 1, tokens).
        sides: The side networks, with their states.
    """
    rows, heads, _, tokens = weights.shape
    own = weights[:, :, 0] * value.norm(dim=-1)
    single = torch.eye(tokens, device=weights.device, dtype=weights.dtype).expand(rows, heads, -1, -1)
    taken = [side.context(single, states) for side, states in sides]  # s U_V: of each token by itself
    more = weights[:, :, 0] * torch.stack(taken).sum(dim=0).norm(dim=-1) if taken else torch.zeros_like(own)
    return more / (own + more).sum(dim=-1, keepdim=True)


def _reads_side_by_side(site: Site, asking: Tensor) -> bool:
    """Whether to treat all heads as one, with a query of the whole width for each task and head.

    Such queries can ask for what other heads have, as updates do. They take as many times the multiply-adds as there
    are heads, but no copy of keys and values, which lie side by side: for one task the copy takes longer.
    """
    return bool(site.updates) or asking.shape[2] == 1


def side_by_side(states: Tensor) -> Tensor:
    """States (rows, heads, tokens, head width) as (rows, tokens, width): no copy of what a linear layer has made."""
    return states.transpose(1, 2).flatten(2)


def _in_own_part(query: Tensor) -> Tensor:
    """Queries (rows, heads, tasks, head width), each where its head is of the width: (rows, heads, tasks, width)."""
    return query.permute(0, 2, 3, 1).diag_embed(dim1=1, dim2=3).flatten(3)


def _own_part(wide: Tensor) -> Tensor:
    """Of (rows, heads, tasks, width) what is each head's own, (rows, heads, tasks, head width)."""
    return wide.unflatten(3, (wide.shape[1], -1)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _further_scores(further: KeysValues, query: Tensor) -> Tensor:
    """Scores of scaled queries on their own tasks' further keys, (rows, heads, tasks, number)."""
    scores = torch.einsum("nhkd,nkhmd->nhkm", query, further.key.to(query.dtype))
    if further.present is None:
        return scores
    return scores.masked_fill(~further.present.unsqueeze(1), torch.finfo(scores.dtype).min)


def widen(mask: Tensor | None, further: KeysValues, like: Tensor) -> Tensor | None:
    """A mask (..., queries, keys) that lets every query see further keys too, where they are present.

    Args:
        mask: An additive mask, or a boolean one that is True where a key counts; None if all do.
        further: The further keys of one task for each row.
        like: The keys so far, (rows, heads, keys, head width).
    """
    number = further.key.shape[-2]
    if further.present is None:
        return None if mask is None else pad(mask, (0, number), value=mask.dtype == torch.bool)
    rows, _, keys, _ = like.shape
    mask = like.new_zeros(rows, 1, 1, keys) if mask is None else mask.expand(rows, -1, -1, -1)
    there = fit_rows(further.present, rows).unsqueeze(1)  # (1 or rows, 1, 1, number)
    if mask.dtype != torch.bool:
        there = torch.zeros_like(there, dtype=mask.dtype).masked_fill(~there, torch.finfo(mask.dtype).min)
    return torch.cat([mask, there.expand(*mask.shape[:-1], -1)], dim=-1)


AttentionInterface.register("memtune_adapted", adapted_attention)
AttentionInterface.register("memtune_trunk", trunk_attention)
AttentionInterface.register("memtune_stream", stream_attention)
