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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import peft
import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from ..adapter import Adapter, AdapterConfig
from ..backbones import Backbone
from ..errors import ConfigError
from ..peft_names import LINEAR_ROLES, roles_of_targets
from ..registry import register_method
from ..stacking import Stack, fit_rows, per_task
from ..streams import AdaptedStream, TaskStream
from ..views import shadow

UNMASKED_ROLES = ("query", "value")
"""Section 4.2 of the paper adapts these two."""

UNMASKED_RANK = 8
"""As in peft."""

MASKED_RANK = 4
"""A task stream overfits: higher ranks were no better (docs/results.md)."""

INITIALISATIONS = (True, False, "gaussian", "orthogonal")
"""Those of peft's that need no data and leave the frozen weight as it is."""

_NAME = "default"
"""What peft calls the one adapter of a layer."""

_READ_FROM_PEFT = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights")
_ELSEWHERE_IN_PEFT = {"target_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
_NO_SETTING_IN_PEFT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "qalora_group_size", "runtime_config"),
}


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Settings of LoRA; names, meanings and defaults are those of `peft.LoraConfig`.

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
        if not _is_number(self.lora_alpha) or not 0 < self.lora_alpha < math.inf:
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
            object.__setattr__(self, "roles", _check_roles(self.roles))

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
        if saved := set(config.modules_to_save or ()) - {"classifier", "head"}:
            other["modules_to_save"] = sorted(saved)
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


def _check_roles(roles: Any) -> tuple[str, ...]:
    given = list(roles) if isinstance(roles, Sequence) and not isinstance(roles, str) else []
    if not given or len(set(given)) < len(given) or not set(given) <= set(LINEAR_ROLES):
        raise ConfigError(f"roles: got {roles!r}, expected some of {LINEAR_ROLES}, each once, or None")
    return tuple(role for role in LINEAR_ROLES if role in given)


_SEEN = ("key", "value")
"""Roles whose updates a task stream has between its queries and the trunk, in place of a layer."""

Matrices = Callable[[], tuple[Tensor, Tensor]]
"""Gives A^T and s B^T of each task, (1 or rows, 1 or tasks, d_in, r) and (1 or rows, 1 or tasks, r, d_out)."""


