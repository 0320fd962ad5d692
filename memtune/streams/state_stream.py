"""Masked mode without a token: states beside the trunk, of which the feature is made."""

from __future__ import annotations

import torch
from torch import Tensor

from .passes import Pass
from .task_stream import TaskStream


class StateStream(TaskStream):
    """The pass of the states that methods have beside the trunk; no block of the backbone runs again.

    Its tokens are none: (batch, 0, width).
    """

    def start(self, class_tokens: Tensor | None, *, batch: int) -> Tensor:
        """No tokens, (batch, 0, width)."""
        return torch.empty(batch, 0, self.view.width, device=self.view.model.device)

    def step(self, index: int, tokens: Tensor, current: Pass) -> Tensor:
        """Take the states through one block; the pass has them."""
        for side in self.sites[index].sides:
            side.states(current.block(index), current)
        return tokens

    def finish(self, tokens: Tensor, current: Pass) -> Tensor:
        """What the method makes of its last states, (batch, tasks, its width)."""
        assert self.readout is not None
        return self.readout(current)
