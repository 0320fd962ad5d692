"""Checkpoints of a training run, to go on from after an interruption.

    checkpoint-<step>/
        run.json    format version, step, what must be equal for the run to go on, and a digest of each other file
        run.pt      how far the run has come: the schedule, the epoch's sums, averages, the best values so far
        ...         what Accelerate saves: trained values, optimizer, gradient scaler, random states of each process

A folder gets its name when it is whole: a process killed meanwhile leaves no half of one under such a name.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, SAFE_WEIGHTS_NAME, DistributedType, load
from torch import Tensor

from ..errors import CheckpointError
from ..storage import STATE_KEY, check_plain, publish_folder, read_json, read_tensors, remove_folder
from ..tasks import misfits
from .run_settings import check_same_run

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
DESCRIPTION_NAME = "run.json"
STATE_NAME = "run.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


class RunCheckpoints:
    """The checkpoints of one run. All processes call the methods together; all must see the same folder.

    Args:
        folder: Where they lie.
        accelerator: What the run is prepared by.
        settings: What must be equal for a run to go on.
        limit: How many to keep; None for all.
    """

    def __init__(
        self, folder: str | Path, accelerator: Accelerator, settings: Mapping[str, Any], limit: int | None
    ) -> None:
        self._folder = Path(folder)
        self._accelerator = accelerator
        self._settings = settings
        self._limit = limit

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save the run after a step.

        Args:
            step: Steps done.
            state: How far the run has come: tensors, numbers, texts, and lists and dictionaries of them.
        """
        place = self._folder / f"checkpoint-{step}"
        staging = place.with_name(f".{place.name}")
        main = self._accelerator.is_main_process
        if main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self._accelerator.wait_for_everyone()
        deepspeed = self._accelerator.distributed_type == DistributedType.DEEPSPEED
        options = {"exclude_frozen_parameters": True} if deepspeed else {}  # which else would save the backbone too
        handle = self._accelerator.register_save_state_pre_hook(_leave_description_out)
        try:
            self._accelerator.save_state(str(staging), safe_serialization=True, **options)
        finally:
            handle.remove()
        if main:
            torch.save(dict(state), staging / STATE_NAME)
        self._accelerator.wait_for_everyone()
        if main:
            description = {"format_version": FORMAT_VERSION, "step": step, "settings": self._settings}
            description["files"] = _digests(staging)
            (staging / DESCRIPTION_NAME).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            publish_folder(staging, place)
            for old in self.all()[: -self._limit] if self._limit else []:
                remove_folder(old)
        self._accelerator.wait_for_everyone()

    def all(self) -> list[Path]:
        """The checkpoints in the folder, by step."""
        found = [(_NAME.fullmatch(path.name), path) for path in self._folder.glob("checkpoint-*")]
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]

    def find(self, asked: bool | str | Path) -> Path | None:
        """The checkpoint to go on from: the last one for True, else the one given; None where there is none yet."""
        if not isinstance(asked, bool):
            return Path(asked)
        checkpoints = self.all() if asked else []
        if asked and not checkpoints:
            logger.warning("%s has no checkpoint to go on from: the run starts at its beginning", self._folder)
        return checkpoints[-1] if checkpoints else None

    def set_aside(self) -> None:
        """Before a new run: take the checkpoints of another one out of its way, into a folder `previous-<n>`."""
        if self._accelerator.is_main_process and (checkpoints := self.all()):
            number = next(each for each in itertools.count(1) if not (self._folder / f"previous-{each}").exists())
            place = self._folder / f"previous-{number}"
            place.mkdir()
            for checkpoint in checkpoints:
                checkpoint.rename(place / checkpoint.name)
            logger.warning("%s has checkpoints of another run, which are moved to %s", self._folder, place)
        self._accelerator.wait_for_everyone()

    def read(self, path: Path, values: Mapping[str, Tensor] | None) -> dict[str, Any]:
        """The state that was saved with a checkpoint, all of which is checked as far as it can be.

        Args:
            path: The checkpoint.
            values: What the run trains, by name, if a checkpoint has it whole.

        Raises:
            CheckpointError: It is missing, damaged, or of another format version.
            ConfigError: It is of a run with other settings.
        """
        description = _read_description(path)
        check_same_run(description["settings"], self._settings, path, may_be_longer=True)
        present = _digests(path)
        if damaged := [name for name in present | description["files"] if not _is_same(name, present, description)]:
            raise CheckpointError(f"{path} is damaged in {damaged}; delete it, and go on from an earlier checkpoint")
        if values is not None:
            _check_values(path / SAFE_WEIGHTS_NAME, values)
        return _read_state(path / STATE_NAME)

    def load(self, path: Path) -> None:
        """Bring what Accelerate prepared to where a checkpoint is, which has been checked.

        Raises:
            CheckpointError: The random states of this process are missing or damaged, which Accelerate would not say.
        """
        _check_random_states(path / f"{RNG_STATE_NAME}_{self._accelerator.process_index}.pkl")
        self._accelerator.load_state(str(path))
        logger.info("going on from %s", path)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_same(name: str, present: Mapping[str, str], description: Mapping[str, Any]) -> bool:
    return present.get(name) == description["files"].get(name)


