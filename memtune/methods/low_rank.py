"""Low-rank updates of linear layers, W + s B A, of one task or of several side by side; initial values are `peft`'s.

And what such updates of the trunk's keys and values are to a task token, without changing the trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraModel
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..backbones import shadow
from ..errors import ConfigError
from ..streams import Stack, fit_rows, per_task

_NAME = "default"
"""What peft calls the one adapter of a layer."""


class LowRank(nn.Module):
    """The update of one role of one block: A, B and, with DoRA, the lengths of the weight's rows.

    Args:
        base: The linear layer in that role.
        settings: As peft's LoRA takes them.
    """

    def __init__(self, base: nn.Module, settings: peft.LoraConfig) -> None:
        super().__init__()
        layer = _peft_layer(base, settings)
        self.scaling: Tensor
        self.register_buffer("scaling", torch.tensor([float(layer.scaling[_NAME])]), persistent=False)
        self.lora_A = nn.Parameter(layer.lora_A[_NAME].weight.detach().float())
        self.lora_B = nn.Parameter(layer.lora_B[_NAME].weight.detach().float())
        self.lora_dropout = layer.lora_dropout[_NAME]
        if settings.use_dora:
            # Again, since A and B now have full precision, which the lengths of an unchanged weight must have too.
            lengths = layer.lora_magnitude_vector[_NAME]
            lengths.update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=self.lora_A,
                lora_B=self.lora_B,
                scaling=layer.scaling[_NAME],
            )
            self.lora_magnitude = nn.Parameter(lengths.weight.detach().float())
        del layer._modules["base_layer"]  # the backbone's; a layer for any view of it is made from this one by `on`
        self._layer = (layer,)  # in a tuple, so that its parameters count once

    def on(self, base: nn.Module) -> Any:
        """The layer of `peft` with these parameters, around a linear layer, to merge it."""
        layer: Any = shadow(self._layer[0])
        layer.base_layer = base
        layer.merged_adapters, layer._caches = [], {}
        layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight = self.lora_A, self.lora_B
        layer.lora_dropout[_NAME] = self.lora_dropout
        if layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[_NAME].weight = self.lora_magnitude
        layer.training = self.training
        return layer


def _peft_layer(base: nn.Module, settings: peft.LoraConfig) -> Any:
    """The LoRA layer of `peft` for a linear layer, which may be one of bitsandbytes'."""
    options = {"r": settings.r, "lora_alpha": settings.lora_alpha, "loaded_in_8bit": True, "loaded_in_4bit": True}
    try:
        return LoraModel._create_new_module(settings, _NAME, base, **options)
    except ValueError as error:
        raise ConfigError(
            f"lora: got a {type(base).__module__}.{type(base).__name__} as one of the backbone's layers, which peft's "
            "LoRA does not know; use another method, or a backbone with plain layers or those of bitsandbytes"
        ) from error


class _Factors:
    """The matrices of the tasks' updates of one role in one block.

    Args:
        stack: The `LowRank` of each task.
    """

    def __init__(self, stack: Stack) -> None:
        self._lora_A, self._lora_B = stack.tensor("lora_A"), stack.tensor("lora_B")
        self.scaling = stack.tensor("scaling")
        # Several tasks that are trained at once drop nothing: each would drop values of its own.
        self.dropout = nn.Identity() if stack.alone is None else stack.alone.lora_dropout

    def __call__(self) -> tuple[Tensor, Tensor]:
        """A (..., r, d_in) and B (..., d_out, r); `...` is nothing for one task, else (1 or rows, 1 or tasks)."""
        return self._lora_A(), self._lora_B()

    def scaled(self) -> tuple[Tensor, Tensor]:
        """A and s B."""
        return self._lora_A(), self._lora_B() * self.scaling().unsqueeze(-1)

    @property
    def drops(self) -> bool:
        """Whether the input of A is another than that of W at present."""
        return isinstance(self.dropout, nn.Dropout) and self.dropout.training and self.dropout.p > 0


