"""Low-rank updates of linear layers, W + s B A, on the layers of `peft`: of one task, and of several side by side.

And what such updates of the trunk's keys and values are to a task that sees them, without changing the trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import peft
import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from ..backbones import shadow
from ..streams import Stack, fit_rows, per_task

_NAME = "default"
"""What peft calls the one adapter of a layer."""

Matrices: TypeAlias = Callable[[], tuple[Tensor, Tensor]]
"""Gives A^T and s B^T of each task, (1 or rows, 1 or tasks, d_in, r) and (1 or rows, 1 or tasks, r, d_out)."""


class LowRank(nn.Module):
    """The update of one role of one block: A, B and, with DoRA, the lengths of the rows.

    Args:
        base: The linear layer in that role.
        settings: As peft's LoRA takes them.
    """

    def __init__(self, base: nn.Module, settings: peft.LoraConfig) -> None:
        super().__init__()
        layer = _peft_layer(base, settings)
        self.scaling: float = layer.scaling[_NAME]
        self.lora_A = nn.Parameter(layer.lora_A[_NAME].weight.detach().float())
        self.lora_B = nn.Parameter(layer.lora_B[_NAME].weight.detach().float())
        self.lora_dropout = layer.lora_dropout[_NAME]
        if settings.use_dora:
            # Again, since A and B now have full precision, which the lengths of an unchanged weight must have too.
            lengths = layer.lora_magnitude_vector[_NAME]
            lengths.update_layer(
                base_layer=layer.get_base_layer(), lora_A=self.lora_A, lora_B=self.lora_B, scaling=self.scaling
            )
            self.lora_magnitude = nn.Parameter(lengths.weight.detach().float())
        del layer._modules["base_layer"]  # the backbone's; a layer for any view of it is made from this one by `on`
        self._layer = (layer,)  # in a tuple, so that its parameters count once

    def on(self, base: nn.Module) -> Any:
        """The layer of `peft` with these parameters, around the linear layer of a view."""
        layer: Any = shadow(self._layer[0])
        layer.base_layer = base
        layer.merged_adapters, layer._caches = [], {}
        layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight = self.lora_A, self.lora_B
        layer.lora_dropout[_NAME] = self.lora_dropout
        if layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[_NAME].weight = self.lora_magnitude
        layer.training = self.training
        return layer

    def down_up(self) -> tuple[Tensor, Tensor]:
        """A^T (d_in, r) and s B^T (r, d_out)."""
        return self.lora_A.T, self.lora_B.T * self.scaling

    def of_one_task(self) -> tuple[Tensor, Tensor]:
        """The same where all rows and tokens are one task's, (1, 1, ..., ...) each."""
        down, up = self.down_up()
        return down[None, None], up[None, None]

    def row_scale(self, base: Any) -> Tensor | None:
        """DoRA's factor of each row, (d_out): its trained length over that of W + s B A; None without DoRA."""
        if not hasattr(self, "lora_magnitude"):
            return None
        down, up = self.down_up()
        return self.lora_magnitude / (base.weight.to(up.dtype) + (down @ up).T).norm(dim=1)


def _peft_layer(base: nn.Module, settings: peft.LoraConfig) -> Any:
    """The LoRA layer of `peft` for a linear layer, which may be one of bitsandbytes'."""
    options = {"r": settings.r, "lora_alpha": settings.lora_alpha, "loaded_in_8bit": True, "loaded_in_4bit": True}
    return LoraModel._create_new_module(settings, _NAME, base, **options)


class SeenUpdates:
    """Lets tasks see K' and V' without computing them (a `memtune.streams.TrunkReader`).

    A task's query in a head, 0 in what is other heads' of the width, is a query x on all of K: x K'^T = q_h K'_h^T. And
    of a context of all of V what is the head's own is kept. So the updates are those of what asks and what is answered:

        x K'^T = (x + s x B A) K^T,    p V' = p V + s (p V) A^T B^T

    Keys and values are read once, whatever the rank.

    Args:
        key: The matrices of the keys' update, or None.
        value: Those of the values'.
        dropout: What the input of A goes through in training: the same for all tokens of an image.
    """

    def __init__(self, key: Matrices | None, value: Matrices | None, dropout: nn.Module | None = None) -> None:
        self._key, self._value, self._dropout = key, value, dropout

    def queries(self, query: Tensor) -> Tensor | None:
        """S x B A of queries x on all of K, (rows, heads, tasks, width)."""
        if self._key is None:
            return None
        down, up = self._key()
        return self._dropped(_through(query, up.mT, down.mT))

    def context(self, context: Tensor) -> Tensor | None:
        """S (p V) A^T B^T of p V, (rows, heads, tasks, width)."""
        return None if self._value is None else _through(self._dropped(context), *self._value())

    def _dropped(self, states: Tensor) -> Tensor:
        return states if self._dropout is None else self._dropout(states)


def _through(states: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The product of states (rows, heads, tasks, in) with two matrices of their tasks, one after the other."""
    if first.shape[1] == 1:  # one task for each row, so that heads are like tokens
        return per_task(per_task(states.flatten(1, 2), first), second).unflatten(1, states.shape[1:3])
    return per_task(per_task(states.flatten(0, 1), first), second).unflatten(0, states.shape[:2])


class UpdateStack:
    """The matrices of several tasks' updates of one role in one block.

    Args:
        stack: The tasks' parts.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._down = stack.rows(lambda part: part.down_up()[0])  # (tasks, d_in, r)
        self._up = stack.rows(lambda part: part.down_up()[1])  # (tasks, r, d_out)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """A^T and s B^T of the tasks that the pass is for, (1 or images, 1 or tasks, ..., ...) each."""
        return self._stack.chosen(self._down), self._stack.chosen(self._up)


class StackedLinear(nn.Module):
    """A linear layer with each task's own update.

    Args:
        base: The layer of the view.
        stack: The tasks' parts.
    """

    def __init__(self, base: Any, stack: Stack) -> None:
        super().__init__()
        self.base = base
        self._stack = stack
        self._matrices = UpdateStack(stack)
        scaled = any(part.row_scale(base) is not None for part in stack.parts)
        self._scale = stack.rows(partial(_scale_or_ones, base), neutral=1.0) if scaled else None  # (tasks, d_out)

    def forward(self, states: Tensor) -> Tensor:
        """W x + b + s B A x, with DoRA each row of the sum but b scaled, of states (rows, tokens, d_in)."""
        down, up = self._matrices()
        output = self.base(states)
        update = per_task(per_task(states.to(down.dtype), down), up).to(output.dtype)
        if self._scale is None:
            return output + update
        bias = 0 if self.base.bias is None else self.base.bias
        scale = fit_rows(self._stack.chosen(self._scale), states.shape[0]).to(output.dtype)
        return (output - bias + update) * scale + bias


def _scale_or_ones(base: Any, part: LowRank) -> Tensor:
    scale = part.row_scale(base)
    return torch.ones_like(part.lora_B[:, 0]) if scale is None else scale
