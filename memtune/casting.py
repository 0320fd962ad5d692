"""Frozen linear layers under autocast: their weights are cast once, not at each pass.

Autocast keeps what it has cast of a parameter only where that needs a gradient. A task stream has few tokens, so that
casting the backbone's weights for them takes as long as computing with them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class _Cast(NamedTuple):
    """What was made of a parameter, and of which state of it."""

    source: Tensor
    place: int
    version: int
    result: Tensor

    def holds(self, parameter: Tensor, dtype: torch.dtype) -> bool:
        """Whether it is what would be made of a parameter now."""
        same = self.source is parameter and self.place == parameter.data_ptr() and self.version == parameter._version
        return same and self.result.dtype == dtype


class FrozenLinear(nn.Linear):
    """A frozen linear layer of a view that keeps its weight and bias in the type that autocast asks for."""

    _casts: dict[str, _Cast]

    def forward(self, input: Tensor) -> Tensor:
        """W x + b of x (..., in), as ever."""
        device = input.device.type
        casts = torch.is_autocast_enabled(device) and self.weight.dtype != torch.float64  # as autocast itself
        keeps = casts and not self.weight.requires_grad
        if not keeps or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        dtype = torch.get_autocast_dtype(device)
        return linear(input, self._cast("weight", dtype), None if self.bias is None else self._cast("bias", dtype))

    def _cast(self, name: str, dtype: torch.dtype) -> Tensor:
        parameter = getattr(self, name)
        cast = self._casts.get(name)
        if cast is None or not cast.holds(parameter, dtype):
            cast = _Cast(parameter, parameter.data_ptr(), parameter._version, parameter.detach().to(dtype))
            self._casts[name] = cast
        return cast.result


def keep_casts(module: nn.Module) -> None:
    """Let the linear layers in a module of a view keep their weights under autocast.

    Layers of other classes (quantised ones) and weights in shards are left as they are.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter:
            layer.__class__ = FrozenLinear
            layer.__dict__["_casts"] = {}
