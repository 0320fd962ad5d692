"""One task's pass, and what the token that its head reads attends to in each block.

The weights are those of the pass itself: the attention functions leave them in it (`Pass.weights`). In unmasked mode
the token is the class token, in masked mode the task token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..backbones import Backbone
from ..errors import ConfigError, InputError, UnsupportedBackboneError
from ..models import MultiTaskModel, TunedModel
from ..storage import decode
from ..streams import Pass, Trunk
from ..tasks import Batch, Task, check_images, check_task_names, interpolates, lane_of
from .shares import Attention


class Observation(NamedTuple):
    """What a pass over images shows.

    Attributes:
        blocks: For each block the attention (images, heads, ...).
        probabilities: The probabilities, (images, classes).
        sides: For each block the part of a side network in what the token takes, by patch, (images, heads, rows,
            columns); empty without one.
    """

    blocks: list[Attention]
    probabilities: Tensor
    sides: list[Tensor]


class Observer:
    """One task's pass, whose attention is kept. It runs on views and a copy of its own: the model is left alone."""

    def __init__(self, model: TunedModel | MultiTaskModel, name: str | None) -> None:
        task, self.processor = _find_task(model, name)
        self.backbone = Backbone(model.backbone)
        _check_backbone(self.backbone, task.masked)
        if not task.has_token:
            raise ConfigError(
                f"got a task of the methods {task.methods} without a token (readout='pool'), and so no attention to be "
                "shown; train with readout='token'"
            )
        self.task: Task = copy.deepcopy(task).eval()  # in training, methods would drop values
        self._trunk = Trunk(self.backbone)
        self._lane = lane_of(self.backbone, self.task)
        self._methods = [site.source_methods for site in self._lane.stream.sites]
        self._has_side = any(site.sides for site in self._lane.stream.sites)

    @property
    def has_memory(self) -> bool:
        """Whether a block has memory tokens."""
        return any("memory" in names for names in self._methods)

    def pixel_values(self, image: Any, interpolate: bool) -> Tensor:
        """One image as a backbone takes it, (1, channels, height, width)."""
        if isinstance(image, Image.Image):
            if self.processor is None:
                raise InputError("image: the task has no image processor; pass pixel_values (1, channels, ...) instead")
            image = decode(image, self.backbone.channels)
            image = self.processor(image, return_tensors="pt").pixel_values
        elif isinstance(image, (list, tuple)):
            raise InputError(f"image: got {len(image)} images, expected one; call explain for each")
        elif not isinstance(image, Tensor):
            raise InputError(
                f"image: got {type(image).__name__}, expected a PIL image (PIL.Image.open reads a file) or "
                "pixel_values (1, channels, height, width)"
            )
        image = check_images(image, self.backbone, interpolate=self.interpolates(image, asked=interpolate))
        if len(image) != 1:
            raise InputError(f"image: got pixel_values of {len(image)} images, expected one; call explain for each")
        return image

    def interpolates(self, image: Any, *, asked: bool) -> bool:
        """Whether positions are interpolated: where it is asked, or where the task was trained so."""
        size = self.task.image_size
        return interpolates(image, {} if size is None else {"": size}, asked=asked)

    @torch.no_grad()
    def observe(self, pixel_values: Tensor, interpolate: bool) -> Observation:
        """What a pass over images shows."""
        pixel_values = pixel_values.to(device=self.backbone.model.device, dtype=self.backbone.model.dtype)
        interpolate = self.interpolates(pixel_values, asked=interpolate)
        weights: list[list[Tensor]] = []
        sides: list[Tensor] = []
        current = Pass()
        if self.task.masked or self._lane.stream.needs_query:
            current, _ = self._trunk.run(pixel_values, interpolate_pos_encoding=interpolate)
        watched = replace(current, weights=weights, side_parts=sides if self._has_side else None)
        batch = Batch(watched, pixel_values, interpolate)
        answer = self._lane.run(batch).squeeze(1)
        tokens = current.trunk[0].key.shape[2] if self.task.masked else weights[0][0].shape[-1]
        sizes = zip(pixel_values.shape[2:], self.backbone.patch_size, strict=True)
        grid = [pixels // patch for pixels, patch in sizes]
        blocks = [self._sort(each, names, tokens, grid) for each, names in zip(weights, self._methods, strict=True)]
        logits = answer[:, :0] if self.task.head is None else answer
        before = tokens - grid[0] * grid[1]
        parts = [each[..., before:tokens].float().cpu().unflatten(-1, tuple(grid)) for each in sides]
        return Observation(blocks, self.task.objective.scores(logits.float()).cpu(), parts)

    def _sort(self, parts: Sequence[Tensor], methods: Sequence[str], tokens: int, grid: Sequence[int]) -> Attention:
        """The parts of a block's weights, each (images, heads, 1, number), by what they fall on.

        Args:
            parts: Those on the tokens that the backbone has (after them those of earlier tasks), those of a task token
                on itself, and those on the keys of each source.
            methods: The method of each source.
            tokens: How many tokens the backbone has for an image, those of the patches last.
            grid: Rows and columns of the patches.
        """
        shared, *others = [part[:, :, 0].float().cpu() for part in parts]
        none = shared[..., :0]
        before = tokens - grid[0] * grid[1]
        leading = int(self.backbone.class_token is not None)
        first, registers, patches, earlier = shared.tensor_split([leading, before, tokens], dim=-1)
        own, class_token = (others.pop(0), first) if self.task.masked else (first, none)
        named = list(zip(methods, others, strict=True))
        memory = [part for method, part in named if method == "memory"]
        further = [part for method, part in named if method != "memory"]
        return Attention(
            patches=patches.unflatten(-1, tuple(grid)),
            own=own,
            class_token=class_token,
            registers=registers,
            earlier=earlier,
            memory=torch.cat([none, *memory], dim=-1),
            further=torch.cat([none, *further], dim=-1),
        )


def _find_task(model: Any, name: str | None) -> tuple[Task, Any]:
    """The task to look at, and its processor."""
    if isinstance(model, TunedModel):
        if name is not None:
            raise ConfigError(f"task: got {name!r} for a model of one task; leave it out")
        return model.task, model.processor
    if not isinstance(model, MultiTaskModel):
        raise ConfigError(f"model: got {type(model).__name__}, expected a TunedModel or a MultiTaskModel")
    tasks = model.arrangement.tasks
    if name is None:
        raise ConfigError(f"task: got none for a model of several; expected one of {list(tasks)}")
    check_task_names("task", [name], tasks)
    return tasks[name], model.processors.get(name)


def _check_backbone(backbone: Backbone, masked: bool) -> None:
    """Raise unless there is one token that reads all of the image for the head."""
    family, name = backbone.family, type(backbone.model).__name__
    if family.staged or not family.attention_function:
        why = f"attend {family.staged}" if family.staged else "compute attention themselves, and leave no weights"
        raise UnsupportedBackboneError(
            f"got {name}, whose blocks {why}; attention can be shown of backbones with global attention by "
            "transformers' AttentionInterface, such as ViT, DeiT, DINOv2, DINOv3 and CLIP"
        )
    if not masked and not backbone.reads_class_token:
        raise UnsupportedBackboneError(
            f"got {name}, whose feature is no class token's, so no single token reads the image for the head; train "
            "with masked=True, where a task token does"
        )
