"""What must be the same for an interrupted run to go on, as JSON values, and how it is compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..models import TunedModel
from ..preparation import TrainingConfig
from ..tasks import SingleLabel

_WITHOUT_EFFECT = {"disable_tqdm", "dataloader_num_workers", "logging_steps", "report_to", "trunk_cache_max_gb"}
_WITHOUT_EFFECT |= {
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "output_dir",
    "save_strategy",
    "save_steps",
    "save_total_limit",
}
"""Settings that may differ when a run is resumed."""


def describe_run(model: TunedModel, config: TrainingConfig, **more: Any) -> dict[str, Any]:
    """The settings of a run and of its model.

    Args:
        model: The model.
        config: The settings of training.
        more: What else must be the same, as JSON values.

    Raises:
        ConfigError: The backbone is being trained, which a run's folder does not hold.
    """
    if any(parameter.requires_grad for parameter in model.backbone.parameters()):
        raise ConfigError("output_dir: the backbone is being trained, but a folder holds the adapter alone; pass None")
    training = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in _WITHOUT_EFFECT}
    task = model.task
    values = training | {
        "trunk_cache": config.trunk_cache is not None,  # not where it lies
        "methods": [each.to_dict() for each in task.configs],
        "masked": task.masked,
        "labels": task.labels,
        **more,
    }
    if not isinstance(task.objective, SingleLabel):
        values["problem_type"] = task.problem_type
    if task.random_features is not None:
        values["random_features"] = task.random_features.to_dict()
    return json.loads(json.dumps(values))


def check_same_run(
    saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path, *, may_be_longer: bool = False
) -> None:
    """Raise `ConfigError`, with every difference, unless the run in a folder has the same settings as this one.

    A setting that is not in the folder, as it is younger than that, had its default.

    Args:
        saved: The folder's settings.
        own: Those of this run.
        folder: The folder.
        may_be_longer: Whether this one may have more epochs or steps.
    """
    saved = {each.name: each.default for each in fields(TrainingConfig) if each.name in own} | dict(saved)
    if may_be_longer and _is_longer(own, saved):
        saved |= {name: own[name] for name in ("num_train_epochs", "max_steps")}
    differences = [
        f"{name}: got {own.get(name)!r}, the folder has {saved.get(name)!r}"
        for name in sorted(own.keys() | saved.keys())
        if own.get(name) != saved.get(name)
    ]
    if differences:
        raise ConfigError(
            f"output_dir: {folder} holds a run with other settings; take another folder, or those settings:\n  "
            + "\n  ".join(differences)
        )


def _is_longer(own: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether a run has more epochs or steps than another, and not fewer of either."""
    (epochs, steps), (old_epochs, old_steps) = ((each["num_train_epochs"], each["max_steps"]) for each in (own, saved))
    if not all(isinstance(value, (int, float)) for value in (old_epochs, old_steps)):
        return False
    by_steps = steps > 0, old_steps > 0
    return by_steps[0] == by_steps[1] and (steps >= old_steps if steps > 0 else epochs >= old_epochs)
