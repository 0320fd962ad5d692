"""The folder of a class-incremental run: the adapter after the last finished task, and beside it the run's state.

    continual.json    format version, what must be equal for the run to go on, and the result so far

Both are replaced at once, so that a process killed at any moment leaves them as they were after the same task.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..backbones import Backbone
from ..errors import CheckpointError
from ..models import TunedModel
from ..preparation import TrainingConfig
from ..storage import check_backbone, place_of, read_folder, read_json, replace_files
from ..training import check_same_run, describe_run
from .result import ContinualResult

logger = logging.getLogger(__name__)

STATE_NAME = "continual.json"
FORMAT_VERSION = 1


def start_task(model: TunedModel, number: int) -> None:
    """Tell every adapter of a model that the task of this number begins."""
    for adapter in model.task.adapters:
        adapter.start_task(number)


class RunFolder:
    """An adapter folder with the state of a run beside the adapter.

    Args:
        path: The folder.
        model: The model before its first task.
        tasks: The `ContinualTask`s.
        config: The settings of training.
        loss: The loss, or "closed_form".

    Raises:
        ConfigError: The backbone is being trained, which an adapter folder does not hold.
    """

    def __init__(self, path: Path, model: TunedModel, tasks: Sequence[Any], config: TrainingConfig, loss: str) -> None:
        self._path = path
        self._config = config
        self._settings = describe_run(
            model,
            config,
            loss=loss,
            classes=[list(task.classes) for task in tasks],
            train_images=[len(task.train_dataset) for task in tasks],
            eval_images=[len(task.eval_dataset) for task in tasks],
        )

    def save(self, model: TunedModel, result: ContinualResult) -> None:
        """Replace adapter and state at once; the main process alone writes."""
        state = PartialState()
        if state.is_main_process:
            values = {"format_version": FORMAT_VERSION, "settings": self._settings, "result": result.to_dict()}
            with replace_files(self._path) as staging:
                model.save_pretrained(staging, training=self._config)
                (staging / STATE_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        state.wait_for_everyone()

    def resume(self, model: TunedModel) -> ContinualResult | None:
        """Bring the model to where the folder's run is, and give its result so far; None where there is no run."""
        if not place_of(self._path, STATE_NAME).is_file():
            return None
        values = read_state(self._path)
        check_same_run(values["settings"], self._settings, self._path)
        adapter = read_folder(self._path)
        check_backbone(adapter, Backbone(model.backbone))
        result = ContinualResult.from_dict(values["result"])
        for number in range(result.tasks_done):
            start_task(model, number)
        model.task.load_tensors(adapter.tensors)
        model.eval()
        logger.info("%s: going on after task %d", self._path, result.tasks_done)
        return result


def read_state(folder: str | Path) -> dict[str, Any]:
    """The `settings` and the `result` so far of a run's folder, as JSON values.

    Raises:
        CheckpointError: There is no run in the folder, or its state is damaged or of an unknown format.
    """
    path = place_of(Path(folder), STATE_NAME)
    try:
        values = read_json(path)
        version = values["format_version"]
        if not isinstance(values["settings"], dict):
            raise TypeError(f"settings is {str(values['settings'])[:50]}")
        ContinualResult.from_dict(values["result"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this memtune reads {FORMAT_VERSION}; update memtune"
        )
    return values
