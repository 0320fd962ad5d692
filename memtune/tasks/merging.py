"""An unmasked adapter written into the weights: a plain Hugging Face model that needs no memtune."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedModel

from ..backbones import Backbone, shadow
from ..errors import ConfigError
from .task import Task


def merge(backbone: PreTrainedModel, task: Task) -> PreTrainedModel:
    """Write a task into the weights of a new model; the backbone stays as it is.

    Args:
        backbone: The backbone.
        task: A task of unmasked mode whose methods are changes of weights (LoRA).

    Returns:
        The image classification class of the backbone with the task's head and labels. Where transformers has none
        whose head reads what the task's reads, a copy of the backbone without the head, and a warning says so. Of an
        adapter without a head a copy of the backbone.

    Raises:
        ConfigError: The mode or a method is not one that can be merged.
    """
    if task.masked:
        raise ConfigError(
            "a masked adapter cannot be merged: the backbone's own tokens must not see it. Wrap with masked=False"
        )
    if task.head is not None:
        task.require_head("merge", linear=True)
    classifier = None if task.head is None else as_classifier(backbone)
    merged = copy.deepcopy(_headless(backbone, task) if classifier is None else classifier).eval()
    described = Backbone(merged)
    for adapter in sorted(task.adapters, key=lambda adapter: adapter.attached_last):
        adapter.merge_into(described)  # before requires_grad_, which quantised weights would refuse
    merged.requires_grad_(True)
    if task.class_token is not None and described.class_token is not None:
        described.class_token.data.copy_(task.class_token)
    if classifier is None:
        if task.head is not None:
            warnings.warn(no_head_message(backbone), stacklevel=2)
        return merged
    _set_labels(merged, task)
    weight, bias = pad_head(task, head_width(classifier))
    head = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], device=weight.device, dtype=merged.dtype)
    head.load_state_dict({"weight": weight, "bias": bias})
    described.family.put_head(merged, head.eval())
    return merged


def _headless(backbone: PreTrainedModel, task: Task) -> PreTrainedModel:
    """A backbone without a classifier of its own, which would answer with its own labels in place of the task's."""
    tower = Backbone(backbone).tower
    classifies = type(backbone) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.values()
    return tower if task.head is not None and classifies and isinstance(tower, PreTrainedModel) else backbone


def no_head_message(model: PreTrainedModel) -> str:
    """Why a merged or exported model has no head."""
    return (
        f"transformers has no image classification class for {type(model).__name__} whose head reads the feature that "
        "memtune's reads; the task's head is left out"
    )


def _set_labels(model: Any, task: Task) -> None:
    model.config.id2label = dict(enumerate(task.labels))
    model.config.label2id = {label: index for index, label in enumerate(task.labels)}
    model.config.problem_type = task.problem_type
    model.num_labels = len(task.labels)


def pad_head(task: Task, width: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a task's head for features (batch, width) of which the task reads the first ones."""
    head = task.require_head("merge", linear=True)
    weight = head.weight.detach()
    return nn.functional.pad(weight, (0, width - weight.shape[1])), head.bias.detach()


@torch.no_grad()
def as_classifier(model: PreTrainedModel) -> PreTrainedModel | None:
    """A view of a backbone as an image classification model of transformers, whose head hands on what it reads.

    Whether that begins with the feature that memtune's heads read is tried on an image of noise, not guessed: CLIP's
    class reads the mean of the patches, and DINOv2's reads the class token first and that mean after it.

    Returns:
        The view, or None where there is no such class.
    """
    view = _graft(model)
    if view is None or not Backbone(view).family.put_head(view, nn.Identity()):
        return None
    backbone = Backbone(view)
    read, feature = _read_by_head(view, backbone), backbone.features(_noise(backbone))
    same = torch.allclose(read[:, : backbone.width].float(), feature.float(), atol=1e-3)
    return view if same else None


def head_width(classifier: PreTrainedModel) -> int:
    """Width of what the head of `as_classifier`'s view reads."""
    return _read_by_head(classifier, Backbone(classifier)).shape[1]


@torch.no_grad()
def _read_by_head(view: Any, backbone: Backbone) -> Tensor:
    return view(_noise(backbone)).logits


def _noise(backbone: Backbone) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, backbone.channels, *backbone.image_size, generator=generator)
    return noise.to(device=backbone.model.device, dtype=backbone.model.dtype)


def _graft(model: PreTrainedModel) -> Any:
    """A view of a model's tower in the image classification class that transformers has for its configuration."""
    if (own := Backbone(model).family.as_classifier) is not None:
        return own(model)
    kinds: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(model.config), None)
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    if kind is None or type(model) is kind:
        return None if kind is None else shadow(model)
    with torch.device("meta"):
        grafted = kind(copy.deepcopy(model.config)).eval()
    target, source = Backbone(grafted).tower, shadow(Backbone(model).tower)
    needed = [name for name, child in target._modules.items() if child is not None]
    if any(source._modules.get(name) is None for name in needed):
        return None
    target._modules.update({name: source._modules[name] for name in needed})
    target._parameters, target._buffers = source._parameters, source._buffers
    return grafted
