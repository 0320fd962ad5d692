"""Frozen backbones: who uses one, and how it was before the first of them came."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary, WeakSet

from torch import nn


class Hold:
    """Keeps a backbone frozen for one tuned model. Several may hold the same; the last to go gives it back as it was.

    Attributes:
        thawed: Names of the parameters that were trainable.
        was_training: Whether the backbone was in training mode.
    """

    def __init__(self, backbone: nn.Module) -> None:
        with _COUNTING:
            other = next(iter(_HOLDS.get(backbone, ())), None)
            if other is None:
                self.thawed = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
                self.was_training = backbone.training
            else:
                self.thawed, self.was_training = other.thawed, other.was_training
            self.join(backbone)

    def join(self, backbone: nn.Module) -> None:
        """Freeze the backbone and be known as one that holds it (after copying, a copy of the backbone)."""
        with _COUNTING:
            _HOLDS.setdefault(backbone, WeakSet()).add(self)
            backbone.requires_grad_(False)

    def release(self, backbone: nn.Module) -> None:
        """Let go; unless another holds it, the backbone gets its trainable parameters and its mode back."""
        with _COUNTING:
            holds = _HOLDS.get(backbone, WeakSet())
            holds.discard(self)
            if holds:
                return
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad_(name in self.thawed)
            backbone.train(self.was_training)


_HOLDS: WeakKeyDictionary[nn.Module, WeakSet[Hold]] = WeakKeyDictionary()

_COUNTING = threading.RLock()
"""Held while it is counted who holds a backbone, and while that is frozen or given back."""
