"""The adapter folder: written at once, read with every doubt named.

    adapter_config.json         format version, methods and settings, mode, labels (an adapter without a head has none),
                                the backbone and its fingerprint; where the head is the backbone's, "head": "backbone"
                                and a fingerprint of it; where it reads random features, how they are made
    adapter_model.safetensors   the tensors, under role keys such as `blocks.3.memory`
    preprocessor_config.json    the image processor, if there is one
    README.md                   the card

It is data: JSON and safetensors, no pickle and no code.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..backbones import Backbone, fingerprint, head_fingerprint, same_weights
from ..errors import BackboneMismatchError, CheckpointError, ConfigError
from ..methods import AdapterConfig, read_config
from ..tasks import RandomFeatures, SingleLabel, Task, find_objective
from .atomic import place_of, replace_files, settle
from .card import CardDetails, hub_name, public_name, write_card
from .processors import PROCESSOR_NAME, make_processor, save_processor
from .reading import parse_json, read_json, read_tensors, read_together

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"

STATE_NAME = SAFE_WEIGHTS_NAME
"""The file in which transformers' Trainer saves the state of a model."""

STATE_KEY = "adapter_config"
"""What in the state of a model says all else that an adapter folder says: JSON, in bytes."""

BACKBONE_HEAD = "backbone"
"""What `head` says where it is the backbone's own."""

UPGRADES: dict[int, Callable[[dict[str, Any], dict[str, Tensor]], None]] = {}
"""For each earlier format version what makes the next one of it: it changes configuration and tensors in place."""

_TRAINED = re.compile(r"task\.(?:adapters\.\d+\.(.+)|(class_token|head\.weight|head\.bias))")
"""The name of a trained tensor in a model's state, with its role key."""

_CARD_MARK = "library_name: memtune"
"""What stands in every card."""

_USE_MEMTUNE = "load this folder with memtune.load"

_FOR_OTHERS = {"base_model_name_or_path": _USE_MEMTUNE, "peft_type": "LORA", "task_type": _USE_MEMTUNE}
"""What transformers and PEFT read in a file of this name: the errors that they then raise say what to do."""

_SHAPES = ("family", "depth", "widths", "heads", "patch_size", "channels")
"""What an adapter's shapes and meaning hang on; the image size may differ, as positions can be interpolated."""


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder says.

    Attributes:
        path: The folder.
        configs: The settings of each method.
        masked: Whether the adapter was trained in the task stream.
        labels: Names of the classes, in the order of the logits; none if the adapter has no head.
        extends: Digests of the earlier tasks that the adapter reads, by the names they had.
        backbone: The backbone's description, `name_or_path`, `model_class` and `fingerprint` among it.
        tensors: The trained tensors under their role keys.
        processor: The image processor, or None.
        backbone_head: Whether the backbone's own head reads the adapted tower.
        random_features: What the task's head reads, made of the feature; None for the feature itself.
        image_size: Height and width in pixels that it was trained at, where they are not the backbone's; else None.
        problem_type: What the labels of an image are, by transformers' name.
    """

    path: Path
    configs: list[AdapterConfig]
    masked: bool
    labels: list[str]
    extends: dict[str, str]
    backbone: dict[str, Any]
    tensors: dict[str, Tensor]
    processor: Any
    backbone_head: bool
    random_features: RandomFeatures | None
    image_size: tuple[int, int] | None
    problem_type: str


def write_folder(
    folder: str | Path,
    task: Task,
    model: PreTrainedModel,
    processor: Any,
    name: str | None = None,
    details: CardDetails | None = None,
) -> None:
    """Save a task as an adapter folder; files of the same names are replaced all at once.

    Args:
        folder: Where to; made if it is not there. Other files in it are left alone.
        task: What was trained.
        model: The backbone it was trained on.
        processor: The image processor, or None.
        name: The backbone's name to record in place of the one that it was loaded by; "" for none.
        details: What the card says beyond the adapter.

    Raises:
        CheckpointError: The path is a file, or a value is not finite.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"got {folder}, which is a file; an adapter is saved as a folder")
    wrote_processor = _has_processor(place_of(folder, CONFIG_NAME))
    with replace_files(folder) as staging:
        write_files(staging, task, model, processor, name, details)
    if processor is None and wrote_processor:
        _delete(folder / PROCESSOR_NAME)


def write_files(
    folder: Path, task: Task, model: PreTrainedModel, processor: Any, name: str | None, details: CardDetails | None
) -> None:
    """Write the files of an adapter into an empty folder (see `write_folder`).

    Raises:
        CheckpointError: A value is not finite.
    """
    if wrong := [key for key, tensor in task.tensors().items() if not tensor.isfinite().all()]:
        raise CheckpointError(
            f"{wrong[0]} has values that are not finite, as {len(wrong)} of the adapter's tensors have: it would not "
            "be loaded again, so nothing is written"
        )
    config = describe_adapter(task, model, processor, name)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in task.tensors().items()}
    card = write_card(config, tensors, hub_name(model) if name is None else public_name(name), details)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CARD_NAME).write_text(card, encoding="utf-8", errors="replace")
    if processor is not None:
        save_processor(processor, folder)


