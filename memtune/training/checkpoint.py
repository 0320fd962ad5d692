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
import re
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..errors import CheckpointError
from ..storage import publish_folder, read_json, remove_folder
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
        self._accelerator.save_state(str(staging), safe_serialization=True, **options)
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

    def load(self, path: Path) -> dict[str, Any]:
        """Bring what Accelerate prepared to where a checkpoint is.

        Returns:
            The state that was saved with it.

        Raises:
            CheckpointError: It is missing, damaged, or of another format version; nothing has been changed then.
            ConfigError: It is of a run with other settings; the same.
        """
        description = _read_description(path)
        check_same_run(description["settings"], self._settings, path)
        present = _digests(path)
        if damaged := [name for name, digest in description["files"].items() if present.get(name) != digest]:
            raise CheckpointError(f"{path} is damaged in {damaged}; delete it, and go on from an earlier checkpoint")
        state = torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
        self._accelerator.load_state(str(path))
        logger.info("going on from %s", path)
        return state


def _read_description(path: Path) -> dict[str, Any]:
    described = path / DESCRIPTION_NAME
    try:
        values = read_json(described)
        version, _, _ = values["format_version"], values["settings"], values["files"]
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
    """A digest of each file in a folder by its path there, but of the description."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / DESCRIPTION_NAME)
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}
