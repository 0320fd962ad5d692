"""Low-rank adaptation.

"LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685), on the
layers of `peft`, which also have DoRA (https://arxiv.org/abs/2402.09353) and rsLoRA (https://arxiv.org/abs/2312.03732).

Unmasked, a linear layer W in a chosen role becomes

    y = W x + b + s B A x,    A (r, d_in), B (d_out, r), s = alpha / r (rsLoRA: alpha / sqrt(r))

Masked (ours), the task token's query, out, fc1 and fc2 are changed in this way, and the keys and values that it sees
of the image are made of the trunk's, which stay as they are (the token's own, and those of memory, are not changed):

    K' = K + s (K A^T) B^T,    V' = V + s (V A^T) B^T,    K and V with all heads side by side, (tokens, width)

Parameters: r (d_in + d_out) for each block and role; DoRA adds d_out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import peft
from torch import nn

from ..backbones import Backbone
from ..errors import ConfigError
from ..streams import Stream
from .adapter import Adapter, AdapterConfig
from .low_rank import AdaptedLinear, LowRank, TrunkFactors, stacks_by_role
from .peft_names import LINEAR_ROLES, check_roles, roles_of_targets
from .registry import register_method

UNMASKED_ROLES = ("query", "value")
"""Section 4.2 of the paper adapts these two."""

UNMASKED_RANK = 8
"""As in peft."""

MASKED_RANK = 4
"""A task stream overfits: higher ranks were no better (docs/results.md)."""

INITIALISATIONS = (True, False, "gaussian", "orthogonal")
"""Those of peft's that need no data and leave the frozen weight as it is."""