def describe_adapter(task: Task, model: PreTrainedModel, processor: Any, name: str | None = None) -> dict[str, Any]:
    """The configuration of an adapter (see `write_folder`)."""
    backbone = Backbone(model)
    config = {
        **_FOR_OTHERS,
        "format_version": FORMAT_VERSION,
        "methods": [config.to_dict() for config in task.configs],
        "masked": task.masked,
        "labels": task.labels,
        "extends": {name: earlier.digest() for name, earlier in task.extends.items()},
        "processor": processor is not None,
        "backbone": {
            "name_or_path": model.name_or_path if name is None else name,
            "model_class": type(model).__name__,
            **backbone.describe(),
            "fingerprint": fingerprint(backbone),
        },
    }
    if not isinstance(task.objective, SingleLabel):
        config["problem_type"] = task.problem_type
    if task.random_features is not None:
        config["random_features"] = task.random_features.to_dict()
    if task.image_size is not None:
        config["image_size"] = list(task.image_size)
    if task.backbone_head:
        config["head"] = BACKBONE_HEAD
        config["backbone"]["head_fingerprint"] = head_fingerprint(backbone)
    return config


def remove_files(folder: Path) -> None:
    """Delete the files of an adapter folder that `write_folder` wrote, and the folder if there is nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        return
    try:
        config = read_json(place_of(folder, CONFIG_NAME))
        _check_version(config, folder / CONFIG_NAME)
    except CheckpointError:
        return  # whatever it is, it is no adapter
    card = place_of(folder, CARD_NAME)
    names = [WEIGHTS_NAME, *[PROCESSOR_NAME] * _says_processor(config)]
    if card.is_file() and _CARD_MARK in card.read_text(encoding="utf-8", errors="replace"):
        names.append(CARD_NAME)
    settle(folder)
    for name in [*names, CONFIG_NAME]:  # last what says that the folder is an adapter's
        _delete(folder / name)
    with suppress(OSError):  # others' files are in it
        folder.rmdir()


def _delete(path: Path) -> None:
    """Delete a file, unless somebody has put a folder in its place."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)


def _has_processor(path: Path) -> bool:
    """Whether a configuration that is there says that its processor lies beside it: others' files are left alone."""
    try:
        return _says_processor(read_json(path))
    except CheckpointError:
        return False


def read_folder(folder: str | Path, within: Path | None = None) -> AdapterFolder:
    """Read and check an adapter folder.

    Args:
        folder: The folder.
        within: The folder of a model of many tasks that it is read as a part of.

    Raises:
        CheckpointError: The folder, a file of it or an entry is missing, damaged or of an unknown format.
    """
    folder = Path(folder)
    if within is None and not folder.is_dir():
        raise CheckpointError(
            f"got {str(folder)!r}, which is no folder; expected one with {CONFIG_NAME} and {WEIGHTS_NAME}"
        )

    def find() -> list[Path]:
        return [place_of(folder, name, within) for name in (CONFIG_NAME, WEIGHTS_NAME, PROCESSOR_NAME)]

    return read_together(folder, find, lambda: _read(folder, *find()))


def _read(folder: Path, config_path: Path, weights_path: Path, processor_path: Path) -> AdapterFolder:
    if not config_path.exists() and (folder / STATE_NAME).exists():
        return _read_state(folder)
    missing = [name for name, path in ((CONFIG_NAME, config_path), (WEIGHTS_NAME, weights_path)) if not path.exists()]
    if missing:
        whose = " (it is that of a model of many tasks: use memtune.MultiTaskModel.from_pretrained)"
        of_many = whose if place_of(folder, "multi_task_config.json").exists() else ""
        raise CheckpointError(
            f"{folder} is no adapter folder: {' and '.join(missing)} not found{of_many}; save_pretrained writes one"
        )
    config = read_json(config_path)
    processor = partial(_read_processor, processor_path) if _says_processor(config) else None
    return _made(folder, config_path, config, read_tensors(weights_path), processor)


