"""The role table: the only file that knows the module names of Hugging Face vision models.

A *tower* is the transformer inside a model (`ViTModel` in `ViTForImageClassification`, `CLIPVisionModel` in
`CLIPModel`). `TOWERS` has one row for each supported tower class; all other files speak of blocks and roles.
"""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .family import Family, roles
from .views import shadow_config

_DINO = roles("norm1", "norm2", "attention", "o_proj", "mlp.fc1|mlp.up_proj", "mlp.fc2|mlp.down_proj")
_CLIP = roles("layer_norm1", "layer_norm2", "self_attn", "out_proj")


def _dense_roles(inner: str, norm1: str, norm2: str, fc1: str, fc2: str) -> dict[str, str]:
    """The same for modules in the style of BERT; `inner` holds the projections of query, key and value."""
    projections = {role: f"attention.{inner}.{role}" for role in ("query", "key", "value")}
    return roles(norm1, norm2, "attention", "output.dense", fc1, fc2) | projections


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


def _last_map_feature(tower: nn.Module, output: Any) -> Tensor:
    """The mean of an AutoBackbone's last map, which has no class token; of tokens in place of a map that token."""
    last = output.feature_maps[-1]
    return last.mean(dim=(2, 3)) if last.ndim == 4 else last[:, 0]


def _beit_pools(tower: Any) -> bool:
    return tower.config.use_mean_pooling and tower.pooler is not None


def _beit_feature(tower: Any, output: Any) -> Tensor:
    """BEiT pools as its own classifier does: the normed mean of the patches, or the class token."""
    return output.pooler_output if _beit_pools(tower) else output.last_hidden_state[:, 0]


def _beit_norm(tower: Any) -> nn.Module:
    pooler: Any = tower.pooler if tower.config.use_mean_pooling else None
    return tower.layernorm if pooler is None else pooler.layernorm


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
    module: Any = sys.modules[type(self).__module__]
    plain = module.eager_attention_forward
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain)
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
        staged="within windows",
        prepare_view=_swin_view,
    ),
    "SegformerModel": Family(
        "segformer",
        "stages.*.blocks.*",
        class_token=None,
        final_norm=lambda tower: tower.stages[-1].layer_norm,
        feature=_map_feature,
        any_size=True,
        staged="to reduced maps",
        key_norm="attention.sequence_reduction.layer_norm",
        patches="stages.0.patch_embeddings",
        patch_size=lambda config: config.patch_sizes[0],
        image_size=lambda config: 512,  # its configuration names none: the size of its segmentation checkpoints
    ),
}

_AS_CLIP = {
    "AltCLIPVisionModel": "altclip",
    "ChineseCLIPVisionModel": "chinese_clip",
    "CLIPSegVisionModel": "clipseg",
    "MetaClip2VisionModel": "metaclip_2",
}
"""Towers with the code of CLIP's, and the names of their families."""

TOWERS |= {tower: replace(TOWERS["CLIPVisionModel"], name=name) for tower, name in _AS_CLIP.items()}

AUTO_TOWERS: dict[str, Family] = {
    f"{name}Backbone": replace(
        TOWERS[f"{name}Model"],
        name=f"{TOWERS[f'{name}Model'].name}_backbone",
        feature=_last_map_feature,
        ends_at_last_block=False,  # the last map may be of an earlier block
        reads_class_token=lambda tower: not tower.config.reshape_hidden_states,
    )
    for name in ("Dinov2", "Dinov2WithRegisters")
}
"""AutoBackbones that are towers themselves, with maps of some blocks as their output; others have one of `TOWERS`."""

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
        staged="within windows",
        attention_function=False,
        head_width="self.attention_head_size",
    ),
    "PvtModel": Family(
        "pvt",
        "encoder.block.*.*",
        _dense_roles("self", "layer_norm_1", "layer_norm_2", "mlp.dense1", "mlp.dense2"),
        class_token=None,
        final_norm=lambda tower: tower.encoder.layer_norm,
        staged="to reduced maps",
        attention_function=False,
        patches="encoder.patch_embeddings.0",
        patch_size=lambda config: config.patch_sizes[0],
        head_width="self.attention_head_size",
    ),
}
"""Towers whose attention modules compute attention themselves: for methods that need no attention function."""

# MaskFormer has a Swin of its own, in the manner of Swin v2; Mask2Former has transformers' Swin
PLAIN_TOWERS["MaskFormerSwinModel"] = replace(PLAIN_TOWERS["Swinv2Model"], name="maskformer_swin")
