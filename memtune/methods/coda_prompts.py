"""CODA prompts: prompts composed for each image from a pool that grows with the tasks.

"CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual Learning" (Smith et al.,
CVPR 2023, https://arxiv.org/abs/2211.13218), as released (https://github.com/GT-RIPL/CODA-Prompt, commit 6417d4f).

Each block has a pool of M prompts P_m (Lp, D) of its own, with a key K_m (D) and an attention vector A_m (D). For an
image whose feature by the unprompted backbone is q:

    p = sum_m a_m P_m,    a_m = cos(q * A_m, K_m),    softmax(Q [p_K; K]^T / sqrt(d)) [p_V; V]

p_K, the first half of the rows of p, joins the keys after their projection, p_V, the second half, the values. The pool
is split over the tasks of a sequence: task t trains its own M / tasks rows, those of earlier tasks are held constant,
those of later ones are zero. Unmasked, q takes a pass of its own; masked, the trunk has it already.

Parameters: L (M Lp D + 2 M D) for L blocks of width D (the default with ViT-B: 3,840,000).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbones import Backbone, Block
from ..errors import ConfigError
from ..streams import KeysValues, Pass, Stack, Stream, in_front
from .adapter import Adapter, AdapterConfig
from .registry import register_method


@dataclass(frozen=True)
class CodaPromptConfig(AdapterConfig):
    """Settings of CODA prompts.

    Example:
        >>> config = memtune.CodaPromptConfig(pool_size=20, num_tasks=2)
        >>> model = memtune.wrap(backbone, config, labels=["cat", "dog"])

    Args:
        pool_size: Prompts in each block's pool, M, over all tasks.
        prompt_length: Rows of a prompt, Lp; even, as half of them become keys and half values.
        num_tasks: Tasks that the pool is split over; each gets `pool_size // num_tasks` prompts.
        ortho_mu: Weight of the orthogonality loss. 0 as in the released scripts, since new rows start orthogonal; the
            authors advise about 1e-6 where it is used.
        task: The task that trains, 0 for the first; `CodaPromptAdapter.start_task` sets it.
        blocks: Indices of the blocks that get prompts; the first five, as in the paper, or None for all.
    """

    method: ClassVar[str] = "coda_prompts"

    pool_size: int = 100
    prompt_length: int = 8
    num_tasks: int = 1
    ortho_mu: float = 0.0
    task: int = 0
    blocks: Sequence[int] | None = field(default=(0, 1, 2, 3, 4), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"pool_size": 1, "prompt_length": 2, "num_tasks": 1, "task": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name}: got {value!r}, expected a whole number from {least} on")
        if self.prompt_length % 2:
            raise ConfigError(f"prompt_length: got {self.prompt_length}, expected an even number of rows")
        if self.num_tasks > self.pool_size:
            raise ConfigError(f"num_tasks: got {self.num_tasks}, which a pool_size of {self.pool_size} cannot serve")
        if self.task >= self.num_tasks:
            raise ConfigError(f"task: got {self.task}, expected a number below num_tasks={self.num_tasks}")
        number = isinstance(self.ortho_mu, (int, float)) and not isinstance(self.ortho_mu, bool)
        if not number or not 0 <= self.ortho_mu <= sys.float_info.max:
            raise ConfigError(f"ortho_mu: got {self.ortho_mu!r}, expected a weight, 0 or more")

    def trained(self) -> slice:
        """The prompts of the pool that the present task trains."""
        share = self.pool_size // self.num_tasks
        return slice(self.task * share, (self.task + 1) * share)


class BlockPool(nn.Module):
    """The pool of one block.

    Args:
        config: The method's settings; the rows of its task and of those before are drawn.
        width: The block's width.
        query_width: Width of the query, that of keys and attention vectors.
    """

    def __init__(self, config: CodaPromptConfig, width: int, query_width: int) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.zeros(config.pool_size, config.prompt_length, width))
        self.prefix_key = nn.Parameter(torch.zeros(config.pool_size, query_width))
        self.prefix_attention = nn.Parameter(torch.zeros(config.pool_size, query_width))
        self.trained: Tensor
        self.register_buffer("trained", torch.zeros(config.pool_size), persistent=False)
        for task in range(config.task + 1):
            self.start(replace(config, task=task).trained())

    @torch.no_grad()
    def start(self, trained: slice) -> None:
        """Draw the prompts of a task, to be trained from now on in place of those before."""
        self._first, self._last = trained.start, trained.stop
        self.trained.zero_()
        self.trained[trained] = 1
        for parameter in self.parameters():
            _orthogonalise(parameter.flatten(1), trained)

    def in_use(self) -> list[Tensor]:
        """Prefixes, keys and attention vectors of the tasks so far, those of earlier tasks held constant."""
        first, last = self._first, self._last
        return [torch.cat([each[:first].detach(), each[first:last]]) for each in self.parameters()]

    def penalty(self) -> Tensor:
        """How far prefixes, keys and attention vectors in use are from orthonormal rows, a single number."""
        return torch.stack([_distance(each.flatten(1)) for each in self.in_use()]).sum()


class _Source:
    """The keys and values that the tasks' pools in a block compose for each image (a `memtune.streams.KeyValueSource`).

    Shorter prompts than others' have rows masked.

    Args:
        stack: The tasks' pools.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._pools = [stack.tensor(name) for name in ("prefix", "prefix_key", "prefix_attention")]
        self._trained = stack.tensor("trained")
        sizes = torch.tensor(stack.sizes(lambda pool: pool.prefix.shape[1] // 2), device=stack.parts[0].prefix.device)
        places = torch.arange(int(sizes.max()), device=sizes.device)
        alike = bool((sizes == sizes[0]).all())
        self._present = None if alike else places < sizes[:, None]  # (entries, half of the longest)
        self._second_half = sizes[:, None] + places

    def __call__(self, block: Block, current: Pass) -> KeysValues:
        """The two halves of each image's prompts as keys and values, each (batch, tasks, heads, rows, head width)."""
        assert current.query is not None
        prompts = self.compose(current.query)
        if self._present is None:
            halves, present = prompts.chunk(2, dim=2), None
        else:
            present = self._stack.spread(self._present)
            second = self._stack.spread(self._second_half).clamp_max(prompts.shape[2] - 1).unsqueeze(-1)
            second = second.expand(*prompts.shape[:2], -1, prompts.shape[3])
            halves = prompts[:, :, : present.shape[-1]], prompts.gather(2, second)
        key, value = (half.unflatten(-1, (-1, block.head_width)).transpose(2, 3) for half in halves)
        return KeysValues(key, value, present)

    def compose(self, query: Tensor) -> Tensor:
        """The prompts p (batch, tasks, length, width) of each query (batch, query width)."""
        pools = [pool() for pool in self._pools]
        if torch.is_grad_enabled():
            pools = [_held(each, self._trained()) for each in pools]
        prefix, key, attention = map(in_front, pools, (5, 4, 4))
        return _compose(query, prefix, key, attention)


def _held(pool: Tensor, trained: Tensor) -> Tensor:
    """The same pool (..., pool, ...), with gradients only to the prompts that are trained, (..., pool)."""
    chosen = trained.bool().view(*trained.shape, *[1] * (pool.ndim - trained.ndim))
    return torch.where(chosen, pool, pool.detach())


def _compose(query: Tensor, prefix: Tensor, key: Tensor, attention: Tensor) -> Tensor:
    """Prompts (batch, tasks, length, width) of queries (batch, query width).

    Args:
        query: The queries.
        prefix: (1 or batch, tasks, pool, length, width).
        key: (1 or batch, tasks, pool, query width).
        attention: (1 or batch, tasks, pool, query width).
    """
    query = query.to(key.dtype)
    with torch.autocast(query.device.type, enabled=False):
        # cos(q * A_m, K_m) by matrix products, which take no (batch, pool, width) tensor
        squares = torch.einsum("nd,ntmd->ntm", query.square(), attention.square())  # |q * A_m|^2
        lengths = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        weights = torch.einsum("nd,ntmd->ntm", query, attention * nn.functional.normalize(key, dim=-1)) / lengths
        return torch.einsum("ntm,ntmld->ntld", weights, prefix)


def _distance(rows: Tensor) -> Tensor:
    """The mean square of all inner products of rows (number, width), less the identity."""
    return (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().mean()


def _orthogonalise(matrix: Tensor, rows: slice) -> None:
    """Fill rows of a matrix with unit vectors: Gaussian ones less their projections on each row before.

    Earlier rows that have been trained are not quite orthogonal to each other; like the released code, this takes the
    projection on each of them alone.
    """
    for index in range(rows.start, rows.stop):
        before, drawn = matrix[:index], torch.randn_like(matrix[index])
        shares = before @ drawn / before.square().sum(dim=1)
        drawn -= shares @ before
        matrix[index] = drawn / drawn.norm()


@register_method
class CodaPromptAdapter(Adapter[CodaPromptConfig]):
    """Pools of prompts for the blocks of one backbone; in masked mode only the task token sees the prompts.

    Where the backbone has no class token, the query is the feature that its own kind of head reads.
    """

    config_class = CodaPromptConfig

    def __init__(self, config: CodaPromptConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        chosen = config.select(backbone)
        most = min([backbone.width, *(config.prompt_length * block.width for block in chosen)])
        if config.pool_size > most:
            raise ConfigError(
                f"pool_size: got {config.pool_size}, but rows as wide as this backbone's can have at most {most} that "
                "are orthogonal"
            )
        pools = {str(block.index): BlockPool(config, block.width, backbone.width) for block in chosen}
        self.blocks = nn.ModuleDict(pools)

    def _pools(self) -> dict[int, BlockPool]:
        return {int(index): pool for index, pool in self.blocks.items() if isinstance(pool, BlockPool)}

    def start_task(self, task: int) -> None:
        """Begin the next task of a sequence: its rows are drawn, those of earlier tasks are held constant.

        Make a new optimizer afterwards, without weight decay: decay, and moments from the task before, would move rows
        that get no gradient. Naming the present task again changes nothing.

        Raises:
            ConfigError: The task is neither the present one nor the next, or the pool has no rows for it.
        """
        if task == self.config.task:
            return
        if task != self.config.task + 1:
            raise ConfigError(f"task: got {task!r} after task {self.config.task}; tasks begin one after another")
        self.config = replace(self.config, task=task)
        for pool in self._pools().values():
            pool.start(self.config.trained())

    def penalty(self) -> Tensor | None:
        """The orthogonality loss of all blocks, weighted."""
        if not self.config.ortho_mu:
            return None
        return self.config.ortho_mu * torch.stack([pool.penalty() for pool in self._pools().values()]).sum()

    @classmethod
    def attach(cls, stream: Stream, adapters: Sequence[Any]) -> None:
        """Give each block's attention the keys and values that its pools compose."""
        stream.require_query()
        for block, stack in stream.stacks(adapters):
            stream.sites[block.index].sources.append(_Source(stack))
