"""The trunk and the task stream: the paper's attention mask, built not as a mask but as two passes.

"Fine-tuning Image Transformers using Learnable Memory" (https://arxiv.org/abs/2203.15243), table 1: base tokens see
base tokens only; a task's class token sees the base tokens, itself and its own memory. So the base tokens can run alone
through the untouched blocks (the trunk), and the task token after them through the same blocks (the task stream).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..backbones import Backbone
from ..casting import keep_casts
from .attention import Site, check_visited, install
from .following import Followers
from .passes import Pass
from .stacking import Selection


class AdaptedStream:
    """Unmasked mode: one pass in which the adapter changes what all tokens see.

    Attributes:
        selection: Which of several tasks each image is for, where adapters of several are attached.

    Args:
        backbone: The backbone.
        first_block: Start at this block, from the states that a trunk kept for it; 0 to run the whole tower.
        checkpointing: Recompute blocks in the backward pass: the arguments of transformers' method that switches it on
            for a model, those of torch's checkpoint function as `kwargs`; None to keep activations.
        whole_model: Make `run_model` possible, in which the backbone's own head reads the adapted tower.
    """

    masked = False

    def __init__(
        self,
        backbone: Backbone,
        *,
        first_block: int = 0,
        checkpointing: Mapping[str, Any] | None = None,
        whole_model: bool = False,
    ) -> None:
        self.view = backbone.view()
        self.selection = Selection()
        self.sites: list[Site] = install(self.view, "memtune_adapted") if backbone.family.attention_function else []
        self.needs_query = False
        self._first_block = first_block
        self._unadapted: Backbone | None = None
        self._backbone = backbone
        if first_block:
            _start_at(self.view, first_block)
        if checkpointing is not None:
            self._checkpoint(dict(checkpointing))
        if whole_model and self.sites:
            self.view.tower.register_forward_pre_hook(self._begin_pass, with_kwargs=True)
            self.view.tower.register_forward_hook(self._end_pass, with_kwargs=True)

    def _checkpoint(self, options: dict[str, Any]) -> None:
        model: Any = self.view.model
        # by its name in this release of transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options.pop("kwargs"), **options)
        for block in self.view.blocks:
            # transformers checkpoints a block only while it says that it trains; its children stay in evaluation mode.
            block.module.training = True

    def require_query(self) -> None:
        """Give each pass the feature of the unadapted backbone as its query."""
        self.needs_query = True

    def features(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, current: Pass | None = None
    ) -> Tensor:
        """Features (batch, width).

        Args:
            pixel_values: Images (batch, channels, height, width); one alone where the stream starts at a later block.
            interpolate_pos_encoding: As for the backbone.
            current: A pass that has what a trunk knows of the images already: the query, and the states that the stream
                starts from. None to compute the query, if it is needed, by a pass of the unadapted backbone.
        """
        options: dict[str, Any] = {"interpolate_pos_encoding": interpolate_pos_encoding}
        if not self.sites:
            return self.view.features(pixel_values, **options)
        if current is None:
            current = Pass()
            if self.needs_query:
                with torch.no_grad():
                    current.query = self._unadapted_view().features(pixel_values, **options)
        features = self.view.features(pixel_values, memtune_pass=current, **options)
        check_visited(self.view, current, self._first_block)
        return features

    def _unadapted_view(self) -> Backbone:
        self._unadapted = self._unadapted or self._backbone.view()
        return self._unadapted

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
            view = self._unadapted_view()
            with torch.no_grad():
                current.query = view.family.feature(view.tower, view.tower(*args, **kwargs))
        return args, kwargs | {"memtune_pass": current}

    def _end_pass(self, tower: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        check_visited(self.view, kwargs["memtune_pass"], self._first_block)


def _start_at(view: Backbone, first_block: int) -> None:
    """Let a view's tower skip the blocks before `first_block`, which gets the states that the pass brings along."""
    for block in view.blocks[:first_block]:
        block.module.forward = _pass_on
    view.blocks[first_block].module.register_forward_pre_hook(_recall, with_kwargs=True)