_READ_FROM_PEFT = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights")
_ELSEWHERE_IN_PEFT = {"target_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
_NO_SETTING_IN_PEFT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "qalora_group_size", "runtime_config"),
}


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Settings of LoRA; names, meanings and defaults are those of `peft.LoraConfig`.

    Example:
        >>> config = memtune.LoraConfig(r=8, lora_alpha=16)
        >>> model = memtune.wrap(backbone, config, labels=["cat", "dog"])

    Args:
        r: The rank. None for 8 in unmasked mode, as in peft, and for 4 in masked mode.
        lora_alpha: The update is scaled by lora_alpha / r. 8, as in peft, whatever the rank is.
        roles: The linear layers to change, of `query`, `key`, `value`, `out`, `fc1`, `fc2`. None for query and value
            in unmasked mode, for all six in masked mode.
        lora_dropout: Probability of dropping a value of the input of A while training.
        use_rslora: Scale by lora_alpha / sqrt(r).
        use_dora: Train the length of each row of the changed weight too (in masked mode not for key and value).
        init_lora_weights: True for a uniform A, "gaussian" for a normal one, both with B = 0; "orthogonal" for A and B
            whose product is 0; False for a random product (to test).
        blocks: Indices of the blocks to change; None for all.
    """

    method: ClassVar[str] = "lora"

    r: int | None = None
    lora_alpha: float = 8
    roles: Sequence[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and (not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1):
            raise ConfigError(f"r: got {self.r!r}, expected a rank, a whole number from 1 on, or None")
        if not _is_number(self.lora_alpha) or not 0 < self.lora_alpha <= sys.float_info.max:
            raise ConfigError(f"lora_alpha: got {self.lora_alpha!r}, expected a number above 0")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: got {self.lora_dropout!r}, expected a probability below 1")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        if type(self.init_lora_weights) not in (bool, str) or self.init_lora_weights not in INITIALISATIONS:
            raise ConfigError(
                f"init_lora_weights: got {self.init_lora_weights!r}, expected one of {INITIALISATIONS}; peft's others "
                "change the frozen weight or need data"
            )
        if self.init_lora_weights == "orthogonal" and (self.r or 0) % 2:
            raise ConfigError(f"r: got {self.r}; init_lora_weights='orthogonal' takes an even rank")
        if self.roles is not None:
            object.__setattr__(self, "roles", check_roles(self.roles))

    @classmethod
    def adopt(cls, value: Any) -> AdapterConfig | None:
        """Take a `peft.LoraConfig`."""
        return cls.from_peft(value) if isinstance(value, peft.LoraConfig) else None

    @classmethod
    def from_peft(cls, config: peft.LoraConfig) -> LoraConfig:
        """The settings that a `peft.LoraConfig` gives.

        `target_modules`, in names of transformers 4 or 5, stands for roles; `modules_to_save` may name the head, which
        memtune always trains.

        Raises:
            ConfigError: It asks for something that memtune has not, or that cannot be told without the model.
        """
        defaults = peft.LoraConfig()
        kept = {*_READ_FROM_PEFT, *_ELSEWHERE_IN_PEFT, *_NO_SETTING_IN_PEFT}
        asked = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in kept}
        other = {name: value for name, value in asked.items() if value and value != getattr(defaults, name, None)}
        modules: Any = config.modules_to_save or ()
        if isinstance(modules, (int, float)) or any(each not in ("classifier", "head") for each in modules):
            other["modules_to_save"] = modules
        if other:
            raise ConfigError(f"peft.LoraConfig: memtune has nothing for {other}; leave these settings out")
        layers = config.layers_to_transform
        return cls(
            **{name: getattr(config, name) for name in _READ_FROM_PEFT},
            roles=roles_of_targets(config.target_modules),
            blocks=[layers] if isinstance(layers, int) else layers,
        )

    def to_peft(self, **settings: Any) -> peft.LoraConfig:
        """The same as a `peft.LoraConfig`, with further settings such as `target_modules`."""
        own = {name: getattr(self, name) for name in _READ_FROM_PEFT}
        return peft.LoraConfig(**own | {"r": self.rank}, **settings)

    @property
    def rank(self) -> int:
        """The rank; where it is left to the mode, that of unmasked mode."""
        return self.r or UNMASKED_RANK

    def for_mode(self, masked: bool) -> LoraConfig:
        """Fill in the rank and the roles."""
        roles = self.roles or (LINEAR_ROLES if masked else UNMASKED_ROLES)
        if masked and self.use_dora and {"key", "value"} & set(roles):
            raise ConfigError(
                "use_dora: in masked mode the keys and values that the task sees have no weight whose rows DoRA could "
                "scale; give roles=('query', 'out', 'fc1', 'fc2'), or leave use_dora out"
            )
        return replace(self, r=self.r or (MASKED_RANK if masked else UNMASKED_RANK), roles=roles)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@register_method
class LoraAdapter(Adapter[LoraConfig]):
    """Low-rank updates of the linear layers of one backbone's blocks."""

    config_class = LoraConfig
    needs_attention_function = False

    def __init__(self, config: LoraConfig, backbone: Backbone) -> None:
        config = config.for_mode(masked=False)  # where no mode was chosen
        super().__init__(config, backbone)
        settings = config.to_peft()
        self.blocks = nn.ModuleDict(
            {
                str(block.index): nn.ModuleDict({role: LowRank(block[role], settings) for role in config.roles or ()})
                for block in config.select(backbone)
            }
        )

    def _updates(self) -> list[tuple[int, dict[str, LowRank]]]:
        """For each block its index and its updates by role."""
        return [(int(index), dict(roles.items())) for index, roles in self.blocks.items()]  # type: ignore[attr-defined]

    @classmethod
    def attach(cls, stream: Stream, adapters: Sequence[Any]) -> None:
        """Put the updates around the view's linear layers; masked, those of keys and values between token and trunk."""
        for block, stack in stream.stacks(adapters):
            roles = stacks_by_role(stack)
            if stream.masked:
                key, value = roles.pop("key", None), roles.pop("value", None)
                if key or value:
                    stream.sites[block.index].updates.append(TrunkFactors(key, value))
            for role, own in roles.items():
                block.replace(role, AdaptedLinear(block[role], own))

    def merge_into(self, backbone: Backbone) -> None:
        """Add the updates to the weights.

        Raises:
            ConfigError: A weight is quantised.
        """
        for index, updates in self._updates():
            for role, update in updates.items():
                with backbone.blocks[index].changing(role) as base:
                    if not base.weight.is_floating_point():
                        raise ConfigError(
                            f"blocks.{index}.{role} is quantised ({type(base).__name__}): merging would round the "
                            "update away; load the backbone in full precision and merge there"
                        )
                    update.on(base).merge(safe_merge=True)
