"""Where a task of a multi-task model comes from: an adapter folder, the Hub, or a model in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from ..backbones import Backbone, fingerprint, same_weights
from ..errors import BackboneMismatchError, ConfigError
from ..storage import check_backbone, find_folder, make_task, read_folder
from ..tasks import Task
from .tuned import TunedModel

TaskSource: TypeAlias = str | Path | TunedModel
"""An adapter folder, an adapter's id on the Hub, or a model in memory."""


class SourceReader:
    """Reads tasks for one backbone, whose fingerprint is taken once for all of them.

    Args:
        backbone: The backbone that the tasks must have been trained on.
        any_weights: Accept a backbone of the right shape with other weights.
    """

    def __init__(self, backbone: Backbone, *, any_weights: bool) -> None:
        self._backbone = backbone
        self._any_weights = any_weights

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        return fingerprint(self._backbone)

    def read(self, source: Any, known: Mapping[str, Task]) -> tuple[Task, Any]:
        """A task of its own, and its image processor.

        Args:
            source: The task's source.
            known: Tasks that it may extend.

        Raises:
            BackboneMismatchError: The task was trained on another backbone.
            CheckpointError: The folder is damaged, or a task that it extends is missing.
            ConfigError: The source is none.
        """
        if isinstance(source, TunedModel):
            self._check_model(source.backbone)
            return copy.deepcopy(source.task), source.processor
        if not isinstance(source, (str, Path)):
            raise ConfigError(
                f"got {type(source).__name__}, expected an adapter folder, an adapter's id on the Hub, or a TunedModel"
            )
        folder = read_folder(find_folder(source))
        own = None if self._any_weights else self._fingerprint
        check_backbone(folder, self._backbone, any_weights=self._any_weights, own=own)
        return make_task(folder, self._backbone, known), folder.processor

    def _check_model(self, model: PreTrainedModel) -> None:
        if model is self._backbone.model or self._any_weights:
            return
        other = Backbone(model)
        same_shape = other.describe() == self._backbone.describe()
        if not same_shape or not same_weights(fingerprint(other), self._fingerprint):
            raise BackboneMismatchError(
                f"it was wrapped around another {type(model).__name__}, of other shape or weights; "
                "combine adapters of one backbone (any_weights=True takes it nevertheless)"
            )
