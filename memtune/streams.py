"""The trunk and the task stream: the paper's attention mask, built not as a mask but as two passes.

"Fine-tuning Image Transformers using Learnable Memory" (https://arxiv.org/abs/2203.15243), table 1: base tokens see
base tokens only; a task's class token sees the base tokens, itself and its own memory. So the base tokens can run alone
through the untouched blocks (the trunk), and the task token after them through the same blocks (the task stream).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Pass, Site, check_visited, install
from .backbones import Backbone


class AdaptedStream:
    """Unmasked mode: one pass in which the adapter changes what all tokens see.

    Args:
        backbone: The backbone.
        checkpointing: Recompute blocks in the backward pass: the arguments of transformers' method that switches it on
            for a model, those of torch's checkpoint function as `kwargs`; None to keep activations.
    """

    masked = False

    def __init__(self, backbone: Backbone, *, checkpointing: Mapping[str, Any] | None = None) -> None:
        self.view = backbone.view()
        self.sites: list[Site] = install(self.view, "memtune_adapted") if backbone.family.attention_function else []
        self._backbone = backbone
        self._unadapted: Backbone | None = None
        if checkpointing is None:
            return
        model: Any = self.view.model
        options = dict(checkpointing)
        # by its name in this release of transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options.pop("kwargs"), **options)
        for block in self.view.blocks:
            # transformers checkpoints a block only while it says that it trains; its children stay in evaluation mode.
            block.module.training = True

    def require_query(self) -> None:
        """Give each pass the feature of the unadapted backbone as its query, by a pass of its own before it."""
        self._unadapted = self._unadapted or self._backbone.view()

    def features(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> Tensor:
        """Features (batch, width) of images (batch, channels, height, width)."""
        options: dict[str, Any] = {"interpolate_pos_encoding": interpolate_pos_encoding}
        if not self.sites:
            return self.view.features(pixel_values, **options)
        current = Pass()
        if self._unadapted is not None:
            with torch.no_grad():
                current.query = self._unadapted.features(pixel_values, **options)
        features = self.view.features(pixel_values, memtune_pass=current, **options)
        check_visited(self.view, current)
        return features


class Trunk:
    """The pass of the image tokens through the untouched backbone, its keys and values kept for task streams."""

    def __init__(self, backbone: Backbone) -> None:
        self.view = backbone.view()
        install(self.view, "memtune_trunk")

    @torch.no_grad()
    def run(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> tuple[Pass, Any]:
        """Run the trunk over images (batch, channels, height, width).

        Returns:
            The pass, with what task streams read of each block and the backbone's feature as its query; and the
            tower's own output: bit for bit that of the untouched backbone.
        """
        current = Pass()
        options: dict[str, Any] = {"interpolate_pos_encoding": interpolate_pos_encoding, "memtune_pass": current}
        output = self.view.run_tower(pixel_values, **options)
        check_visited(self.view, current)
        current.query = self.view.family.feature(self.view.tower, output)
        return current, output


class TaskStream:
    """The pass of a task token through the backbone's blocks, reading the trunk and never writing to it."""

    masked = True

    def __init__(self, backbone: Backbone) -> None:
        self.view = backbone.view()
        self.sites: list[Site] = install(self.view, "memtune_stream")
        for block in self.view.blocks:
            self.view.family.prepare_stream(block.module)

    def features(self, current: Pass, class_token: Tensor) -> Tensor:
        """Features (batch, width) of a task.

        Args:
            current: A pass that the trunk has filled.
            class_token: The task's class token, of the shape of the backbone's.
        """
        batch = current.trunk[0].key.shape[0]
        token = self.view.start(class_token).expand(batch, -1, -1)  # (batch, 1, width)
        for block in self.view.blocks:
            token = self._block(block.module, token, current)
        return self.view.finish(token)

    def _block(self, module: nn.Module, token: Tensor, current: Pass) -> Tensor:
        arguments = self.view.family.stream_arguments(module, self.view.tower, token)
        output = module(token, **arguments, memtune_pass=current)
        return output[0] if isinstance(output, tuple) else output
