"""The trunk: the pass of the image tokens through the untouched backbone, which task streams read.

"Fine-tuning Image Transformers using Learnable Memory" (https://arxiv.org/abs/2203.15243), table 1: base tokens see
base tokens only; a task's class token sees the base tokens, itself and its own memory. So the paper's attention mask is
built not as a mask but as two passes: the base tokens run alone through the untouched blocks, and the task token after
them (`task_stream.py`), or along with them (`following.py`), through the same blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from .attention import check_visited, install, skip
from .casting import keep_casts
from .following import Followers
from .passes import Pass


class Trunk:
    """The pass of the image tokens through the untouched backbone, its keys and values kept for task streams.

    Attributes:
        keep_states: The blocks whose states it keeps.
        followers: The task streams that go along with a pass.

    Args:
        backbone: The backbone.
        keep_states: Blocks of which to keep the states that enter them, for adapted streams that start there.
        until: The first block that is left out, with all after it; what the tower then gives means nothing, and there
            is no query. None to run all of them.
    """

    def __init__(self, backbone: Backbone, keep_states: Collection[int] = (), *, until: int | None = None) -> None:
        self.view = backbone.view()
        self._left_out = 0 if until is None else backbone.depth - until
        skip(self.view.blocks[backbone.depth - self._left_out :])
        for block in self.view.blocks:
            keep_casts(block.module)
        self.keep_states = frozenset(keep_states)
        self._records = backbone.family.attention_function
        self._handed = None if backbone.takes_arguments else threading.local()
        self.followers = Followers()
        if self._records:
            for site in install(self.view, "memtune_trunk"):
                site.follower = self.followers.read
            if until is None:
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
        sizes = zip(pixel_values.shape[-2:], self.view.patch_size, strict=True)
        rows, columns = (pixels // patch for pixels, patch in sizes)
        current = Pass(patches=(rows, columns))
        options: dict[str, Any] = {}
        if self._records and self._handed is not None:
            self._handed.current = current
        elif self._records:
            options["memtune_pass"] = current
        output = forward(pixel_values, interpolate_pos_encoding=interpolate, **options)
        if self._records:
            check_visited(self.view, current, self._left_out)
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
