"""Parts of fused linear layers: where a model has query, key and value in one layer, each as a layer of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class LinearPart(nn.Linear):
    """Some rows of a linear layer as a layer, which has no tensors but that one's.

    They are taken at each use, so that the whole can be moved, cast or given other weights.

    Args:
        whole: The fused layer.
        start: Its first output that is this layer's.
        stop: The one after the last.
    """

    def __init__(self, whole: nn.Linear, start: int, stop: int) -> None:
        nn.Module.__init__(self)  # without parameters
        self.in_features, self.out_features = whole.in_features, stop - start
        self._whole = (whole,)  # in a tuple, as it is no child: its parameters are listed where it is one
        self._rows = slice(start, stop)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, (outputs, inputs): a view of the whole's."""
        return self._whole[0].weight[self._rows]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias, (outputs,), or None."""
        bias: Tensor | None = self._whole[0].bias
        return None if bias is None else bias[self._rows]

    def named_parameters(  # type: ignore[override]
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The weight and the bias."""
        start = f"{prefix}." if prefix else ""
        named = ((f"{start}{name}", tensor) for name, tensor in (("weight", self.weight), ("bias", self.bias)))
        return ((name, tensor) for name, tensor in named if tensor is not None)

    @torch.no_grad()
    def separate(self) -> nn.Linear:
        """An ordinary layer with a copy of the same values."""
        weight, bias = self.weight, self.bias
        layer: Any = nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, bias is not None, device=weight.device, dtype=weight.dtype
        )
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    @torch.no_grad()
    def write(self, layer: nn.Linear) -> None:
        """Write the values of an ordinary layer into the whole."""
        self.weight.copy_(layer.weight)
        if self.bias is not None:
            self.bias.copy_(layer.bias)
