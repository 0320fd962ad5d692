"""timm's vision transformers as towers: the only file that knows their modules' names. It imports no timm.

timm keeps query, key and value in one linear layer, calls its attention kernel itself, and hands nothing on from block
to block. So `TimmTower` gives a model the form of transformers' towers, on module objects of its own: there the
attention modules have the three as parts of that layer, and in a view they call the attention function that is chosen,
as transformers' do. While no part is replaced the fused layer runs, so that outputs are bit for bit timm's.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedBackboneError
from .family import Family
from .fused import LinearPart
from .timm_models import timm_class, wrap_again
from .views import shadow, shadow_config

TOWER = "VisionTransformer"
"""timm's class of ViT, DeiT (`VisionTransformerDistilled` is made of it), DINOv2, CLIP and SigLIP."""

OLDEST = "timm 1.0.20"
"""The first release whose modules are those that this file knows."""

_PROJECTIONS = ("query", "key", "value")
"""In the order in which timm's fused layer has them."""

_POOLS = ("token", "avg", "avgmax", "max", "map", "prr")
"""The ways to one feature; with '' the classifier reads all tokens."""


def find_timm_tower(model: PreTrainedModel) -> tuple[TimmTower, Family] | None:
    """The tower of a wrapper of transformers around a timm model, and its row; None for any other model.

    Raises:
        UnsupportedBackboneError: It is a timm model of another kind.
    """
    inner: Any = model._modules.get("timm_model")
    if inner is None or timm_class(inner) is None:
        return None
    check_timm(inner)
    row = _ROW if inner.has_class_token else replace(_ROW, class_token=None)
    return TimmTower(inner, model.config), row


def check_timm(inner: Any) -> None:
    """Raise `UnsupportedBackboneError` unless all of a timm model is what this file knows."""
    own: Any = next((kind for kind in type(inner).__mro__ if kind.__name__ == TOWER), None)
    kind: Any = type(inner)
    if own is None or (kind.forward, kind.forward_features) != (own.forward, own.forward_features):
        raise UnsupportedBackboneError(
            f"got timm's {type(inner).__name__}; of timm's models memtune knows those of the class {TOWER} (vit_*, "
            "deit_*)"
        )
    reasons = []
    if inner.global_pool not in _POOLS:
        reasons.append(f"global_pool={inner.global_pool!r}, which leaves more than one feature: make it with 'token'")
    if type(inner.patch_embed).__name__ != "PatchEmbed":
        reasons.append(f"patches made by {type(inner.patch_embed).__name__}, expected PatchEmbed")
    for block in inner.blocks:
        attention: Any = getattr(block, "attn", None)
        if type(block).__name__ != "Block" or type(attention).__name__ != "Attention":
            reasons.append(f"blocks of the class {type(block).__name__} with {type(attention).__name__}")
        elif not all(isinstance(norm, nn.Identity) for norm in (attention.q_norm, attention.k_norm)):
            reasons.append("norms of queries and keys (qk_norm), which further keys would not have")
        elif "norm" not in attention._modules:
            reasons.append(f"the Attention of another release than {OLDEST} and later ones")
        elif getattr(attention, "gate", None) is not None:
            reasons.append("a gate on the output of attention (gated)")
        elif type(attention.qkv) is not nn.Linear:
            reasons.append(f"query, key and value in a {type(attention.qkv).__name__}, expected torch.nn.Linear")
    if reasons:
        raise UnsupportedBackboneError(
            f"got timm's {type(inner).__name__} with what memtune does not know: {'; '.join(dict.fromkeys(reasons))}"
        )