def _check_values(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless a file has values for all that is trained, and for nothing else."""
    found = {key.removeprefix("module."): tensor for key, tensor in read_tensors(path).items()}  # of DDP's wrapper
    found.pop(STATE_KEY, None)
    if problems := misfits(found, expected):
        raise CheckpointError(f"{path} does not fit the model:\n  " + "\n  ".join(sorted(problems)[:20]))


def is_like(value: Any, model: Any) -> bool:
    """Whether a value is of the same kind as another one: of its type, with its keys, of its length."""
    if isinstance(model, dict):
        return (
            isinstance(value, dict) and value.keys() == model.keys() and all(is_like(value[k], model[k]) for k in model)
        )
    if isinstance(model, (list, tuple)):
        return type(value) is type(model) and len(value) == len(model) and all(map(is_like, value, model))
    if isinstance(model, (int, float)):
        return type(value) in (int, float, type(model))
    return type(value) is type(model)


def check_optimizer(optimizer: torch.optim.Optimizer, fresh: list[dict[str, Any]]) -> None:
    """Raise `CheckpointError` unless what an optimizer was brought to can be a state of its own.

    Args:
        optimizer: The optimizer.
        fresh: Its groups as they were made.
    """
    if not is_like(optimizer.state_dict()["param_groups"], fresh):
        raise CheckpointError("the optimizer's groups have other settings than the run's")
    kept = _KEPT["SGD" if "momentum" in fresh[0] else "AdamW"]
    for parameter, state in optimizer.state.items():
        if not state.keys() <= kept or (len(kept) > 1 and state.keys() != kept):
            raise CheckpointError(f"the optimizer keeps {list(state)!a} of a parameter, expected {sorted(kept)}")
        for name, value in state.items():
            if value is None and name == "momentum_buffer":
                continue
            shape = () if name == "step" else parameter.shape
            if not isinstance(value, Tensor) or value.shape != shape:
                raise CheckpointError(f"the optimizer's {name} fits no parameter")
            if not value.isfinite().all() or (name in ("step", "exp_avg_sq") and (value < 0).any()):
                raise CheckpointError(f"the optimizer's {name} has values that it never has")


_KEPT = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "SGD": {"momentum_buffer"}}
"""What torch's optimizers keep of each parameter."""


def _check_random_states(path: Path) -> None:
    check_plain(path)
    try:
        states = load(path)  # by torch's reader of data alone
        random.Random().setstate(states["random_state"])
        np.random.RandomState().set_state(states["numpy_random_seed"])
        torch.Generator().set_state(states["torch_manual_seed"])
    except Exception as error:  # of every kind, by what the file is
        raise CheckpointError(f"{path.name}: {type(error).__name__}: {str(error)[:200]}") from error


def _read_state(path: Path) -> dict[str, Any]:
    check_plain(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of every kind, by what the file is
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is damaged: got a {type(state).__name__}, expected a dictionary")
    return state


def _leave_description_out(models: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
    """What a model's state says of the adapter is for Trainer's folders; a run's checkpoint says it elsewhere."""
    for state in weights:
        state.pop(STATE_KEY, None)


def _read_description(path: Path) -> dict[str, Any]:
    described = path / DESCRIPTION_NAME
    try:
        values = read_json(described)
        version, settings, files = values["format_version"], values["settings"], values["files"]
        if type(version) is not int or not isinstance(settings, dict) or not isinstance(files, dict):
            raise TypeError(
                f"format_version {str(version)[:50]}, settings {str(settings)[:50]}, files {str(files)[:50]}"
            )
    except (CheckpointError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{described} is missing or damaged: {error!r}; expected a folder checkpoint-<step> of memtune.fit"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{described} has format version {version}, this memtune reads {FORMAT_VERSION}; use the one that made it"
        )
    return values


def _digests(folder: Path) -> dict[str, str]:
    """A digest of each file in a folder by its path there, but of the description.

    Raises:
        CheckpointError: There is something else than plain files and folders.
    """
    files = sorted(path for path in folder.rglob("*") if path != folder / DESCRIPTION_NAME and not _is_folder(path))
    for path in files:
        check_plain(path)
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}