def _read_state(folder: Path) -> AdapterFolder:
    """Read what transformers' Trainer saves: the state of a model, with all else that an adapter folder says in it.

    Raises:
        CheckpointError: It is damaged, or of another model.
    """
    path = folder / STATE_NAME
    state = read_tensors(path)
    if STATE_KEY not in state:
        raise CheckpointError(f"{path} is no state of a model of memtune's; save_pretrained writes an adapter folder")
    said = parse_json(state.pop(STATE_KEY).numpy().tobytes(), path)
    if not isinstance(said, dict) or "config" not in said:
        raise CheckpointError(f"{path} is damaged: {STATE_KEY} is {str(said)[:100]}")
    tensors = {found[1] or found[2]: tensor for name, tensor in state.items() if (found := _TRAINED.fullmatch(name))}
    settings = said.get("processor")
    return _made(folder, path, said["config"], tensors, None if settings is None else partial(make_processor, settings))


def to_state(task: Task, model: PreTrainedModel, processor: Any) -> dict[str, Tensor]:
    """What makes an adapter folder of a folder in which Trainer has saved a model's state: one more tensor of it.

    The backbone's name is in it only if it is one on the Hub, as Trainer may push the folder.
    """
    settings = None
    if processor is not None:
        with TemporaryDirectory() as place:
            save_processor(processor, Path(place))
            settings = read_json(Path(place, PROCESSOR_NAME))
    said = {"config": describe_adapter(task, model, processor, hub_name(model) or ""), "processor": settings}
    return {STATE_KEY: torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)}


def _says_processor(config: Any) -> bool:
    return isinstance(config, dict) and config.get("processor") is True


def _made(
    folder: Path, path: Path, config: Any, tensors: dict[str, Tensor], processor: Callable[[], Any] | None
) -> AdapterFolder:
    """What a folder says, checked.

    Args:
        folder: The folder.
        path: Where the configuration is.
        config: The configuration.
        tensors: The tensors under role keys.
        processor: Makes the image processor.
    """
    version = _check_version(config, path)
    for earlier in range(version, FORMAT_VERSION):
        UPGRADES[earlier](config, tensors)
    _check_entries(config, path)
    configs = _read_methods(config, folder)
    return AdapterFolder(
        folder,
        configs,
        config["masked"],
        config["labels"],
        config["extends"],
        config["backbone"],
        tensors,
        None if processor is None else processor(),
        config.get("head") == BACKBONE_HEAD,
        _read_random_features(config, folder),
        _read_image_size(config, folder),
        _read_problem_type(config, folder),
    )


def _check_version(config: Any, path: Path) -> int:
    """The format version of a configuration, which this file can read."""
    version = config.get("format_version") if isinstance(config, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"{path} has no format_version: it was not written by memtune")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this memtune reads up to {FORMAT_VERSION}; update memtune to read it"
        )
    if version < min(UPGRADES, default=FORMAT_VERSION):
        raise CheckpointError(f"{path} has format version {version}, which no memtune wrote")
    return version


def _check_entries(config: Mapping[str, Any], path: Path) -> None:
    """Raise `CheckpointError` unless every entry of the configuration has the right type."""
    expected = {"methods": list, "masked": bool, "labels": list, "extends": dict, "processor": bool, "backbone": dict}
    for name, kind in expected.items():
        if not isinstance(config.get(name), kind):
            raise CheckpointError(f"{path}: {name} is {config.get(name)!r}, expected a {kind.__name__}")
    described = config["backbone"]
    text, recorded = ("family", "model_class"), described.get("fingerprint")
    if not all(isinstance(described.get(name), str) for name in text) or type(described.get("depth")) is not int:
        raise CheckpointError(
            f"{path}: backbone lacks one of family, model_class and depth, or it is no text or number"
        )
    named = isinstance(recorded, dict) and "values" in recorded
    if not named or not all(isinstance(each, str) for each in recorded.values()):
        raise CheckpointError(f"{path}: the backbone's fingerprint is damaged: {str(recorded)[:80]}")
    if not isinstance(described.get("name_or_path"), (str, type(None))):
        raise CheckpointError(f"{path}: the backbone's name_or_path is no text")
    names, earlier = config["labels"], config["extends"]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise CheckpointError(f"{path}: labels are {str(names)[:200]}, expected different names")
    if not all(isinstance(digest, str) for digest in earlier.values()):
        raise CheckpointError(f"{path}: extends is {str(earlier)[:200]}, expected a digest for each name")
    if "head" in config and (config["head"] != BACKBONE_HEAD or config["labels"]):
        raise CheckpointError(
            f"{path}: head is {config['head']!r}, with {len(config['labels'])} labels; expected {BACKBONE_HEAD!r}, "
            "with none"
        )


def _read_methods(config: Mapping[str, Any], folder: Path) -> list[AdapterConfig]:
    try:
        return [read_config(values) for values in config["methods"]]
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from error