class TimmTower(nn.Module):
    """A timm model without its head, with the parts and the forward of transformers' towers.

    Its modules are a view's: the timm model is left as it is.

    Attributes:
        config: The wrapper's configuration, and what it lacks.

    Args:
        outer: The timm model, or that of a view.
        config: The configuration of the wrapper.
    """

    def __init__(self, outer: Any, config: Any) -> None:
        super().__init__()
        inner: Any = shadow(outer)
        self._outer, self._inner = (outer,), (inner,)  # in tuples: they are no children
        self.__dict__["_parameters"] = inner._parameters  # class token and positions
        self.embeddings = _Embeddings(inner)
        self.norm_pre, self.blocks, self.norm, self.fc_norm = inner.norm_pre, inner.blocks, inner.norm, inner.fc_norm
        if inner.attn_pool is not None:
            self.attn_pool = inner.attn_pool
        self.config = shadow_config(config)
        self.config.patch_size = list(inner.patch_embed.patch_size)
        self.config.image_size = list(inner.patch_embed.img_size)
        self.config.num_channels = inner.patch_embed.proj.in_channels
        # A trunk's tensors depend on these, too, and they stand in no configuration of the wrapper.
        self.config.pooling, self.config.position_of_class_token = inner.global_pool, not inner.no_embed_class
        self.config.block = repr(inner.blocks[0])
        for block in self.blocks:
            attention: Any = block.attn
            attention.config = _AttentionConfig("sdpa" if attention.fused_attn else "eager")
            width = attention.qkv.out_features // 3
            for place, role in enumerate(_PROJECTIONS):
                attention.add_module(role, LinearPart(attention.qkv, place * width, (place + 1) * width))
        self.eval()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """The tokens after the last norm; the blocks get the keyword arguments."""
        states = self.embeddings(pixel_values)
        states = self.norm_pre(self._inner[0].patch_drop(states))
        recompute = self._outer[0].grad_checkpointing and is_grad_enabled()
        for block in self.blocks:
            states = _recomputed(block, states, **kwargs) if recompute else block(states, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(states))

    def pool(self, tokens: Tensor) -> Tensor:
        """What timm's classifier reads, (batch, width), of tokens (batch, tokens, width)."""
        return self._inner[0].forward_head(tokens, pre_logits=True)

    def tokens(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """What takes the place of the `forward_features` of a view's timm model."""
        return self(pixel_values, **kwargs).last_hidden_state

    def logits(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """What takes the place of its `forward`."""
        return self._outer[0].forward_head(self.tokens(pixel_values, **kwargs))

    def reads_class_token(self) -> bool:
        """Whether the classifier reads the class token alone."""
        return self._inner[0].global_pool == "token" and "dist_token" not in self._parameters

    def first_position(self) -> Tensor | None:
        """The class token's position, (1, 1, width), or None."""
        inner = self._inner[0]
        return None if inner.pos_embed is None or inner.no_embed_class else inner.pos_embed[:, :1]

    def refuses(self, height: int, width: int) -> str | None:
        """Why the model takes no images of this size, in pixels, and what to do about it; None if it does."""
        patch, (expected_height, expected_width) = self.config.patch_size, self.config.image_size
        if not self._inner[0].dynamic_img_size and (height, width) != (expected_height, expected_width):
            return (
                f"expected {expected_height} x {expected_width}; let the processor resize the images, or make the timm "
                "model with dynamic_img_size=True"
            )
        return f"expected multiples of the patch size {patch}" if height % patch[0] or width % patch[1] else None


def _recomputed(block: nn.Module, states: Tensor, **kwargs: Any) -> Tensor:
    return checkpoint(block, states, use_reentrant=False, **kwargs)  # type: ignore[return-value]


class _Embeddings(nn.Module):
    """The tokens that enter timm's blocks, before the norm that some models have there."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.patch_embed = inner.patch_embed
        self._inner = (inner,)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(self.patch_embed.proj.weight.dtype)
        return self._inner[0]._pos_embed(self.patch_embed(pixel_values))


class _AttentionConfig:
    """What `memtune.streams.attention` asks of an attention module's configuration: the kernel it is set to."""

    def __init__(self, kernel: str) -> None:
        self._attn_implementation = self._attn_implementation_internal = kernel


class _Block(nn.Module):
    """timm's `Block` in a view, which hands on what belongs to a pass."""

    def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
        module: Any = self
        states = states + module.drop_path1(module.ls1(module.attn(module.norm1(states), **kwargs)))
        return states + module.drop_path2(module.ls2(module.mlp(module.norm2(states))))


class _Attention(nn.Module):
    """timm's `Attention` in a view, with the attention function that its configuration names."""

    def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
        module: Any = self
        batch, number, _ = states.shape
        parts = [self._modules[role] for role in _PROJECTIONS]
        if all(isinstance(part, LinearPart) for part in parts):
            fused = module.qkv(states).reshape(batch, number, 3, module.num_heads, module.head_dim)
            query, key, value = fused.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            shape = (batch, number, module.num_heads, module.head_dim)
            query, key, value = (part(states).view(shape).transpose(1, 2) for part in parts if part is not None)
        name = module.config._attn_implementation_internal
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        context, _ = attend(self, query, key, value, None, is_causal=False, **kwargs)
        return module.proj_drop(module.proj(module.norm(context.reshape(batch, number, -1))))


def eager_attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The arithmetic of timm where its modules call no fused kernel (`Site` finds it by this name)."""
    scores = (query * module.scale) @ key.transpose(-2, -1)
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


def _prepare_view(tower: TimmTower) -> None:
    """Let a view's blocks hand on what belongs to a pass, and its timm model run the tower."""
    for block in tower.blocks:
        block.attn.__class__ = _Attention  # type: ignore[union-attr]
        block.__class__ = _Block
    outer = tower._outer[0]
    outer.forward_features, outer.forward = tower.tokens, tower.logits


def _final_norm(tower: Any) -> nn.Module:
    return tower.norm if isinstance(tower.fc_norm, nn.Identity) else tower.fc_norm


def _as_classifier(model: PreTrainedModel) -> PreTrainedModel:
    """A view of a timm model in transformers' image classification class."""
    inner: Any = model.timm_model
    return wrap_again(shadow(inner), copy.deepcopy(model.config), with_head=True)


def _put_head(model: Any, head: nn.Module) -> bool:
    inner = model.timm_model
    for name in ("head", "head_dist"):  # which a distilled model means the logits of
        if name in inner._modules:
            inner.add_module(name, copy.deepcopy(head))
    if isinstance(head, nn.Linear):
        inner.num_classes = head.out_features
    return True


_ROW = Family(
    "timm_vit",
    "blocks.*",
    {
        "norm1": "norm1",
        "attention": "attn",
        "query": "attn.query",
        "key": "attn.key",
        "value": "attn.value",
        "out": "attn.proj",
        "norm2": "norm2",
        "fc1": "mlp.fc1|mlp.fc1_x",
        "fc2": "mlp.fc2",
    },
    class_token="cls_token",
    class_position=lambda tower: tower.first_position(),
    first_norm="norm_pre",
    final_norm=_final_norm,
    feature=lambda tower, output: tower.pool(output.last_hidden_state),  # type: ignore[attr-defined]
    reads_class_token=lambda tower: tower.reads_class_token(),
    any_size=True,
    refuses_size=lambda tower, height, width: tower.refuses(height, width),
    prepare_view=_prepare_view,
    as_classifier=_as_classifier,
    put_head=_put_head,
)
