"""Hugging Face vision models seen as blocks and roles (their module names stand in `memtune.backbones.families`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from ..errors import UnsupportedBackboneError
from .families import AUTO_TOWERS, PLAIN_TOWERS, TOWERS
from .family import Family
from .fused import LinearPart
from .timm_models import timm_class, wrap_timm
from .timm_towers import TOWER, check_timm, find_timm_tower
from .views import shadow


def _descend(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules at a path in which `*` stands for every child."""
    head, _, rest = path.partition(".")
    for child in module.children() if head == "*" else [module.get_submodule(head)]:
        yield from _descend(child, rest) if rest else [child]


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def as_pretrained(model: nn.Module) -> PreTrainedModel:
    """A model as one of transformers': itself, or the wrapper of a timm model, which stays as it is.

    Raises:
        UnsupportedBackboneError: It is neither.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if timm_class(model) is not None:
        check_timm(model)
        return wrap_timm(model)
    raise UnsupportedBackboneError(
        f"got {type(model).__name__}, expected a transformers model with one of the towers {sorted(TOWERS)}, or timm's "
        f"{TOWER}"
    )


class Block:
    """One transformer block, its parts known by their roles.

    Args:
        index: Its place among the tower's blocks.
        module: The block.
        paths: The path of each role in it.
        head_width: Where its attention module keeps the width of a head.
        key_norm: The path of a norm between the first norm and keys and values, which the block may lack.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        paths: Mapping[str, str],
        head_width: str = "head_dim",
        key_norm: str | None = None,
    ) -> None:
        self.index = index
        self.module = module
        self._paths = paths
        self._head_width = head_width
        self._key_norm = key_norm if key_norm and key_norm in dict(module.named_modules()) else None

    def _path(self, role: str) -> str:
        if role not in self._paths:
            raise UnsupportedBackboneError(f"got the role {role!r}; the roles of a block are {sorted(self._paths)}")
        for path in self._paths[role].split("|"):
            parent, _, name = path.rpartition(".")
            if name in self.module.get_submodule(parent)._modules:
                return path
        raise UnsupportedBackboneError(f"{type(self.module).__name__} has no module for the role {role!r}")

    def __getitem__(self, role: str) -> Any:
        return self.module.get_submodule(self._path(role))

    def replace(self, role: str, module: nn.Module) -> None:
        """Put `module` in a role. Only for blocks of a view: the change would show in the original model."""
        parent, _, name = self._path(role).rpartition(".")
        self.module.get_submodule(parent)._modules[name] = module

    @contextmanager
    def changing(self, role: str) -> Iterator[Any]:
        """The linear layer in a role, to change its weight: of a part of a fused layer a copy, then written back."""
        layer = self[role]
        own = layer.separate() if isinstance(layer, LinearPart) else layer
        yield own
        if isinstance(layer, LinearPart):
            layer.write(own)

    @property
    def key_norms(self) -> list[nn.Module]:
        """The norms that a token passes, in order, before its key and value are made.

        Where keys and values are those of a map reduced by a convolution, a further token is one of the reduced map:
        it has no place in the map to be reduced, but the norm of what the convolution gives.
        """
        more = [] if self._key_norm is None else [self.module.get_submodule(self._key_norm)]
        return [self["norm1"], *more]

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self["norm1"].normalized_shape[0]

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return attrgetter(self._head_width)(self["attention"])

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self["query"].out_features // self.head_width


