"""PEFT's own folder format for LoRA: adapter_config.json and adapter_model.safetensors with module paths as keys."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..backbones import HEAD_NAME, Backbone
from ..errors import CheckpointError, ConfigError
from ..methods import LoraConfig, locate
from ..storage import PEFT_CONFIG_NAME, PEFT_PREFIX, PEFT_WEIGHTS_NAME, place_of, read_json, read_tensors, read_together
from ..tasks import Task, as_classifier, no_head_message
from .tuned import TunedModel

_UPDATE_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude)(?:_vector)?(?:\.default)?(?:\.weight)?")
_HEAD_KEY = re.compile(rf"{HEAD_NAME}\.(?:modules_to_save\.)?(?:default\.)?(weight|bias)")


def export_peft(model: TunedModel, folder: str | Path) -> None:
    """Write an adapter as PEFT does (see `TunedModel.export_peft`)."""
    model.export_peft(folder)


def import_peft(
    folder: str | Path, backbone: PreTrainedModel, *, labels: Sequence[str] | None = None, processor: Any = None
) -> TunedModel:
    """Read a LoRA adapter that PEFT wrote, whichever release of transformers it was trained with.

    Args:
        folder: A folder with adapter_config.json and adapter_model.safetensors.
        backbone: The model it was trained on, with any head.
        labels: Names of the classes, which PEFT does not keep; by default the backbone's own where their number is
            right, else LABEL_0 ...
        processor: The image processor.

    Returns:
        The tuned model, in evaluation mode. A folder without a head goes with the backbone's own.

    Raises:
        CheckpointError: A file is missing or damaged, a key is unknown, or a tensor does not fit; all are named.
        ConfigError: The adapter has settings that memtune does not know, or is not LoRA.
    """
    settings, tensors = _read(Path(folder))
    described = Backbone(backbone)
    updates, head = _sort(tensors, described)
    places = [key.split(".") for key in updates]
    config = dataclasses.replace(
        LoraConfig.from_peft(settings),
        roles=list(dict.fromkeys(role for _, _, role, _ in places)),
        blocks=sorted({int(index) for _, index, _, _ in places}),
    )
    shapes = {key: tuple(tensor.shape) for key, tensor in updates.items() if key.endswith("lora_A")}
    if wrong := [f"{key}: got the shape {shape}" for key, shape in shapes.items() if shape[:1] != (config.rank,)]:
        raise CheckpointError(f"{', '.join(wrong)}, expected (r, width) with r={config.rank}")
    head = _fit_head(head, backbone, described.width)
    names = _labels(labels, backbone, head["head.weight"].shape[0])
    task = Task([config], names, described, masked=False)
    task.load_tensors(updates | head)
    return TunedModel(backbone, task, processor=processor).eval()


def _read(folder: Path) -> tuple[peft.LoraConfig, dict[str, Tensor]]:
    """The settings, without those that say again what the tensors' keys say, and the tensors."""
    names = (PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME)
    missing = [name for name in names if not place_of(folder, name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is no folder of PEFT's: {' and '.join(missing)} not found (files of pickles are not read)"
        )
    try:
        values, tensors = read_together(
            folder,
            lambda: [place_of(folder, name) for name in names],
            lambda: (read_json(place_of(folder, PEFT_CONFIG_NAME)), read_tensors(place_of(folder, PEFT_WEIGHTS_NAME))),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    if isinstance(values, dict) and "format_version" in values:
        raise ConfigError(f"{folder} is an adapter folder of memtune's own; load it with memtune.load")
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else values
        raise ConfigError(f"{folder / PEFT_CONFIG_NAME}: got the peft_type {kind!r}, expected 'LORA'")
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    if newer := sorted(name for name, value in values.items() if name not in known and value):
        raise ConfigError(f"{folder / PEFT_CONFIG_NAME}: got settings that this release of peft does not know: {newer}")
    by_key = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    given: dict[str, Any] = {name: value for name, value in values.items() if name in known and name not in by_key}
    try:
        settings = peft.LoraConfig(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder / PEFT_CONFIG_NAME}: {error}") from error
    return settings, tensors


def _sort(tensors: Mapping[str, Tensor], backbone: Backbone) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The updates under role keys, and the head under `head.weight` and `head.bias`.

    Raises:
        CheckpointError: Keys that are neither, all of them named.
    """
    names = {id(module): name for name, module in backbone.tower.named_modules()}
    paths = [names[id(block.module)] for block in backbone.blocks]
    indices = {tuple(int(part) for part in path.split(".") if part.isdigit()): i for i, path in enumerate(paths)}
    updates, head, unknown = {}, {}, []
    for key, tensor in tensors.items():
        path = key.removeprefix(PEFT_PREFIX)
        update = _UPDATE_KEY.fullmatch(path)
        place = locate(update[1]) if update else None
        if update and place and place[0] in indices:
            updates[f"blocks.{indices[place[0]]}.{place[1]}.{update[2]}"] = tensor
        elif found := _HEAD_KEY.fullmatch(path):
            head[f"head.{found[1]}"] = tensor
        else:
            unknown.append(key)
    if unknown or not updates:
        raise CheckpointError(
            f"keys that name no linear layer of {type(backbone.model).__name__}'s {backbone.depth} blocks, nor its "
            f"head ({HEAD_NAME}):\n  " + "\n  ".join(sorted(unknown) or ["(the file has no update at all)"])
        )
    return updates, head


def _fit_head(head: Mapping[str, Tensor], backbone: PreTrainedModel, width: int) -> dict[str, Tensor]:
    """A head of the backbone's image classification class as one for memtune's feature (batch, width)."""
    if as_classifier(backbone) is None:
        raise CheckpointError(
            no_head_message(backbone).split(";")[0] + ": a head trained with PEFT has no meaning here"
        )
    own = backbone._modules.get(HEAD_NAME)
    if not head and isinstance(own, nn.Linear):
        head = {f"head.{name}": tensor.detach() for name, tensor in own.named_parameters()}
    if "head.weight" not in head:
        raise CheckpointError(f"the folder has no head ({HEAD_NAME}), nor has {type(backbone).__name__}")
    weight = head["head.weight"]
    if weight.ndim != 2:
        raise CheckpointError(f"the head's weight has the shape {tuple(weight.shape)}, expected (classes, width)")
    if weight[:, width:].any():
        raise CheckpointError(
            f"the head reads {weight.shape[1]} values, more than the {width} of the feature that memtune's heads read"
        )
    return {**head, "head.weight": weight[:, :width]}


def _labels(labels: Sequence[str] | None, backbone: PreTrainedModel, count: int) -> list[str]:
    own: Any = getattr(backbone.config, "id2label", None) or {}
    names = list(own.values()) if labels is None and len(own) == count else list(labels or ())
    names = names or [f"LABEL_{index}" for index in range(count)]
    if len(names) != count:
        raise ConfigError(f"labels: got {len(names)} names, but the head has {count} classes")
    return names
