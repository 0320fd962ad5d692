"""Tiny random vision transformers of timm's, in the form of the zoo's cases, so that the contract runs on them too."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import timm
from backbone_zoo import DEPTH, SIZE, WIDTH, Case, Facts, random_model
from torch import Tensor, nn

from memtune.backbones.backbone import as_pretrained

SMALL: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": 2,
    "num_classes": 3,
}

CLASS = Facts(class_token="cls_token", any_size=True)
NO_CLASS = Facts(class_token=None, any_size=True)


@dataclass(frozen=True)
class TimmCase(Case):
    """A model of timm's, by the name of its architecture; `build` gives it in transformers' wrapper."""

    facts: Facts = field(default_factory=lambda: CLASS)

    def bare(self, seed: int = 0, **settings: Any) -> Any:
        """The model itself, every parameter random."""
        return random_model(lambda: timm.create_model(self.model_class, **(SMALL | self.settings | settings)), seed)

    def build(self, seed: int = 0, **settings: Any) -> Any:
        return as_pretrained(self.bare(seed, **settings))

    def tower(self, model: Any) -> Any:
        return model.timm_model

    def blocks(self, model: Any) -> list[Any]:
        """For each block layers of the shapes of its linear ones, query, key and value apart."""
        width = WIDTH
        return [
            nn.ModuleList([*(nn.Linear(width, width) for _ in range(4)), block.mlp.fc1, block.mlp.fc2])
            for block in model.timm_model.blocks
        ]

    def widths(self, model: Any) -> list[int]:
        return [WIDTH] * DEPTH

    def run_tower(self, model: Any, images: Tensor, **options: Any) -> Any:
        """timm's own tokens."""
        return SimpleNamespace(last_hidden_state=model.timm_model.forward_features(images)).__dict__


CASES = [
    TimmCase("timm-vit", "vit_tiny_patch16_224"),
    TimmCase("timm-vit-no-head", "vit_tiny_patch16_224", {"num_classes": 0}),
    TimmCase("timm-deit-distilled", "deit_tiny_distilled_patch16_224"),
    TimmCase("timm-mean", "vit_tiny_patch16_224", {"global_pool": "avg"}),
    TimmCase("timm-mean-no-class", "vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, NO_CLASS),
    # layer scale, registers, no position of the class token
    TimmCase("timm-dinov2-registers", "vit_small_patch14_reg4_dinov2", {"init_values": 0.5}),
    TimmCase("timm-clip", "vit_base_patch32_clip_224"),
    TimmCase("timm-siglip", "vit_base_patch16_siglip_224", facts=NO_CLASS),
    TimmCase("timm-scaled-norms", "vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
]

BY_NAME = {case.name: case for case in CASES}
