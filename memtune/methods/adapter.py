"""What every method is made of: a configuration, and an adapter that owns its parameters."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from ..backbones import Backbone, Block
from ..errors import ConfigError
from ..streams import Stream


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of one method. Subclasses are frozen dataclasses that set `method` and add fields.

    Example:
        >>> memtune.MemoryConfig(tokens=2, blocks=[-1]).to_dict()["blocks"]  # the last block alone
        [-1]

    Args:
        blocks: Indices of the blocks that the method changes, 0 for the first and -1 for the last; None for all.
    """

    method: ClassVar[str]

    blocks: Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.blocks is None:
            return
        sequence = isinstance(self.blocks, Sequence) and not isinstance(self.blocks, str)
        if not sequence or not all(type(index) is int for index in self.blocks):
            raise ConfigError(
                f"blocks: got {self.blocks!r}, expected a sequence of block indices or None for all blocks"
            )
        object.__setattr__(self, "blocks", tuple(self.blocks))

    def trains_class_token(self) -> bool:
        """Whether the task gets a class token of its own in unmasked mode too (in masked mode every task has one)."""
        return False

    def feature_width(self, backbone: Backbone) -> int | None:
        """Width of the feature that the method itself makes for the head, so that no token is needed; else None."""
        return None

    @classmethod
    def adopt(cls, value: Any) -> AdapterConfig | None:
        """The settings that a configuration of another library gives, or None where the method knows no such."""
        return None

    def for_mode(self, masked: bool) -> AdapterConfig:
        """The settings with those filled in that depend on the mode.

        Raises:
            ConfigError: A setting is not possible in that mode.
        """
        return self

    def select(self, backbone: Backbone) -> list[Block]:
        """The blocks of a backbone that the method changes, in order.

        Raises:
            ConfigError: An index is outside the backbone, or named twice.
        """
        if self.blocks is None:
            return backbone.blocks
        outside = [index for index in self.blocks if not -backbone.depth <= index < backbone.depth]
        if outside:
            raise ConfigError(f"blocks: got {outside}, expected indices below the backbone's {backbone.depth} blocks")
        chosen = sorted(index % backbone.depth for index in self.blocks)
        if len(set(chosen)) < len(chosen):
            raise ConfigError(f"blocks: got {list(self.blocks)}, which names a block twice")
        return [backbone.blocks[index] for index in chosen]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, the method's name among them."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {"method": self.method} | values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: A name that the method does not have.
        """
        settings = {name: value for name, value in values.items() if name != "method"}
        known = [each.name for each in dataclasses.fields(cls) if each.init]
        if unknown := sorted(set(settings) - set(known)):
            raise ConfigError(f"{cls.__name__}: got the unknown settings {unknown}; it has {known}")
        return cls(**settings)


ConfigT = TypeVar("ConfigT", bound=AdapterConfig)


class Adapter(nn.Module, ABC, Generic[ConfigT]):
    """One method's parameters on one backbone. The names of the parameters are roles, such as `blocks.3.memory`.

    A subclass sets `config_class`, creates its parameters in `__init__`, those of a block in `blocks`, an
    `nn.ModuleDict` by the block's index, and puts them to work in `attach`.

    Example:
        >>> model = memtune.wrap(backbone, memtune.MemoryConfig(4), labels=["cat", "dog"])
        >>> [type(adapter).__name__ for adapter in model.task.adapters]
        ['MemoryAdapter']

    Attributes:
        attached_last: Whether it changes what other methods give, so that it is attached, and merged, after them,
            whatever the order in which a task names its methods.
        needs_attention_function: False if `attach` leaves a stream's sites alone in unmasked mode; the method then also
            runs on backbones that do not use transformers' AttentionInterface.

    Args:
        config: The method's settings.
        backbone: The backbone that is adapted; its shapes decide those of the parameters.
    """

    config_class: ClassVar[type[AdapterConfig]]
    needs_attention_function: ClassVar[bool] = True
    attached_last: ClassVar[bool] = False

    def __init__(self, config: ConfigT, backbone: Backbone) -> None:
        super().__init__()
        self.config: ConfigT = config

    @classmethod
    @abstractmethod
    def attach(cls, stream: Stream, adapters: Sequence[Any]) -> None:
        """Make a stream use the adapters of its tasks by changing its view and its sites; the original stays as it is.

        `stream.stacks(adapters)` gives, block by block, what all of them have there side by side: of one task or of
        many, in training or not, the same lines serve.

        Args:
            stream: The stream.
            adapters: For each task of the stream its adapter of this method, or None.
        """

    def changed_blocks(self, backbone: Backbone) -> list[int]:
        """Indices of the blocks that the adapter changes."""
        return [block.index for block in self.config.select(backbone)]

    def start_task(self, task: int) -> None:
        """Be told, in class-incremental learning, that the task of this number begins, 0 for the first."""

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss in training, a single number, or None."""
        return None

    def merge_into(self, backbone: Backbone) -> None:
        """Write what the adapter does in unmasked mode into the weights of a backbone of its own (a copy).

        Raises:
            ConfigError: The method is not a change of weights.
        """
        raise ConfigError(f"the method {self.config.method!r} cannot be merged: it is not a change of weights")
