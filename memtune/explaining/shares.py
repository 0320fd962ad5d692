"""What a token's attention falls on in one block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """The attention weights of a token in one block, by what they fall on; all of them together sum to 1.

    Each is a float32 tensor (..., number), where `...` is nothing for a mean over heads, and heads where each has its
    own; `patches` is (..., rows, columns).

    Attributes:
        patches: On the patches, by their places in the image.
        own: On the token itself (number 1).
        class_token: On the backbone's own class token, where the token is another (number 1 or 0).
        registers: On the backbone's other tokens that are no patches: registers, a distillation token.
        earlier: On the tokens and memory of earlier tasks, where the task extends these.
        memory: On the task's memory tokens.
        further: On the keys of other methods, such as CODA's prompts.
    """

    patches: Tensor
    own: Tensor
    class_token: Tensor
    registers: Tensor
    earlier: Tensor
    memory: Tensor
    further: Tensor

    def shares(self) -> dict[str, Tensor]:
        """The part of the whole (...) that falls on each of the attributes, by its name."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part.sum(dim=(-2, -1) if name == "patches" else -1) for name, part in parts.items()}

    def apply(self, change: Callable[[Tensor], Tensor]) -> Attention:
        """The same with each part changed."""
        return Attention(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def __add__(self, other: Attention) -> Attention:
        return Attention(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )
