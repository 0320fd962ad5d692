"""The role table: the only file that knows the module names of Hugging Face vision models.

A *tower* is the transformer inside a model (`ViTModel` in `ViTForImageClassification`, `CLIPVisionModel` in
`CLIPModel`). `TOWERS` has one row for each supported tower class; all other files speak of blocks and roles.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .views import shadow_config


def _roles(
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


HEAD_NAME = "classifier"
"""What every image classification class of transformers calls its head."""

_VIT = _roles("layernorm_before", "layernorm_after", "attention", "o_proj")
_DINO = _roles("norm1", "norm2", "attention", "o_proj", "mlp.fc1|mlp.up_proj", "mlp.fc2|mlp.down_proj")
_CLIP = _roles("layer_norm1", "layer_norm2", "self_attn", "out_proj")


def _dense_roles(inner: str, norm1: str, norm2: str, fc1: str, fc2: str) -> dict[str, str]:
    """The same for modules in the style of BERT; `inner` holds the projections of query, key and value."""
    projections = {role: f"attention.{inner}.{role}" for role in ("query", "key", "value")}
    return _roles(norm1, norm2, "attention", "output.dense", fc1, fc2) | projections


def _class_feature(tower: nn.Module, output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def _mean_feature(tower: nn.Module, output: Any) -> Tensor:
    return output.last_hidden_state.mean(dim=1)


def _pooled_feature(tower: nn.Module, output: Any) -> Tensor:
    return output.pooler_output


def _swin_feature(tower: Any, output: Any) -> Tensor:
    return output.pooler_output if tower.pooler is not None else output.last_hidden_state.mean(dim=1)


def _map_feature(tower: nn.Module, output: Any) -> Tensor:
    """The mean of a map (batch, width, height, width) or of tokens (batch, tokens, width)."""
    states = output.last_hidden_state
    return states.mean(dim=(2, 3)) if states.ndim == 4 else states.mean(dim=1)


def _beit_pools(tower: Any) -> bool:
    return tower.config.use_mean_pooling and tower.pooler is not None


def _beit_feature(tower: Any, output: Any) -> Tensor:
    """BEiT pools as its own classifier does: the normed mean of the patches, or the class token."""
    return output.pooler_output if _beit_pools(tower) else output.last_hidden_state[:, 0]


def _beit_norm(tower: Any) -> nn.Module:
    pooler: Any = tower.pooler if tower.config.use_mean_pooling else None
    return tower.layernorm if pooler is None else pooler.layernorm


def _table_position(tower: Any) -> Tensor | None:
    """The class token's row of a position table (1, tokens, width), or None where the tower has no table."""
    table = tower.embeddings.position_embeddings
    return None if table is None else table[:, :1]


def _embedding_position(tower: Any) -> Tensor:
    return tower.embeddings.position_embedding.weight[:1].unsqueeze(0)


