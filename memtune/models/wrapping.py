"""`wrap()`: a frozen vision model with an adapter for a new task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from transformers import PreTrainedModel

from ..backbones import Backbone, as_pretrained
from ..errors import ConfigError
from ..methods import AdapterConfig, as_config
from ..tasks import RandomFeatures, Task, check_label_names
from .tuned import TunedModel

if TYPE_CHECKING:
    from .multitask import MultiTaskModel


def wrap(
    backbone: PreTrainedModel | nn.Module,
    config: AdapterConfig | Sequence[AdapterConfig],
    *,
    labels: Sequence[str] | None = None,
    num_labels: int | None = None,
    head: Literal["linear", "backbone"] | RandomFeatures | None = "linear",
    masked: bool = False,
    extends: MultiTaskModel | None = None,
    processor: Any = None,
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None,
) -> TunedModel:
    """Put an adapter for a new task on a frozen vision model.

    The backbone's parameters are frozen; nothing else of it changes, and it can be wrapped again for another task.

    Example:
        >>> model = memtune.wrap(backbone, memtune.MemoryConfig(4), labels=["cat", "dog"], processor=processor)
        >>> model(pixel_values).logits.shape
        torch.Size([4, 2])

    Args:
        backbone: A transformers vision model, with or without a head of its own; or a timm model, which then lies in
            transformers' wrapper as the `backbone` of what is given back.
        config: The method's settings, or one for each of several methods; a `peft.LoraConfig` is taken as well.
        labels: Names of the task's classes, in the order of the logits.
        num_labels: Their number, where they have no names (they are then called LABEL_0 ...).
        head: "linear" for a new one that answers with the task's labels; `memtune.RandomFeatures(width)` for one that
            reads many random features made of the feature, best by `fit_closed_form`; "backbone" for the backbone's
            own, frozen as it is (its decoder of segmentation maps, say), which then reads the adapted tower; None for
            no head: the model then gives features, for a head of your own. The latter two have no labels.
        masked: Train in the task stream: the backbone's own answer stays as it is, and tasks can share its pass.
        extends: A model whose masked tasks the new one reads (masked mode only); they do not know of it, and stay as
            they are. To answer, the new task needs them.
        processor: The image processor of the task, saved with the adapter.
        problem_type: What the labels of an image are: one class (None, or "single_label_classification"), any number of
            classes ("multi_label_classification"), or a number for each of the labels ("regression").

    Raises:
        UnsupportedBackboneError: The model has no supported vision tower, or cannot be used in masked mode or with its
            own head.
        ConfigError: A setting is wrong, or does not fit the backbone. Nothing has been changed.
    """
    backbone = as_pretrained(backbone)
    several = config if isinstance(config, Sequence) and not isinstance(config, str) else [config]
    earlier = {} if extends is None else _earlier_tasks(extends, backbone, masked)
    names = _check_names(labels, num_labels, head, extends, problem_type)
    configs = [as_config(each) for each in several]
    task = Task(
        configs,
        names,
        Backbone(backbone),
        masked,
        earlier,
        backbone_head=head == "backbone",
        random_features=head if isinstance(head, RandomFeatures) else None,
        problem_type=problem_type,
    )
    return TunedModel(backbone, task, processor=processor)


def _check_names(
    labels: Sequence[str] | None, num_labels: int | None, head: Any, extends: MultiTaskModel | None, problem_type: Any
) -> list[str]:
    """The names of the task's classes, none without a head."""
    if not isinstance(head, RandomFeatures) and head not in ("linear", "backbone", None):
        raise ConfigError(
            f"head: got {head!r}, expected 'linear', RandomFeatures(...), 'backbone' for its own, or None for features"
        )
    if head == "linear" or isinstance(head, RandomFeatures):
        return check_label_names(labels, num_labels)
    if (labels, num_labels, extends, problem_type) != (None, None, None, None):
        given = "'backbone': the model gives the backbone's output" if head else "None: the model gives features"
        raise ConfigError(f"head={given}; labels, num_labels, extends and problem_type need a head of the task's own")
    return []


def _earlier_tasks(model: MultiTaskModel, backbone: PreTrainedModel, masked: bool) -> dict[str, Task]:
    if not masked:
        raise ConfigError("extends: only a task of masked mode can read others; pass masked=True")
    if model.backbone is not backbone:
        raise ConfigError("extends: got a model around another backbone object; wrap its own, `extends.backbone`")
    tasks = {name: task for name, task in model.masked_tasks().items() if task.has_token}
    if not tasks:
        raise ConfigError(
            f"extends: got a model whose tasks {list(model.tasks)} have no task tokens, which masked ones do"
        )
    return tasks
