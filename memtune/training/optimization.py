"""The optimizer of a run: groups of parameters, and the learning rate and weight decay of each."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..backbones import Backbone
from ..models import TunedModel
from ..preparation import TrainingConfig

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


def _distance(name: str, depth: int) -> int:
    """How many blocks lie between a parameter and the head."""
    match = _BLOCK.search(name)
    if match:
        return depth - 1 - int(match[1])
    return depth if name.endswith("class_token") else 0