class LowRank(nn.Module):
    """The update of one role of one block: A, B and, with DoRA, the lengths of the rows.

    Args:
        base: The linear layer in that role.
        config: The settings.
    """

    def __init__(self, base: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        layer = _peft_layer(base, config)
        self.scaling: float = layer.scaling[_NAME]
        self.lora_A = nn.Parameter(layer.lora_A[_NAME].weight.detach().float())
        self.lora_B = nn.Parameter(layer.lora_B[_NAME].weight.detach().float())
        self.lora_dropout = layer.lora_dropout[_NAME]
        if config.use_dora:
            # Again, since A and B now have full precision, which the lengths of an unchanged weight must have too.
            lengths = layer.lora_magnitude_vector[_NAME]
            lengths.update_layer(
                base_layer=layer.get_base_layer(), lora_A=self.lora_A, lora_B=self.lora_B, scaling=self.scaling
            )
            self.lora_magnitude = nn.Parameter(lengths.weight.detach().float())
        del layer._modules["base_layer"]  # the backbone's; a layer for any view of it is made from this one by `on`
        self._layer = (layer,)  # in a tuple, so that its parameters count once

    def on(self, base: nn.Module) -> Any:
        """The layer of `peft` with these parameters, around the linear layer of a view."""
        layer: Any = shadow(self._layer[0])
        layer.base_layer = base
        layer.merged_adapters, layer._caches = [], {}
        layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight = self.lora_A, self.lora_B
        layer.lora_dropout[_NAME] = self.lora_dropout
        if layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[_NAME].weight = self.lora_magnitude
        layer.training = self.training
        return layer

    def down_up(self) -> tuple[Tensor, Tensor]:
        """A^T (d_in, r) and s B^T (r, d_out)."""
        return self.lora_A.T, self.lora_B.T * self.scaling

    def of_one_task(self) -> tuple[Tensor, Tensor]:
        """The same where all rows and tokens are one task's, (1, 1, ..., ...) each."""
        down, up = self.down_up()
        return down[None, None], up[None, None]

    def row_scale(self, base: Any) -> Tensor | None:
        """DoRA's factor of each row, (d_out): its trained length over that of W + s B A; None without DoRA."""
        if not hasattr(self, "lora_magnitude"):
            return None
        down, up = self.down_up()
        return self.lora_magnitude / (base.weight.to(up.dtype) + (down @ up).T).norm(dim=1)


def _peft_layer(base: nn.Module, config: LoraConfig) -> Any:
    """The LoRA layer of `peft` for a linear layer, which may be one of bitsandbytes'."""
    kind = {"loaded_in_8bit": True, "loaded_in_4bit": True}
    settings = config.to_peft()
    return LoraModel._create_new_module(settings, _NAME, base, r=config.rank, lora_alpha=config.lora_alpha, **kind)


class SeenUpdates:
    """Lets tasks see K' and V' without computing them (a `memtune.passes.TrunkReader`).

    A task token has one query in each head h, so the updates are folded into what asks and what is answered:

        q_h K'_h^T = q_h K_h^T + (s q_h B_h A) K^T,    p V'_h = p V_h + s (p V) A^T B_h^T

    where B_h has the rows of B that are the head's. Keys and values are read once, whatever the rank.

    Args:
        key: The matrices of the keys' update, or None.
        value: Those of the values'.
        dropout: What the input of A goes through in training: the same for all tokens of an image.
    """

    def __init__(self, key: Matrices | None, value: Matrices | None, dropout: nn.Module | None = None) -> None:
        self._key, self._value, self._dropout = key, value, dropout

    def queries(self, query: Tensor) -> Tensor | None:
        """The queries s q_h B_h A, (rows, heads, tasks, width), of q (rows, heads, tasks, head width)."""
        if self._key is None:
            return None
        down, up = (each.to(query.dtype) for each in self._key())
        reduced = torch.einsum("nhtd,ntrhd->nhtr", query, up.unflatten(-1, (query.shape[1], -1)))
        return self._dropped(torch.einsum("nhtr,ntwr->nhtw", reduced, down))

    def context(self, context: Tensor) -> Tensor | None:
        """The context s (p V) A^T B_h^T, (rows, heads, tasks, head width), of p V (rows, heads, tasks, width)."""
        if self._value is None:
            return None
        down, up = (each.to(context.dtype) for each in self._value())
        reduced = torch.einsum("nhtw,ntwr->nhtr", self._dropped(context), down)
        return torch.einsum("nhtr,ntrhd->nhtd", reduced, up.unflatten(-1, (context.shape[1], -1)))

    def _dropped(self, states: Tensor) -> Tensor:
        return states if self._dropout is None else self._dropout(states)


class UpdateStack:
    """The matrices of several tasks' updates of one role in one block.

    Args:
        stack: The tasks' parts.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._down = stack.rows(lambda part: part.down_up()[0])  # (tasks, d_in, r)
        self._up = stack.rows(lambda part: part.down_up()[1])  # (tasks, r, d_out)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """A^T and s B^T of the tasks that the pass is for, (1 or images, 1 or tasks, ..., ...) each."""
        return self._stack.chosen(self._down), self._stack.chosen(self._up)


class StackedLinear(nn.Module):
    """A linear layer with each task's own update.

    Args:
        base: The layer of the view.
        stack: The tasks' parts.
    """

    def __init__(self, base: Any, stack: Stack) -> None:
        super().__init__()
        self.base = base
        self._stack = stack
        self._matrices = UpdateStack(stack)
        scaled = any(part.row_scale(base) is not None for part in stack.parts)
        self._scale = stack.rows(partial(_scale_or_ones, base), neutral=1.0) if scaled else None  # (tasks, d_out)

    def forward(self, states: Tensor) -> Tensor:
        """W x + b + s B A x, with DoRA each row of the sum but b scaled, of states (rows, tokens, d_in)."""
        down, up = self._matrices()
        output = self.base(states)
        update = per_task(per_task(states.to(down.dtype), down), up).to(output.dtype)
        if self._scale is None:
            return output + update
        bias = 0 if self.base.bias is None else self.base.bias
        scale = fit_rows(self._stack.chosen(self._scale), states.shape[0]).to(output.dtype)
        return (output - bias + update) * scale + bias


def _scale_or_ones(base: Any, part: LowRank) -> Tensor:
    scale = part.row_scale(base)
    return torch.ones_like(part.lora_B[:, 0]) if scale is None else scale


def _by_role(parts: Sequence[Any]) -> dict[str, list[LowRank | None]]:
    """For each role that one of the parts has, each part's update of it, or None."""
    roles = {role: None for part in parts if part is not None for role in part}
    return {role: [part[role] if part is not None and role in part else None for part in parts] for role in roles}


@register_method
class LoraAdapter(Adapter[LoraConfig]):
    """Low-rank updates of the linear layers of one backbone's blocks."""

    config_class = LoraConfig
    needs_attention_function = False
    stackable = True

    def __init__(self, config: LoraConfig, backbone: Backbone) -> None:
        config = config.for_mode(masked=False)  # where no mode was chosen
        super().__init__(config, backbone)
        self.blocks = nn.ModuleDict(
            {
                str(block.index): nn.ModuleDict({role: LowRank(block[role], config) for role in config.roles or ()})
                for block in config.select(backbone)
            }
        )

    def _updates(self) -> list[tuple[int, dict[str, LowRank]]]:
        """For each block its index and its updates by role."""
        return [(int(index), dict(roles.items())) for index, roles in self.blocks.items()]  # type: ignore[attr-defined]

    def attach(self, stream: AdaptedStream | TaskStream) -> None:
        """Put the updates around the view's linear layers; masked, those of keys and values between task and trunk."""
        for index, updates in self._updates():
            seen = {role: updates.pop(role) for role in _SEEN if stream.masked and role in updates}
            if seen:
                key, value = (seen[role].of_one_task if role in seen else None for role in _SEEN)
                dropout = next(iter(seen.values())).lora_dropout
                stream.sites[index].readers.append(SeenUpdates(key, value, dropout))
            block = stream.view.blocks[index]
            for role, update in updates.items():
                block.replace(role, update.on(block[role]))

    @classmethod
    def attach_stack(cls, adapters: Sequence[Any], stream: AdaptedStream | TaskStream) -> None:
        """The same for several tasks: each row or token gets the update of its own task."""
        for index, parts in cls.block_parts(adapters, stream.view.depth):
            stacks = {role: Stack(own, stream.selection) for role, own in _by_role(parts).items()}
            if stream.masked:
                key, value = (UpdateStack(stacks.pop(role)) if role in stacks else None for role in _SEEN)
                stream.sites[index].readers.append(SeenUpdates(key, value))
            block = stream.view.blocks[index]
            for role, stack in stacks.items():
                block.replace(role, StackedLinear(block[role], stack))

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
