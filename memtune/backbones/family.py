"""`Family`: what memtune knows of one class of towers; `families.py` and `timm_towers.py` have the rows.

The defaults are those of transformers' `ViTModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

HEAD_NAME = "classifier"
"""What every image classification class of transformers calls its head."""


def roles(
    norm1: str, norm2: str, attention: str, out: str, fc1: str = "mlp.fc1", fc2: str = "mlp.fc2"
) -> dict[str, str]:
    """The paths of a block's roles; `a|b` stands for the first of the two that the block has."""
    return {
        "norm1": norm1,
        "attention": attention,
        "query": f"{attention}.q_proj",
        "key": f"{attention}.k_proj",
        "value": f"{attention}.v_proj",
        "out": f"{attention}.{out}",
        "norm2": norm2,
        "fc1": fc1,
        "fc2": fc2,
    }


_VIT_ROLES = roles("layernorm_before", "layernorm_after", "attention", "o_proj")


def class_feature(tower: nn.Module, output: Any) -> Tensor:
    """The class token, (batch, width)."""
    return output.last_hidden_state[:, 0]


def table_position(tower: Any) -> Tensor | None:
    """The class token's row of a position table (1, tokens, width), or None where the tower has no table."""
    table = tower.embeddings.position_embeddings
    return None if table is None else table[:, :1]


def _put_classifier(model: nn.Module, head: nn.Module) -> bool:
    there = HEAD_NAME in model._modules
    if there:
        model.add_module(HEAD_NAME, head)
    return there


@dataclass(frozen=True)
class Family:
    """How one tower class names its parts (a row of the role table)."""

    name: str
    blocks: str
    roles: Mapping[str, str] = field(default_factory=lambda: _VIT_ROLES)
    class_token: str | None = "embeddings.cls_token"
    class_position: Callable[[Any], Tensor | None] = table_position
    first_norm: str | None = None
    """A norm between the embeddings and the first block."""
    final_norm: Callable[[Any], nn.Module] = lambda tower: tower.layernorm
    feature: Callable[[nn.Module, Any], Tensor] = class_feature
    reads_class_token: Callable[[Any], bool] = lambda tower: True
    """Where there is a class token: whether the feature is that token's."""
    any_size: bool = False
    """The tower takes images of any size without being asked."""
    refuses_size: Callable[[Any, int, int], str | None] = lambda tower, height, width: None
    """Why a tower of any size takes no images of this height and width; None if it does."""
    ends_at_last_block: bool = True
    """The feature is that of what leaves the last block."""
    staged: str | None = None
    """Of a tower in stages of several widths: what its blocks attend to, in place of all tokens ("within windows")."""
    key_norm: str | None = None
    """A norm between a block's first norm and its keys and values, in blocks that have it."""
    attention_function: bool = True
    """The attention modules call the function that transformers' AttentionInterface names."""
    images_alone: bool = True
    """The tower takes images without text."""
    hides_patches: bool = False
    """The tower drops patches at random; a view of it does not."""
    patches: str = "embeddings"
    """Where the convolution that makes the patches is."""
    patch_size: Callable[[Any], Any] = lambda config: config.patch_size
    image_size: Callable[[Any], Any] = lambda config: config.image_size
    head_width: str = "head_dim"
    """Where the attention module keeps the width of a head."""
    prepare_view: Callable[[Any], None] = lambda tower: None
    prepare_stream: Callable[[Any], None] = lambda block: None
    tower_arguments: Callable[[Any, Tensor], dict[str, Any]] = lambda tower, pixel_values: {}
    stream_arguments: Callable[[nn.Module, nn.Module, Tensor], dict[str, Any]] = lambda block, tower, token: {}
    selected_arguments: Callable[[nn.Module, Tensor, dict[str, Any]], dict[str, Any]] = (
        lambda tower, positions, arguments: arguments
    )
    """A block's keyword arguments for the tokens at `positions` (batch, k) alone, made of those for all tokens."""
    as_classifier: Callable[[Any], Any] | None = None
    """A view of a model in its image classification class; None for the way that all of transformers' models have."""
    put_head: Callable[[Any, nn.Module], bool] = _put_classifier
    """Gives an image classification model another head; False where it has none."""
