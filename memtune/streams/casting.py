"""Frozen linear layers under autocast: their weights are cast once for all views, not at each pass of each.

Autocast keeps what it has cast of a parameter only where that needs a gradient. A task stream has few tokens, so that
casting the backbone's weights for them takes as long as computing with them. On an accelerator a cast takes less time
than finding out whether the weight has changed, so there autocast does as ever.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.weak import WeakIdKeyDictionary

from ..keeping import Kept


class FrozenLinear(nn.Linear):
    """A frozen linear layer of a view that keeps its weight and bias in the type that autocast asks for."""

    _kept: dict[str, Kept[Tensor]]
    _casts: dict[str, Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """W x + b of x (..., in), as ever."""
        casts = torch.is_autocast_enabled("cpu") and self.weight.dtype != torch.float64  # as autocast itself
        keeps = casts and input.device.type == "cpu" and not self.weight.requires_grad
        if not keeps or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        dtype = torch.get_autocast_dtype("cpu")
        return linear(input, self._cast("weight", dtype), None if self.bias is None else self._cast("bias", dtype))

    def _cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter in autocast's type; made anew when the parameter has changed."""
        self._casts[name] = cast = self._kept[name].of([getattr(self, name)], state=dtype)
        return cast


@dataclass
class _Casts:
    """What is cast of a layer, by the names of its parameters, for all views that have it."""

    kept: dict[str, Kept[Tensor]]
    casts: dict[str, Tensor] = field(default_factory=dict)


_OF_LAYERS: MutableMapping[Any, _Casts] = WeakIdKeyDictionary()
"""The casts of each layer, by its weight."""


def _cast(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.get_autocast_dtype("cpu"))


def keep_casts(module: nn.Module) -> None:
    """Let the linear layers in a module of a view keep their weights under autocast.

    Layers of other classes (quantised ones) and weights in shards are left as they are.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter:
            layer.__class__ = FrozenLinear
            shared = _OF_LAYERS.setdefault(layer.weight, _Casts({name: Kept(_cast) for name in layer._parameters}))
            layer.__dict__["_kept"], layer.__dict__["_casts"] = shared.kept, shared.casts