def _no_rotation(block: nn.Module, tower: Any, token: Tensor) -> dict[str, Any]:
    """DINOv3 rotates patch tokens only: a table of no patches leaves the task token as it is."""
    empty = token.new_empty(0, token.shape[-1] // tower.config.num_attention_heads)
    return {"position_embeddings": (empty, empty)}


def _rotate_selected(tower: Any, positions: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """DINOv3: each image's own table, in which tokens that are no patches are not rotated."""
    others = 1 + tower.config.num_register_tokens
    tables = []
    for table, neutral in zip(arguments["position_embeddings"], (1.0, 0.0), strict=True):  # cosines, sines
        whole = torch.cat([table.new_full((others, table.shape[-1]), neutral), table])
        tables.append(whole[positions].unsqueeze(1))  # (batch, 1, k, head width)
    return arguments | {"position_embeddings": tuple(tables)}


def _bias_of_all(tower: Any, positions: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """BEiT: a block stretches its bias to the number of its tokens, which are all of them in no selection."""
    return arguments | {"interpolate_pos_encoding": False}


def _no_mask(block: nn.Module, tower: nn.Module, token: Tensor) -> dict[str, Any]:
    return {"attention_mask": None}


def _keep_all_patches(tower: Any, pixel_values: Tensor) -> dict[str, Any]:
    """ViT-MAE drops and shuffles patches; ascending noise keeps their order (the view's mask ratio is 0)."""
    height, width = tower.embeddings.patch_embeddings.patch_size
    patches = (pixel_values.shape[2] // height) * (pixel_values.shape[3] // width)
    return {"noise": torch.arange(patches, device=pixel_values.device).expand(pixel_values.shape[0], -1)}


def _mae_view(tower: Any) -> None:
    tower.embeddings.config = shadow_config(tower.embeddings.config)
    tower.embeddings.config.mask_ratio = 0.0


def _siglip_forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple:
    """SigLIP's attention with the keyword arguments that `SiglipAttention` keeps from the attention function."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
    attend: Any = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    context, weights = attend(self, query, key, value, attention_mask, is_causal=False, scaling=self.scale, **kwargs)
    return self.out_proj(context.reshape(*hidden_states.shape[:-1], -1)), weights


def _siglip_view(tower: Any) -> None:
    for layer in tower.encoder.layers:
        layer.self_attn.forward = types.MethodType(_siglip_forward, layer.self_attn)


def _swin_view(tower: Any) -> None:
    """Swin without a pooler is a segmentation model's, whose windows stay as they are in small images too."""
    if tower.pooler is None:
        tower.register_forward_pre_hook(_keep_windows, with_kwargs=True)


def _keep_windows(tower: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {"always_partition": True} | kwargs


def _beit_stream(block: Any) -> None:
    """The position bias of the class token comes from the trunk; the block must not add one for a single token."""
    block.relative_position_bias = None


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
    roles: Mapping[str, str] = field(default_factory=lambda: _VIT)
    class_token: str | None = "embeddings.cls_token"
    class_position: Callable[[Any], Tensor | None] = _table_position
    first_norm: str | None = None
    """A norm between the embeddings and the first block."""
    final_norm: Callable[[Any], nn.Module] = lambda tower: tower.layernorm
    feature: Callable[[nn.Module, Any], Tensor] = _class_feature
    reads_class_token: Callable[[Any], bool] = lambda tower: True
    """Where there is a class token: whether the feature is that token's."""
    any_size: bool = False
    """The tower takes images of any size without being asked."""
    refuses_size: Callable[[Any, int, int], str | None] = lambda tower, height, width: None
    """Why a tower of any size takes no images of this height and width; None if it does."""
    windowed: bool = False
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


TOWERS: dict[str, Family] = {
    "ViTModel": Family("vit", "layers.*"),
    "DeiTModel": Family("deit", "layers.*"),
    "ViTMSNModel": Family("vit_msn", "layers.*"),
    "ViTMAEModel": Family(
        "vit_mae", "layers.*", hides_patches=True, prepare_view=_mae_view, tower_arguments=_keep_all_patches
    ),
    "IJepaModel": Family("ijepa", "layers.*", class_token=None, feature=_mean_feature),
    "BeitModel": Family(
        "beit",
        "layers.*",
        final_norm=_beit_norm,
        feature=_beit_feature,
        reads_class_token=lambda tower: not _beit_pools(tower),
        any_size=True,
        prepare_stream=_beit_stream,
        selected_arguments=_bias_of_all,
    ),
    "Dinov2Model": Family("dinov2", "encoder.layer.*", _DINO, any_size=True),
    "Dinov2WithRegistersModel": Family("dinov2_with_registers", "encoder.layer.*", _DINO, any_size=True),
    "DINOv3ViTModel": Family(
        "dinov3_vit",
        "model.layer.*",
        _DINO,
        class_position=lambda tower: None,
        final_norm=lambda tower: tower.norm,
        any_size=True,
        stream_arguments=_no_rotation,
        selected_arguments=_rotate_selected,
    ),
    "CLIPVisionModel": Family(
        "clip",
        "encoder.layers.*",
        _CLIP,
        class_token="embeddings.class_embedding",
        class_position=_embedding_position,
        first_norm="pre_layrnorm",
        final_norm=lambda tower: tower.post_layernorm,
        feature=_pooled_feature,
        stream_arguments=_no_mask,
    ),
    "SiglipVisionModel": Family(
        "siglip",
        "encoder.layers.*",
        _CLIP,
        class_token=None,
        final_norm=lambda tower: tower.post_layernorm,
        feature=_mean_feature,
        prepare_view=_siglip_view,
        stream_arguments=_no_mask,
    ),
    "SwinModel": Family(
        "swin",
        "encoder.layers.*.blocks.*",
        class_token=None,
        feature=_swin_feature,
        any_size=True,
        windowed=True,
        prepare_view=_swin_view,
    ),
}

PLAIN_TOWERS: dict[str, Family] = {
    "ViltModel": Family(
        "vilt",
        "encoder.layer.*",
        _dense_roles("attention", "layernorm_before", "layernorm_after", "intermediate.dense", "output.dense"),
        class_token=None,
        attention_function=False,
        images_alone=False,
        head_width="attention.attention_head_size",
    ),
    "Swinv2Model": Family(
        "swinv2",
        "encoder.layers.*.blocks.*",
        _dense_roles("self", "layernorm_before", "layernorm_after", "intermediate.dense", "output.dense"),
        class_token=None,
        feature=_swin_feature,
        any_size=True,
        windowed=True,
        attention_function=False,
        head_width="self.attention_head_size",
    ),
    "PvtModel": Family(
        "pvt",
        "encoder.block.*.*",
        _dense_roles("self", "layer_norm_1", "layer_norm_2", "mlp.dense1", "mlp.dense2"),
        class_token=None,
        final_norm=lambda tower: tower.encoder.layer_norm,
        attention_function=False,
        patches="encoder.patch_embeddings.0",
        patch_size=lambda config: config.patch_sizes[0],
        head_width="self.attention_head_size",
    ),
    "SegformerModel": Family(  # it calls an attention function, but with keys and values of a reduced map
        "segformer",
        "stages.*.blocks.*",
        class_token=None,
        final_norm=lambda tower: tower.stages[-1].layer_norm,
        feature=_map_feature,
        any_size=True,
        attention_function=False,
        patches="stages.0.patch_embeddings",
        patch_size=lambda config: config.patch_sizes[0],
        image_size=lambda config: 512,  # its configuration names none: the size of its segmentation checkpoints
    ),
}
"""Towers whose attention modules compute attention themselves: for methods that need no attention function."""

# MaskFormer has a Swin of its own, in the manner of Swin v2; Mask2Former has transformers' Swin
PLAIN_TOWERS["MaskFormerSwinModel"] = replace(PLAIN_TOWERS["Swinv2Model"], name="maskformer_swin")
