"""PEFT's own folder format for LoRA, written: its configuration, and tensors with module paths as keys."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
from torch import Tensor
from transformers import PreTrainedModel

from ..backbones import HEAD_NAME, Backbone, LinearPart
from ..errors import CheckpointError, ConfigError
from ..methods import Adapter, LoraConfig
from ..tasks import Task, as_classifier, head_width, no_head_message, pad_head
from .atomic import replace_files

PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

_ENDINGS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}


def write_peft_folder(folder: str | Path, task: Task, model: PreTrainedModel, processor: Any) -> None:
    """Write an adapter as PEFT does.

    `PeftModel.from_pretrained` loads the folder onto the backbone as `AutoModelForImageClassification` loads it with
    the task's `num_labels`, head included. Where there is no such class whose head reads what the task's reads, the
    folder is for the backbone's own class and has no head, and a warning says so.

    Args:
        folder: Where to; made if it is not there.
        task: A task of unmasked mode with LoRA as its only method.
        model: The backbone.
        processor: The image processor, or None.

    Raises:
        ConfigError: Another mode or method; or the backbone has query, key and value in one layer.
        CheckpointError: The path is a file.
    """
    config, tensors = _only_lora(task)
    if task.head is not None:
        task.require_head("export_peft", linear=True)
    if isinstance(Backbone(model).blocks[0]["query"], LinearPart):
        raise ConfigError(
            f"got a {type(model).__name__} with query, key and value in one linear layer, a part of which "
            "PEFT's format cannot name; use merge() for a model without memtune, or save_pretrained"
        )
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"got {folder}, which is a file; an adapter is exported as a folder")
    classifier = None if task.head is None else as_classifier(model)
    plain = model if classifier is None else classifier
    names = {id(module): name for name, module in plain.named_modules()}
    blocks = Backbone(plain).blocks
    exported: dict[str, Tensor] = {}
    targets = set()
    for key, tensor in tensors.items():
        _, index, role, part = key.split(".")
        path = names[id(blocks[int(index)][role])]
        targets.add(path)
        exported[f"{PEFT_PREFIX}{path}.{_ENDINGS[part]}"] = tensor
    if classifier is None and task.head is not None:
        warnings.warn(no_head_message(model), stacklevel=2)
    elif classifier is not None:
        weight, bias = pad_head(task, head_width(classifier))
        exported |= {f"{PEFT_PREFIX}{HEAD_NAME}.weight": weight, f"{PEFT_PREFIX}{HEAD_NAME}.bias": bias}
    settings = config.to_peft(
        target_modules=sorted(targets),
        modules_to_save=None if classifier is None else [HEAD_NAME],
        base_model_name_or_path=model.name_or_path or None,
        inference_mode=True,
    )
    _write(folder, settings, exported, processor)


def _only_lora(task: Task) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The settings and the tensors of a task's LoRA adapter."""
    configs = task.configs
    if task.masked or len(configs) != 1 or not isinstance(configs[0], LoraConfig):
        mode = "masked" if task.masked else "unmasked"
        raise ConfigError(
            f"got the methods {task.methods} in {mode} mode; PEFT's format has a place for LoRA alone, unmasked"
        )
    adapter = task.adapters[0]
    assert isinstance(adapter, Adapter)
    return configs[0], adapter.state_dict()


def _write(folder: Path, settings: peft.LoraConfig, tensors: Mapping[str, Tensor], processor: Any) -> None:
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.to_dict().items()}
    with replace_files(folder) as staging:
        (staging / PEFT_CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(on_cpu, staging / PEFT_WEIGHTS_NAME, metadata={"format": "pt"})
        if processor is not None:
            processor.save_pretrained(staging)
