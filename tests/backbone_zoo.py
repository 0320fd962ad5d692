"""A tiny random backbone of every supported family, with facts about each written down without memtune.

The facts (where the tower, its blocks and its class token are, what its own classifier reads) are repeated here on
purpose: tests compare memtune's role table with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

SIZE = 32
WIDTH = 16
DEPTH = 2


@dataclass(frozen=True)
class Facts:
    """What holds for all models with one kind of tower."""

    blocks: str = "layers"
    norm1: str = "layernorm_before"
    attention: str = "attention"
    class_token: str | None = "embeddings.cls_token"
    feature: Callable[[Any, Any], Tensor] = lambda tower, output: output.last_hidden_state[:, 0]
    """What a head reads of the tower's output, (batch, width)."""
    finish: Callable[[Any, Tensor], Tensor] = lambda tower, first: first
    """Makes of the first token of the tower's last hidden state what a head reads of a task token."""
    prefix: int = 1
    """Number of tokens before those of the patches."""
    windowed: bool = False
    staged: bool = False
    """Made of stages of several widths, whose blocks do not attend to all tokens."""
    any_size: bool = False
    patch_size: int = 8
    trained_size: int | None = None
    """The size of images that the configuration does not name."""


def random_model(make: Callable[[], Any], seed: int) -> Any:
    """A model in evaluation mode, every parameter random: also biases, scales and position tables.

    The rest of the test runs in one thread: on a busy machine, waiting for the second one takes longer than all of a
    tiny model's arithmetic.
    """
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=(parameter[0].numel() if parameter.ndim == 2 else 4) ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """One model of the zoo."""

    name: str
    model_class: str
    settings: dict[str, Any] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    tower_path: str = ""
    config_class: str = ""
    image_size: int = SIZE
    channels: int = 3
    depth: int = DEPTH
    width: int = WIDTH

    def build(self, seed: int = 0, **settings: Any) -> Any:
        """The model, as `random_model` makes it."""
        return random_model(lambda: getattr(transformers, self.model_class)(self.config(**settings)), seed)

    def config(self, **settings: Any) -> Any:
        config_class = self.config_class or self.model_class.partition("For")[0].removesuffix("Model") + "Config"
        return getattr(transformers, config_class)(**(self.settings | settings))

    def tower(self, model: nn.Module) -> Any:
        return model.get_submodule(self.tower_path)

    def blocks(self, model: nn.Module) -> list[Any]:
        found = self.tower(model).get_submodule(self.facts.blocks)
        if hasattr(found[0], "blocks"):
            found = [stage.blocks for stage in found]
        nested = isinstance(found[0], nn.ModuleList)
        return [block for stage in found for block in stage] if nested else list(found)

    def widths(self, model: nn.Module) -> list[int]:
        return [getattr(block, self.facts.norm1).weight.numel() for block in self.blocks(model)]

    def images(self, batch: int = 2, size: int | None = None) -> Tensor:
        size = size or self.image_size
        return torch.randn(batch, self.channels, size, size, generator=torch.Generator().manual_seed(1))

    def run_tower(self, model: nn.Module, images: Tensor, **options: Any) -> Any:
        """The bare tower's own output; ViT-MAE without dropping or shuffling patches."""
        tower = self.tower(model)
        if not self.model_class.startswith("ViTMAE"):
            return tower(images, **options)
        patches = (images.shape[-1] // tower.config.patch_size) ** 2
        ratio, tower.embeddings.config.mask_ratio = tower.embeddings.config.mask_ratio, 0.0
        try:
            return tower(images, noise=torch.arange(patches).expand(len(images), -1), **options)
        finally:
            tower.embeddings.config.mask_ratio = ratio


def _beit_pooled(tower: Any, output: Any) -> Tensor:
    return tower.pooler.layernorm(output.last_hidden_state[:, 1:].mean(1))


def _post_norm(tower: Any, first: Tensor) -> Tensor:
    return tower.post_layernorm(first)


_PLAIN = Facts()
_NO_CLASS = Facts(class_token=None, prefix=0, feature=lambda tower, output: output.last_hidden_state.mean(1))
_DINO = Facts(blocks="encoder.layer", norm1="norm1", any_size=True)
_DINO3 = Facts(blocks="model.layer", norm1="norm1", any_size=True, prefix=5)
_BEIT = Facts(any_size=True)
_BEIT_MEAN = Facts(any_size=True, feature=_beit_pooled, finish=lambda tower, first: tower.pooler.layernorm(first))
_CLIP = Facts(
    blocks="encoder.layers",
    norm1="layer_norm1",
    attention="self_attn",
    class_token="embeddings.class_embedding",
    feature=lambda tower, output: tower.post_layernorm(output.last_hidden_state[:, 0]),
    finish=_post_norm,
)
_SIGLIP = Facts(
    blocks="encoder.layers",
    norm1="layer_norm1",
    attention="self_attn",
    class_token=None,
    prefix=0,
    feature=lambda tower, output: output.last_hidden_state.mean(1),
)
_SWIN = Facts(
    blocks="encoder.layers",
    class_token=None,
    prefix=0,
    feature=lambda tower, output: output.last_hidden_state.mean(1),
    windowed=True,
    staged=True,
    any_size=True,
    patch_size=4,
)
_SEGFORMER_FACTS = Facts(
    blocks="stages",
    class_token=None,
    prefix=0,
    feature=lambda tower, output: output.last_hidden_state.flatten(2).mean(2),
    staged=True,
    any_size=True,
    patch_size=7,
    trained_size=512,
)
_PVT_FACTS = Facts(blocks="encoder.block", norm1="layer_norm_1")

_SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": SIZE,
    "patch_size": 8,
}
_HEAD = _SMALL | {"num_labels": 3}
_TEXT: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 30,
    "max_position_embeddings": 12,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "projection_size": WIDTH,
}
_TWO_TOWERS = {"vision_config": _SMALL, "text_config": _TEXT}
_SWIN_SMALL = {"image_size": 48, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}
_SWIN_SMALL = _SWIN_SMALL | {"window_size": 4, "mlp_ratio": 2.0, "drop_path_rate": 0.0}
_SWINV2 = {"image_size": SIZE, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4}
_PVT = {"image_size": SIZE, "num_encoder_blocks": 2, "depths": [1, 2], "hidden_sizes": [8, 16], "mlp_ratios": [2, 2]}
_PVT = _PVT | {"num_attention_heads": [1, 2], "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]}
_PVT = _PVT | {"strides": [4, 2]}
_SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
_SEGFORMER = _SEGFORMER | {
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
_SEGFORMER = _SEGFORMER | {"decoder_hidden_size": 12, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
_BEIT_BIAS = {"use_relative_position_bias": True, "use_absolute_position_embeddings": False}
_DINO3_SMALL = _SMALL | {"num_register_tokens": 4, "layerscale_value": 0.5}

CASES = [
    Case("vit", "ViTModel", _SMALL),
    Case("vit-head", "ViTForImageClassification", _HEAD, tower_path="vit"),
    Case("deit", "DeiTModel", _SMALL, Facts(prefix=2)),
    Case("deit-head", "DeiTForImageClassification", _HEAD, Facts(prefix=2), "deit"),
    Case("deit-teacher", "DeiTForImageClassificationWithTeacher", _HEAD, Facts(prefix=2), "deit"),
    Case("vit_msn", "ViTMSNModel", _SMALL),
    Case("vit_msn-head", "ViTMSNForImageClassification", _HEAD, tower_path="vit"),
    Case("vit_mae", "ViTMAEModel", _SMALL),
    Case("vit_mae-pretraining", "ViTMAEForPreTraining", _SMALL | {"decoder_num_hidden_layers": 1}, tower_path="vit"),
    Case("ijepa", "IJepaModel", _SMALL, _NO_CLASS),
    Case("ijepa-head", "IJepaForImageClassification", _HEAD, _NO_CLASS, "ijepa"),
    Case("beit", "BeitModel", _SMALL | _BEIT_BIAS | {"use_mean_pooling": False}, _BEIT),
    Case("beit-head", "BeitForImageClassification", _HEAD | _BEIT_BIAS, _BEIT_MEAN, "beit"),
    Case("beit-shared", "BeitModel", _SMALL | {"use_shared_relative_position_bias": True}, _BEIT_MEAN),
    Case(
        "beit-shared-head",
        "BeitForImageClassification",
        _HEAD | _BEIT_BIAS | {"use_shared_relative_position_bias": True, "use_mean_pooling": False},
        _BEIT,
        "beit",
    ),
    Case("beit-absolute", "BeitModel", _SMALL | {"use_absolute_position_embeddings": True}, _BEIT_MEAN),
    Case("dinov2", "Dinov2Model", _SMALL, _DINO),
    Case("dinov2-head", "Dinov2ForImageClassification", _HEAD, _DINO, "dinov2"),
    Case("dinov2-swiglu", "Dinov2Model", _SMALL | {"use_swiglu_ffn": True}, _DINO),
    Case("dinov2_with_registers", "Dinov2WithRegistersModel", _SMALL, Facts("encoder.layer", "norm1", prefix=5)),
    Case(
        "dinov2_with_registers-head",
        "Dinov2WithRegistersForImageClassification",
        _HEAD,
        Facts("encoder.layer", "norm1", prefix=5),
        "dinov2_with_registers",
    ),
    Case("dinov3", "DINOv3ViTModel", _DINO3_SMALL, _DINO3),
    Case("dinov3-gated", "DINOv3ViTModel", _DINO3_SMALL | {"use_gated_mlp": True, "hidden_act": "silu"}, _DINO3),
    Case("clip", "CLIPVisionModel", _SMALL, _CLIP),
    Case("clip-projection", "CLIPVisionModelWithProjection", _SMALL, _CLIP, "vision_model", "CLIPVisionConfig"),
    Case("clip-head", "CLIPForImageClassification", _TWO_TOWERS, _CLIP, "vision_model"),
    Case("clip-two-towers", "CLIPModel", _TWO_TOWERS, _CLIP, "vision_model"),
    Case("altclip", "AltCLIPVisionModel", _SMALL, _CLIP),
    Case("chinese_clip", "ChineseCLIPVisionModel", _SMALL, _CLIP),
    Case("clipseg", "CLIPSegVisionModel", _SMALL, _CLIP),
    Case("metaclip_2", "MetaClip2VisionModel", _SMALL, _CLIP),
    Case("siglip", "SiglipVisionModel", _SMALL, _SIGLIP),
    Case("siglip-head", "SiglipForImageClassification", _TWO_TOWERS, _SIGLIP, "vision_model"),
    Case("siglip-two-towers", "SiglipModel", _TWO_TOWERS, _SIGLIP, "vision_model"),
    Case("swin", "SwinModel", _SWIN_SMALL, _SWIN, image_size=48, depth=3),
    Case("swin-head", "SwinForImageClassification", _SWIN_SMALL, _SWIN, "swin", image_size=48, depth=3),
    Case("segformer", "SegformerModel", _SEGFORMER, _SEGFORMER_FACTS, depth=3),
    Case("segformer-head", "SegformerForImageClassification", _SEGFORMER, _SEGFORMER_FACTS, "segformer", depth=3),
]

PLAIN = [
    Case("swinv2", "Swinv2Model", _SWINV2, _SWIN, depth=3),
    Case("swinv2-head", "Swinv2ForImageClassification", _SWINV2, _SWIN, "swinv2", depth=3),
    Case("pvt", "PvtModel", _PVT, _PVT_FACTS, depth=3),
    Case("pvt-head", "PvtForImageClassification", _PVT, _PVT_FACTS, "pvt", depth=3),
]
"""Backbones that do not use transformers' AttentionInterface."""

BY_NAME = {case.name: case for case in CASES}
GLOBAL = [case for case in CASES if not case.facts.staged]

FAMILIES = [case for case in CASES if not case.tower_path]
"""One plain model of every variant of a tower."""


def each(cases: list[Case], name: str = "case") -> pytest.MarkDecorator:
    """Run a test for every case."""
    return pytest.mark.parametrize(name, cases, ids=[case.name for case in cases])


MODES = [(case, masked) for case in CASES for masked in (False, True) if not (masked and case.facts.staged)]

each_mode = pytest.mark.parametrize(
    ("case", "masked"), MODES, ids=[f"{case.name}-{'masked' if masked else 'unmasked'}" for case, masked in MODES]
)
"""Run a test for every case in every mode that it has."""

family_modes = pytest.mark.parametrize(
    ("case", "masked"),
    [(case, masked) for case, masked in MODES if case in FAMILIES],
    ids=[f"{case.name}-{'masked' if masked else 'unmasked'}" for case, masked in MODES if case in FAMILIES],
)
"""The same for one plain model of every variant of a tower."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within, the model is frozen as a wrapped one is, and answers without gradients.

    What is bit for bit the same is the frozen model's answer: torch's kernels of `nn.MultiheadAttention` (SigLIP's
    pooling) round otherwise for weights that need a gradient.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that wrapping it must give back."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identity": {name: id(parameter) for name, parameter in model.named_parameters()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "attention": {
            name: module.config._attn_implementation
            for name, module in model.named_modules()
            if hasattr(module, "config")
        },
        "attributes": {
            name: sorted(set(vars(module)) - {"_is_hf_initialized"}) for name, module in model.named_modules()
        },
        "hooks": {
            name: sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value)
            for name, module in model.named_modules()
        },
    }


def assert_same(model: nn.Module, before: dict[str, Any], *, ignore: tuple[str, ...] = ()) -> None:
    """Compare a model with its snapshot, bit for bit."""
    now = snapshot(model)
    for name, value in before.items():
        if name == "tensors":
            assert value.keys() == now[name].keys()
            assert all(torch.equal(tensor, now[name][key]) for key, tensor in value.items())
        elif name not in ignore:
            assert now[name] == value, name


def outputs_equal(first: Any, second: Any) -> bool:
    """Whether two outputs of a Hugging Face model have the same tensors, bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(outputs_equal, first, second))
    if hasattr(first, "items"):
        return first.keys() == second.keys() and all(outputs_equal(first[key], second[key]) for key in first)
    return first == second