class Backbone:
    """A supported Hugging Face vision model, or a view of one, as blocks and roles.

    Attributes:
        model: The model as it was given (with its own head, or two towers); a timm model in transformers' wrapper.
        tower: The vision transformer inside it.
        family: The row of `TOWERS` that describes the tower.
        blocks: The tower's blocks in the order of computation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = as_pretrained(model)
        self.tower, self.family = self._find_tower(self.model)
        modules = _descend(self.tower, self.family.blocks)
        family = self.family
        self.blocks = [
            Block(index, module, family.roles, family.head_width, family.key_norm)
            for index, module in enumerate(modules)
        ]

    @staticmethod
    def _find_tower(model: PreTrainedModel) -> tuple[Any, Family]:
        if (found := find_timm_tower(model)) is not None:
            return found
        known = TOWERS | AUTO_TOWERS | PLAIN_TOWERS
        for module in model.modules():
            for kind in type(module).__mro__:
                if kind.__name__ in known:
                    return module, known[kind.__name__]
        raise UnsupportedBackboneError(
            f"got {type(model).__name__}, which has no supported vision tower; supported towers: {sorted(TOWERS)}, "
            f"and for methods that need no attention function {sorted(PLAIN_TOWERS)}"
        )

    @property
    def config(self) -> Any:
        """The configuration of the tower."""
        return self.tower.config

    @property
    def width(self) -> int:
        """Width of the features that a head reads (the last block's)."""
        return self.blocks[-1].width

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _pair(self.family.patch_size(self.config))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the backbone was trained on."""
        return _pair(self.family.image_size(self.config))

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return self.config.num_channels

    @property
    def class_token(self) -> nn.Parameter | None:
        """The class token before its position is added, or None."""
        path = self.family.class_token
        return None if path is None else attrgetter(path)(self.tower)  # in a replica of nn.DataParallel no parameter

    @property
    def reads_class_token(self) -> bool:
        """Whether its feature is that of the class token alone."""
        return self.class_token is not None and self.family.reads_class_token(self.tower)

    @property
    def starts_later(self) -> bool:
        """Whether a pass may start at a later block, from the states that enter it."""
        family = self.family
        return family.attention_function and not family.staged and family.ends_at_last_block

    @property
    def takes_arguments(self) -> bool:
        """Whether keyword arguments of the whole model reach the tower: not one in an AutoBackbone of the model."""
        parts = [module for module in self.model.modules() if isinstance(module, BackboneMixin)]
        return not any(self.tower in part.modules() for part in parts if part is not self.model)

    def describe(self) -> dict[str, Any]:
        """What must be equal for an adapter's shapes to fit, and for its numbers to mean the same."""
        return {
            "family": self.family.name,
            "depth": self.depth,
            "widths": sorted({block.width for block in self.blocks}),
            "heads": sorted({block.heads for block in self.blocks}),
            "patch_size": list(self.patch_size),
            "image_size": list(self.image_size),
            "channels": self.channels,
            **({"pooling": pooling} if (pooling := getattr(self.config, "pooling", None)) is not None else {}),
        }

    def parameters_by_role(self) -> Iterator[tuple[str, Tensor]]:
        """The backbone's parameters under names that do not change between releases of transformers."""
        embeddings = self.tower.get_submodule(self.family.patches)
        patches = next(module for module in embeddings.modules() if isinstance(module, nn.Conv2d))
        yield from ((f"patches.{name}", parameter) for name, parameter in patches.named_parameters())
        if self.class_token is not None:
            yield "class_token", self.class_token
        for block in self.blocks:
            for role in ("norm1", "query", "key", "value", "out", "norm2", "fc1", "fc2"):
                for name, parameter in block[role].named_parameters():
                    yield f"blocks.{block.index}.{role}.{name}", parameter
        yield from ((f"norm.{name}", value) for name, value in self.family.final_norm(self.tower).named_parameters())

    def other_parameters(self) -> Iterator[Tensor]:
        """The model's parameters outside its tower (its own head's), in their order."""
        own = {id(parameter) for parameter in self.tower.parameters()}
        yield from (parameter for parameter in self.model.parameters() if id(parameter) not in own)

    def view(self) -> Backbone:
        """A view of the whole model (see `memtune.backbones.views`), to be changed freely."""
        view = Backbone(shadow(self.model))
        view.family.prepare_view(view.tower)
        return view

    def start(self, class_tokens: Tensor) -> Tensor:
        """Task tokens as they enter the first block.

        Args:
            class_tokens: Class tokens of tasks, (rows, tasks, width).

        Returns:
            The tokens with the class token's position added and the tower's first norm applied, of the same shape.
        """
        token = self._positioned(class_tokens)
        norm = self.family.first_norm
        return token if norm is None else self.tower.get_submodule(norm)(token)

    def _positioned(self, class_tokens: Tensor) -> Tensor:
        token = class_tokens.to(self.blocks[0]["norm1"].weight.dtype)
        position = self.family.class_position(self.tower) if self.family.class_token else None
        return token if position is None else token + position

    def set_class_token(self, class_token: Callable[[], Tensor]) -> None:
        """Let the tower use another class token, (1 or batch, 1, width), at each pass. Only on a view."""
        self.tower.embeddings.register_forward_hook(partial(self._replace_first, class_token))

    def _replace_first(self, class_token: Callable[[], Tensor], module: nn.Module, args: Any, output: Any) -> Any:
        tokens, *rest = output if isinstance(output, tuple) else (output,)  # (batch, tokens, width)
        first = self._positioned(class_token()).to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([first, tokens[:, 1:]], dim=1)
        return (tokens, *rest) if rest else tokens

    def features(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Any) -> Tensor:
        """One pass of the tower: the feature that the backbone's own kind of head would read, (batch, width)."""
        output = self.run_tower(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        return self.family.feature(self.tower, output)

    def run_model(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Any) -> Any:
        """The whole model's output for images; the tower's where the model takes more, text or what was decoded."""
        if self.model.main_input_name != "pixel_values" or getattr(self.model.config, "is_encoder_decoder", False):
            return self.run_tower(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        return self.model(**self._arguments(pixel_values, interpolate_pos_encoding), **kwargs)

    def run_tower(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Any) -> Any:
        """The tower's own output for images (batch, channels, height, width)."""
        return self.tower(**self._arguments(pixel_values, interpolate_pos_encoding), **kwargs)

    def _arguments(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> dict[str, Any]:
        arguments = self.family.tower_arguments(self.tower, pixel_values)
        if not self.family.any_size:
            arguments["interpolate_pos_encoding"] = interpolate_pos_encoding
        return {"pixel_values": pixel_values} | arguments

    def finish(self, tokens: Tensor) -> Tensor:
        """Task tokens after the last block as features for heads, both (batch, tasks, width)."""
        return self.family.final_norm(self.tower)(tokens)
