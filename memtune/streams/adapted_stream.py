"""Unmasked mode: the adapted stream, a pass in which adapters change what all tokens see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..backbones import Backbone
from .attention import check_visited, install, skip
from .passes import Pass
from .stream import Stream


class AdaptedStream(Stream):
    """Unmasked mode: one pass in which the adapter changes what all tokens see.

    Args:
        backbone: The backbone.
        first_block: Start at this block, from the states that a trunk kept for it; 0 to run the whole tower.
        recompute: Recompute blocks in the backward pass: the arguments of transformers' method that switches it on for
            a model, those of torch's checkpoint function as `kwargs`; None to keep activations.
        whole_model: Make `run_model` possible, in which the backbone's own head reads the adapted tower.
    """

    masked = False

    def __init__(
        self,
        backbone: Backbone,
        *,
        first_block: int = 0,
        recompute: Mapping[str, Any] | None = None,
        whole_model: bool = False,
    ) -> None:
        view = backbone.view()
        super().__init__(view, install(view, "memtune_adapted") if backbone.family.attention_function else [])
        self._first_block = first_block
        self._untouched: Backbone | None = None
        self._backbone = backbone
        if first_block:
            _start_at(self.view, first_block)
        if recompute is not None:
            self._recompute(dict(recompute))
        if whole_model and self.sites:
            self.view.tower.register_forward_pre_hook(self._begin_pass, with_kwargs=True)
            self.view.tower.register_forward_hook(self._end_pass, with_kwargs=True)

    def _recompute(self, options: dict[str, Any]) -> None:
        model: Any = self.view.model
        # by its name in this release of transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options.pop("kwargs"), **options)
        for block in self.view.blocks:
            # transformers checkpoints a block only while it says that it trains; its children stay in evaluation mode.
            block.module.training = True

    def features(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, current: Pass | None = None
    ) -> Tensor:
        """Features (batch, width).

        Args:
            pixel_values: Images (batch, channels, height, width); one alone where the stream starts at a later block.
            interpolate_pos_encoding: As for the backbone.
            current: A pass that has what a trunk knows of the images already: the states that the stream starts from,
                and the query. If a query is needed and not there, it takes a pass of the untouched backbone.
        """
        options: dict[str, Any] = {"interpolate_pos_encoding": interpolate_pos_encoding}
        if not self.sites:
            return self.view.features(pixel_values, **options)
        current = current or Pass()
        if self.needs_query and current.query is None:
            with torch.no_grad():
                current.query = self._untouched_view().features(pixel_values, **options)
        features = self.view.features(pixel_values, memtune_pass=current, **options)
        check_visited(self.view, current, self._first_block)
        return features

    def _untouched_view(self) -> Backbone:
        self._untouched = self._untouched or self._backbone.view()
        return self._untouched

    def run_model(self, pixel_values: Tensor, **inputs: Any) -> ModelOutput:
        """The output of the whole model, whose own head reads the adapted tower; of a stream made for it.

        Args:
            pixel_values: Images (batch, channels, height, width).
            inputs: What else the model's own forward takes.
        """
        return self.view.model(pixel_values=pixel_values, return_dict=True, **inputs)

    def _begin_pass(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give the tower a pass of its own: few models hand unknown arguments on to the tower within them."""
        if "memtune_pass" in kwargs:
            return None
        current = Pass()
        if self.needs_query:
            view = self._untouched_view()
            with torch.no_grad():
                current.query = view.family.feature(view.tower, view.tower(*args, **kwargs))
        return args, kwargs | {"memtune_pass": current}

    def _end_pass(self, tower: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        check_visited(self.view, kwargs["memtune_pass"], self._first_block)


def _start_at(view: Backbone, first_block: int) -> None:
    """Let a view's tower skip the blocks before `first_block`, which gets the states that the pass brings along."""
    skip(view.blocks[:first_block])
    view.blocks[first_block].module.register_forward_pre_hook(_recall, with_kwargs=True)


def _recall(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    current: Pass = kwargs["memtune_pass"]
    assert current.states is not None
    return (current.states, *args[1:]), kwargs