def _pass_on(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return states


def _recall(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    current: Pass = kwargs["memtune_pass"]
    assert current.states is not None
    return (current.states, *args[1:]), kwargs


class Trunk:
    """The pass of the image tokens through the untouched backbone, its keys and values kept for task streams.

    Attributes:
        keep_states: The blocks whose states it keeps.
        followers: The task streams that go along with a pass.

    Args:
        backbone: The backbone.
        keep_states: Blocks of which to keep the states that enter them, for adapted streams that start there.
    """

    def __init__(self, backbone: Backbone, keep_states: Collection[int] = ()) -> None:
        self.view = backbone.view()
        self.keep_states = frozenset(keep_states)
        self._records = backbone.family.attention_function
        self._handed = None if backbone.takes_arguments else threading.local()
        self.followers = Followers()
        if self._records:
            for site in install(self.view, "memtune_trunk"):
                site.follower = self.followers.read
            self.view.tower.register_forward_hook(self._keep_query, with_kwargs=True)
        if self._records and self._handed is not None:
            self.view.tower.register_forward_pre_hook(self._hand_over, with_kwargs=True)
        for index in self.keep_states:
            hook = partial(_keep, index)
            self.view.blocks[index].module.register_forward_pre_hook(hook, with_kwargs=True)

    def run(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> tuple[Pass, Any]:
        """Run the trunk over images (batch, channels, height, width).

        Returns:
            The pass, with what task streams read of each block and the backbone's feature as its query; and the
            tower's own output: bit for bit that of the untouched backbone.
        """
        return self._run(self.view.run_tower, pixel_values, interpolate_pos_encoding)

    def answer(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> tuple[Pass, Any]:
        """The same, with the whole model's output in place of its tower's.

        Returns:
            The pass, empty where the backbone does not use transformers' AttentionInterface; and the model's output (of
            a model that also takes text the output of its vision tower), bit for bit that of the untouched backbone.
        """
        return self._run(self.view.run_model, pixel_values, interpolate_pos_encoding)

    @torch.no_grad()
    def _run(self, forward: Callable[..., Any], pixel_values: Tensor, interpolate: bool) -> tuple[Pass, Any]:
        current = Pass()
        options: dict[str, Any] = {}
        if self._records and self._handed is not None:
            self._handed.current = current
        elif self._records:
            options["memtune_pass"] = current
        output = forward(pixel_values, interpolate_pos_encoding=interpolate, **options)
        if self._records:
            check_visited(self.view, current)
        return current, output

    def _hand_over(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give the tower the pass that this thread's call of a model has, which does not hand it on itself."""
        assert self._handed is not None
        return args, kwargs | {"memtune_pass": self._handed.current}

    def _keep_query(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        current: Pass = kwargs["memtune_pass"]
        current.query = self.view.family.feature(self.view.tower, output)


def _keep(index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    current: Pass = kwargs["memtune_pass"]
    current.kept[index] = args[0]


class TaskStream:
    """The pass of task tokens through the backbone's blocks, reading the trunk and never writing to it.

    Attributes:
        selection: Which tasks the tokens are of, where adapters of several are attached.
        needs_query: Whether a source asks for the query, which is there only when the trunk has ended.
    """

    masked = True

    def __init__(self, backbone: Backbone) -> None:
        self.view = backbone.view()
        self.selection = Selection()
        self.needs_query = False
        self.sites: list[Site] = install(self.view, "memtune_stream")
        for block in self.view.blocks:
            self.view.family.prepare_stream(block.module)
            keep_casts(block.module)

    def require_query(self) -> None:
        """Say that a source asks for the query of the pass."""
        self.needs_query = True

    def features(self, current: Pass, class_tokens: Tensor) -> Tensor:
        """Features (batch, tasks, width) of tasks.

        Args:
            current: A pass that the trunk has filled.
            class_tokens: The class tokens of the tasks, (1 or batch, tasks, width).
        """
        tokens = self.start(class_tokens, batch=current.trunk[0].key.shape[0])
        for block in self.view.blocks:
            tokens = self.step(block.index, tokens, current)
        return self.finish(tokens)

    def start(self, class_tokens: Tensor, *, batch: int) -> Tensor:
        """The tokens (batch, tasks, width) that enter the first block."""
        return self.view.start(class_tokens).expand(batch, -1, -1)

    def step(self, index: int, tokens: Tensor, current: Pass) -> Tensor:
        """The tokens after one block."""
        module = self.view.blocks[index].module
        arguments = self.view.family.stream_arguments(module, self.view.tower, tokens)
        output = module(tokens, **arguments, memtune_pass=current)
        return output[0] if isinstance(output, tuple) else output

    def finish(self, tokens: Tensor) -> Tensor:
        """The features of the tokens that leave the last block."""
        return self.view.finish(tokens)
