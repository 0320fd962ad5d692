"""Where a task of a multi-task model comes from: an adapter folder, the Hub, or a model in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from .backbones import Backbone
from .checkpoint import check_backbone, make_task, read_folder
from .errors import BackboneMismatchError, ConfigError
from .fingerprint import fingerprint, same_weights
from .hub import find_folder
from .task import Task
from .tuned import TunedModel

TaskSource: TypeAlias = str | Path | TunedModel
"""An adapter folder, an adapter's id on the Hub, or a model in memory."""


def read_source(source: Any, backbone: Backbone, known: Mapping[str, Task], *, any_weights: bool) -> tuple[Task, Any]:
    """A task of its own, and its image processor.

    Args:
        source: The task's source.
        backbone: The backbone that the task must have been trained on.
        known: Tasks that it may extend.
        any_weights: Accept a backbone of the right shape with other weights.

    Raises:
        BackboneMismatchError: The task was trained on another backbone.
        CheckpointError: The folder is damaged, or a task that it extends is missing.
        ConfigError: The source is none.
    """
    if isinstance(source, TunedModel):
        same = source.backbone is backbone.model
        if not same and not any_weights and not _same(source.backbone, backbone):
            raise BackboneMismatchError(
                f"it was wrapped around another {type(source.backbone).__name__}, of other shape or weights; "
                "combine adapters of one backbone (any_weights=True takes it nevertheless)"
            )
        return copy.deepcopy(source.task), source.processor
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"got {type(source).__name__}, expected an adapter folder, an adapter's id on the Hub, or a TunedModel"
        )
    folder = read_folder(find_folder(source))
    check_backbone(folder, backbone, any_weights=any_weights)
    return make_task(folder, backbone, known), folder.processor


def _same(model: PreTrainedModel, backbone: Backbone) -> bool:
    other = Backbone(model)
    return other.describe() == backbone.describe() and same_weights(fingerprint(other), fingerprint(backbone))
