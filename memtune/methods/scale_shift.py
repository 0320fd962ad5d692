"""Scaling and shifting of features.

"Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning" (Lian et al., NeurIPS 2022,
https://arxiv.org/abs/2210.08823). A linear layer W in a chosen role becomes

    y = s (W x + b) + t,    s and t (d_out), 1 and 0 at first

The paper does so after every operation, norms and patch embedding included; here it is after linear layers alone. With
LoRA, in whatever order they are named, it scales what the updated layer gives: DiffScaler's affiner
(https://arxiv.org/abs/2404.09976), as far as its abstract tells.

Masked (ours), the task token's query, out, fc1 and fc2 are changed; keys and values that it sees are the trunk's.

Parameters: 2 d_out for each block and role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..errors import ConfigError
from ..streams import Stack, Stream
from .adapter import Adapter, AdapterConfig
from .low_rank import stacks_by_role
from .peft_names import LINEAR_ROLES, check_roles
from .registry import register_method

_OF_THE_TRUNK = ("key", "value")
"""Roles that in masked mode are the trunk's."""


@dataclass(frozen=True)
class ScaleShiftConfig(AdapterConfig):
    """Settings of scaling and shifting.

    Example:
        >>> model = memtune.wrap(backbone, memtune.ScaleShiftConfig(), labels=["cat", "dog"])

    Args:
        roles: The linear layers to change, of `query`, `key`, `value`, `out`, `fc1`, `fc2`. None for all six in
            unmasked mode, for all but key and value in masked mode.
        blocks: Indices of the blocks to change; None for all, as in the paper.
    """

    method: ClassVar[str] = "scale_shift"

    roles: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.roles is not None:
            object.__setattr__(self, "roles", check_roles(self.roles))

    def for_mode(self, masked: bool) -> ScaleShiftConfig:
        """Fill in the roles."""
        if masked and (theirs := [role for role in self.roles or () if role in _OF_THE_TRUNK]):
            raise ConfigError(
                f"roles: got {theirs} with masked=True, where a task token reads the trunk's keys and values; leave "
                "them out, or use LoraConfig, which updates what the token sees of them"
            )
        own = tuple(role for role in LINEAR_ROLES if not masked or role not in _OF_THE_TRUNK)
        return replace(self, roles=self.roles or own)


class ScaleShift(nn.Module):
    """The scale and shift of one role of one block.

    Args:
        width: That of the layer's output.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))


class ScaledLinear(nn.Module):
    """A linear layer of a view with the scales and shifts of the stream's tasks.

    Args:
        base: The layer of the view.
        stack: The `ScaleShift` of each task.
    """

    def __init__(self, base: Any, stack: Stack) -> None:
        super().__init__()
        self.base = base
        self._scale, self._shift = stack.tensor("scale", neutral=1.0), stack.tensor("shift")

    def forward(self, states: Tensor) -> Tensor:
        """S (W x + b) + t of states (rows, tokens, d_in)."""
        output = self.base(states)
        return output * self._scale.like(output) + self._shift.like(output)


@register_method
class ScaleShiftAdapter(Adapter[ScaleShiftConfig]):
    """Scales and shifts of the linear layers of one backbone's blocks."""

    config_class = ScaleShiftConfig
    needs_attention_function = False
    attached_last = True

    def __init__(self, config: ScaleShiftConfig, backbone: Backbone) -> None:
        config = config.for_mode(masked=False)  # where no mode was chosen
        super().__init__(config, backbone)
        self.blocks = nn.ModuleDict(
            {
                str(block.index): nn.ModuleDict(
                    {role: ScaleShift(block[role].out_features) for role in config.roles or ()}
                )
                for block in config.select(backbone)
            }
        )

    @classmethod
    def attach(cls, stream: Stream, adapters: Sequence[Any]) -> None:
        """Put the scales and shifts behind the view's linear layers."""
        for block, stack in stream.stacks(adapters):
            for role, own in stacks_by_role(stack).items():
                block.replace(role, ScaledLinear(block[role], own))

    @torch.no_grad()
    def merge_into(self, backbone: Backbone) -> None:
        """Write the scales and shifts into the weights and biases.

        Raises:
            ConfigError: A weight is quantised, or a layer has no bias to hold the shift.
        """
        for index, roles in self.blocks.items():
            for role, own in dict(roles.items()).items():  # type: ignore[attr-defined]
                with backbone.blocks[int(index)].changing(role) as base:
                    if not base.weight.is_floating_point() or base.bias is None:
                        what = "has no bias" if base.bias is None else f"is quantised ({type(base).__name__})"
                        raise ConfigError(
                            f"blocks.{index}.{role} {what}: scale and shift cannot be written into it; run the adapter "
                            "as it is"
                        )
                    base.weight.mul_(own.scale.to(base.weight.dtype)[:, None])
                    base.bias.mul_(own.scale.to(base.bias.dtype)).add_(own.shift.to(base.bias.dtype))
