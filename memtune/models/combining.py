"""`combine()`: adapters trained apart, answered from one pass over an image."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from .multitask import MultiTaskModel
from .sources import TaskSource


def combine(
    backbone: PreTrainedModel | nn.Module, tasks: Mapping[str, TaskSource], *, any_weights: bool = False
) -> MultiTaskModel:
    """Put adapters that were trained apart, on the same backbone, into one model.

    Args:
        backbone: The backbone that all of them were trained on, one of transformers' or timm's.
        tasks: The adapters by the names that their tasks shall have: folders, ids on the Hub, or tuned models, of which
            a copy is taken.
        any_weights: Accept a backbone of the right shape with other weights than an adapter was trained on.

    Raises:
        ConfigError: There are no tasks, or a name is no name.
        BackboneMismatchError: An adapter was trained on another backbone; it is named.
        CheckpointError: An adapter folder is damaged; it is named.
    """
    if not isinstance(tasks, Mapping) or not tasks:
        raise ConfigError(f"tasks: got {tasks!r}, expected adapters by the names of their tasks, at least one")
    return MultiTaskModel(backbone)._filled(tasks, any_weights)