def _read_random_features(config: Mapping[str, Any], folder: Path) -> RandomFeatures | None:
    values = config.get("random_features")
    try:
        return None if values is None else RandomFeatures(**values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: random_features is {values!r}: {error}") from error


def _read_problem_type(config: Mapping[str, Any], folder: Path) -> str:
    try:
        return find_objective(config.get("problem_type")).problem_type
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from error


def _read_image_size(config: Mapping[str, Any], folder: Path) -> tuple[int, int] | None:
    size = config.get("image_size")
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(each) is int and 0 < each < 2**16 for each in size):
        raise CheckpointError(f"{folder / CONFIG_NAME}: image_size is {size!r}, expected height and width in pixels")
    return size[0], size[1]


def _read_processor(path: Path) -> Any:
    return make_processor(read_json(path), path)


def make_task(folder: AdapterFolder, backbone: Backbone, known: Mapping[str, Task] | None = None) -> Task:
    """The task that an adapter folder holds.

    Args:
        folder: What the folder says.
        backbone: The backbone, which has been checked.
        known: Tasks that the adapter may extend.

    Raises:
        CheckpointError: The tensors do not fit, or a task that the adapter extends is missing.
    """
    by_digest = {task.digest(): task for task in (known or {}).values()} if folder.extends else {}
    if missing := [name for name, digest in folder.extends.items() if digest not in by_digest]:
        raise CheckpointError(
            f"{folder.path} extends the tasks {missing}, as they were when it was trained: combine it with them, after "
            "them, in one model"
        )
    earlier = {name: copy.deepcopy(by_digest[digest]) for name, digest in folder.extends.items()}
    _check_sizes(folder)
    task = Task(
        folder.configs,
        folder.labels,
        backbone,
        folder.masked,
        earlier,
        backbone_head=folder.backbone_head,
        random_features=folder.random_features,
        problem_type=folder.problem_type,
    )
    task.load_tensors(folder.tensors)
    task.image_size = folder.image_size
    return task


def _check_sizes(folder: AdapterFolder) -> None:
    """Raise `CheckpointError` for a size that is more than all values of the tensors, before it is allocated."""
    values = sum(tensor.numel() for tensor in folder.tensors.values())
    sizes = [(config.method, *each) for config in folder.configs for each in vars(config).items()]
    if folder.random_features is not None:
        sizes.append(("random_features", "width", folder.random_features.width))
    for method, name, size in sizes:
        if type(size) is int and size > max(values, 1024):
            raise CheckpointError(
                f"{folder.path / CONFIG_NAME}: {method} has {name} {str(size)[:30]}, but all tensors together have "
                f"{values} values: they are not of one adapter"
            )


def check_backbone(
    folder: AdapterFolder, backbone: Backbone, *, any_weights: bool = False, own: Mapping[str, str] | None = None
) -> None:
    """Compare a backbone with the one that an adapter was trained on.

    Args:
        folder: The adapter.
        backbone: The backbone to use it on.
        any_weights: Accept other weights of the same shapes.
        own: The backbone's fingerprint, where it has been taken already.

    Raises:
        BackboneMismatchError: It is another one; every difference is named.
    """
    described, recorded, trained_on = backbone.describe(), folder.backbone, folder.backbone.get("name_or_path")
    shapes = [*_SHAPES, *{"pooling"} & recorded.keys()]
    differences = [
        f"{name}: got {described.get(name)}, expected {recorded.get(name)}"
        for name in shapes
        if described.get(name) != recorded.get(name)
    ]
    if differences:
        raise BackboneMismatchError(
            f"the adapter {folder.path} was trained on {trained_on!r}, a backbone of another shape:\n  "
            + "\n  ".join(differences)
        )
    if not any_weights and not same_weights(recorded.get("fingerprint", {}), own or fingerprint(backbone)):
        raise BackboneMismatchError(
            f"the adapter {folder.path} was trained on {trained_on!r}; the backbone given has the same shape but other "
            "weights. Load the recorded one, or pass any_weights=True if you know what you do"
        )
    if folder.backbone_head:
        _check_head(folder, backbone, any_weights)


def _check_head(folder: AdapterFolder, backbone: Backbone, any_weights: bool) -> None:
    """Raise `BackboneMismatchError` unless the backbone has the head that the adapter was trained before."""
    name, recorded = type(backbone.model).__name__, folder.backbone.get("model_class")
    trained = f"the adapter {folder.path} was trained for the head of {folder.backbone.get('name_or_path')!r}"
    if recorded not in [kind.__name__ for kind in type(backbone.model).__mro__]:
        raise BackboneMismatchError(f"{trained}: got a {name}, expected a {recorded}")
    own, other = head_fingerprint(backbone), folder.backbone.get("head_fingerprint")
    if any_weights or (own is None and other is None):
        return
    if own is None or other is None or not same_weights(other, own):
        raise BackboneMismatchError(
            f"{trained}; the {name} given has the same backbone, but another head or other weights in it. Load the "
            "recorded one, or pass any_weights=True if you know what you do"
        )
