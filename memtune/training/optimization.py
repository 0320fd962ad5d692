"""The optimizer of a run, its schedule, and the weights of classes in its loss."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from ..backbones import Backbone
from ..data import Items
from ..errors import ConfigError
from ..models import TunedModel
from ..preparation import TrainingConfig
from ..tasks import IGNORED, Objective

_BLOCK = re.compile(r"\.blocks\.(\d+)\.")


def make_optimizer(model: TunedModel, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer for what a model trains; what has one dimension (biases, norms) has no weight decay.

    With `layerwise_lr_decay` c, what is in block l of L learns at c^(L - 1 - l) of the learning rate, the class token,
    which enters before the first block, at c^L, and the head at the whole of it ("ELECTRA",
    https://arxiv.org/abs/2003.10555; "BEiT", https://arxiv.org/abs/2106.08254, section A).

    Args:
        model: The model.
        config: Settings whose defaults by mode are filled in.
    """
    rate, decay = config.learning_rate, config.weight_decay
    assert rate is not None
    assert decay is not None
    depth = Backbone(model.backbone).depth
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = (config.layerwise_lr_decay or 1.0) ** _distance(name, depth)
            groups.setdefault((scale, parameter.ndim <= 1), []).append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate * scale, "weight_decay": 0.0 if exempt else decay}
        for (scale, exempt), parameters in groups.items()
    ]
    if config.optim == "sgd":
        return torch.optim.SGD(settings, rate, momentum=config.momentum)
    return torch.optim.AdamW(settings, rate)


def make_schedule(optimizer: Any, config: TrainingConfig, steps: int) -> Any:
    """The schedule of the learning rate over so many steps.

    Raises:
        ConfigError: It does not take its settings.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    settings = dict(config.lr_scheduler_kwargs or {})
    try:
        return get_scheduler(config.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"lr_scheduler_kwargs: got {settings}, which {config.lr_scheduler_type!r} does not take: {error}"
        ) from error


def class_weights(config: TrainingConfig, items: Items, classes: int, device: torch.device) -> Tensor | None:
    """The weights of the classes in the loss, (classes,), or None for equal ones.

    Balanced ones are, as scikit-learn's, images / (classes there are x images of the class); 0 for a class without
    images.
    """
    if config.class_weights is None:
        return None
    if config.class_weights != "balanced":
        return torch.tensor(config.class_weights, dtype=torch.float32, device=device)
    labels = torch.tensor([label for label in items.labels() if label != IGNORED], dtype=torch.long)
    counts = torch.bincount(labels, minlength=classes).float()
    weights = torch.where(counts > 0, counts.sum() / ((counts > 0).sum() * counts.clamp_min(1)), 0.0)
    return weights.to(device)


def plain_loss(
    objective: Objective, logits: Tensor, labels: Tensor, config: TrainingConfig, weights: Tensor | None
) -> Tensor:
    """The mean loss of a batch with the smoothing of the settings and the weights of the classes."""
    smoothing = config.label_smoothing_factor or 0.0
    return objective.loss(logits, labels, label_smoothing=smoothing, weights=weights)


def _distance(name: str, depth: int) -> int:
    """How many blocks lie between a parameter and the head."""
    match = _BLOCK.search(name)
    if match:
        return depth - 1 - int(match[1])
    return depth if name.endswith("class_token") else 0