class AdaptedLinear(nn.Module):
    """A linear layer of a view with the updates of the stream's tasks.

    Args:
        base: The layer of the view.
        stack: The `LowRank` of each task.
    """

    def __init__(self, base: Any, stack: Stack) -> None:
        super().__init__()
        self.base = base
        self._factors = _Factors(stack)
        self._scale = _Lengths.of(stack, base)

    def forward(self, states: Tensor) -> Tensor:
        """W x + b + s B A x, with DoRA each row of the sum but b scaled, of states (rows, tokens, d_in)."""
        down, up = self._factors()
        output = self.base(states)
        dropped = self._factors.dropout(states.to(down.dtype))
        update = per_task(per_task(dropped, down.mT), up.mT)
        scaling = self._factors.scaling.like(update)
        update = (update * scaling).to(output.dtype)
        if self._scale is None:
            return output + update
        bias = 0 if self.base.bias is None else self.base.bias
        # "DoRA" drops what its scale changes of W x as well, as peft's does.
        plain = (self.base(dropped.to(states.dtype)) if self._factors.drops else output) - bias
        scale = self._scale(output)
        return output + (scale - 1) * plain + scale * update


class _Lengths:
    """DoRA's factor of each row of a weight: its trained length over that of W + s B A, held constant (section 4.3).

    Args:
        stack: The `LowRank` of each task.
        trained: Those that have lengths.
        base: The layer.
    """

    def __init__(self, stack: Stack, trained: Stack, base: Any) -> None:
        self._real = stack.made(partial(_row_lengths, base), "lora_A", "lora_B", "scaling", neutral=1.0, of=[base])
        self._trained = trained.tensor("lora_magnitude", neutral=torch.nan)

    @classmethod
    def of(cls, stack: Stack, base: Any) -> _Lengths | None:
        """The factors of the tasks in a stack; None if no task has any."""
        trained = stack.of(lambda part: part if hasattr(part, "lora_magnitude") else None)
        return None if trained is None else cls(stack, trained, base)

    def __call__(self, output: Tensor) -> Tensor:
        """The factors for an output (rows, tokens, d_out): (1 or rows, 1 or tasks, d_out); 1 for a task without."""
        scale = self._trained() / self._real()
        if not self._trained.complete:
            scale = torch.where(scale.isnan(), torch.ones_like(scale), scale)
        return (scale if scale.ndim == 1 else fit_rows(scale, output.shape[0])).to(output.dtype)


def _row_lengths(base: Any, down: Tensor, up: Tensor, scaling: Tensor) -> Tensor:
    """The lengths (..., d_out) of the rows of W + s B A, for A (..., r, d_in), B (..., d_out, r) and s (..., 1)."""
    weight = base.weight if base.weight.is_floating_point() else dequantize_module_weight(base)
    weight = weight.to(up.dtype)
    with torch.no_grad():
        return (weight + scaling.unsqueeze(-1) * (up @ down)).norm(dim=-1)


class TrunkFactors:
    """Lets task tokens see K' and V' without computing them (a `memtune.streams.TrunkUpdate`).

    A task's query in a head, 0 in what is other heads' of the width, is a query x on all of K: x K'^T = q_h K'_h^T. And
    of a context of all of V what is the head's own is kept. So the updates are those of what asks and what is answered:

        x K'^T = (x + s x B A) K^T,    p V' = p V + s (p V) A^T B^T

    Keys and values are read once, whatever the rank.

    Args:
        key: The updates of the keys, or None.
        value: Those of the values. In training the input of A goes through one dropout for both, the same for all
            tokens of an image.
    """

    def __init__(self, key: Stack | None, value: Stack | None) -> None:
        self._key = None if key is None else _Factors(key)
        self._value = None if value is None else _Factors(value)

    def queries(self, query: Tensor) -> Tensor | None:
        """S x B A of queries x on all of K, (rows, heads, tasks, width)."""
        if self._key is None:
            return None
        down, up = self._key.scaled()
        return self._key.dropout(_through(query, up, down))

    def context(self, context: Tensor) -> Tensor | None:
        """S (p V) A^T B^T of p V, (rows, heads, tasks, width)."""
        if self._value is None:
            return None
        down, up = self._value.scaled()
        return _through(self._value.dropout(context), down.mT, up.mT)


def _through(states: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The product of states (rows, heads, tasks, in) with two matrices of their tasks, one after the other."""
    if first.ndim == 2:
        return per_task(per_task(states, first), second)
    if first.shape[1] == 1:  # one task for each row, so that heads are like tokens
        return per_task(per_task(states.flatten(1, 2), first), second).unflatten(1, states.shape[1:3])
    return per_task(per_task(states.flatten(0, 1), first), second).unflatten(0, states.shape[:2])


def stacks_by_role(stack: Stack) -> dict[str, Stack]:
    """Of parts that are dictionaries of updates by role, those of each role that one of them has."""
    roles: Sequence[str] = list(dict.fromkeys(role for part in stack.parts for role in part))
    found = {role: stack.of(lambda part, role=role: dict(part.items()).get(role)) for role in roles}
    return {role: own for role, own in found.items() if own is not None}
