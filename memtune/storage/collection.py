"""The folder of a multi-task model: an adapter folder for each task, and an index of them.

    multi_task_config.json      format version; for each task its name and its folder, in the order of the tasks; and
                                folders of earlier tasks, which are deleted after a save (by the next one, if it was
                                killed)
    README.md                   the card
    <task>/...                  an adapter folder, which can also be used alone

Index, card and adapters are replaced all at once: who reads meanwhile has the tasks of one save, not of two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..errors import CheckpointError, ConfigError
from ..tasks import Task
from .adapter_folder import CARD_NAME, AdapterFolder, read_folder, remove_files, write_files
from .atomic import place_of, replace_files
from .card import hub_name, in_code, public_name
from .reading import read_json, read_together

FORMAT_VERSION = 1
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
"""Names that Windows gives to devices."""

INDEX_NAME = "multi_task_config.json"

_NAME = re.compile(r"[\w-][\w.-]{0,99}")


def write_collection(
    folder: str | Path,
    tasks: Mapping[str, Task],
    model: PreTrainedModel,
    processors: Mapping[str, Any],
    name: str | None = None,
) -> None:
    """Save tasks as a folder of adapter folders.

    Args:
        folder: Where to; made if it is not there. Adapters of an earlier model there are replaced, other files are not:
            of a task that is not there any more only what was written for it goes.
        tasks: The tasks, by name.
        model: The backbone.
        processors: The image processor of each task, or None.
        name: The backbone's name to record in place of the one that it was loaded by.

    Raises:
        CheckpointError: The path is a file, or what is there is damaged.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"got {folder}, which is a file; a model of many tasks is saved as a folder")
    before = _folders_before(folder) if place_of(folder, INDEX_NAME).is_file() else set()
    tasks = _in_order(tasks)
    folders = _folder_names(tasks)
    stale = sorted(before - set(folders.values()))
    index = {"format_version": FORMAT_VERSION, "tasks": folders} | ({"removed": stale} if stale else {})
    card = _card(tasks, folders, hub_name(model) if name is None else public_name(name))
    with replace_files(folder) as staging:
        for task_name, task in tasks.items():
            place = staging / folders[task_name]
            place.mkdir()
            write_files(place, task, model, processors.get(task_name), name, None)
        (staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (staging / CARD_NAME).write_text(card, encoding="utf-8", errors="replace")
    for each in stale:
        remove_files(folder / each)


def is_collection(folder: str | Path) -> bool:
    """Whether a folder says that it is that of a model of many tasks."""
    return place_of(Path(folder), INDEX_NAME).is_file()


def read_collection(folder: str | Path) -> dict[str, AdapterFolder]:
    """Read and check the adapters of all tasks, by name, as one save left them.

    Raises:
        CheckpointError: The index or an adapter is missing, damaged, or of an unknown format.
    """
    folder = Path(folder)

    def read() -> dict[str, AdapterFolder]:
        adapters = {}
        for name, task in read_index(folder).items():
            try:
                adapters[name] = read_folder(folder / task, within=folder)
            except CheckpointError as error:
                raise CheckpointError(f"task {name!r}: {error}") from error
        return adapters

    return read_together(folder, lambda: [place_of(folder, INDEX_NAME)], read)


def _in_order(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks, those that others extend before these.

    Raises:
        ConfigError: A task extends one that is not among them, as it was then.
    """
    digests = {task.digest(): name for name, task in tasks.items()}
    ordered: dict[str, Task] = {}

    def place(name: str) -> None:
        if name in ordered:
            return
        for earlier_name, earlier in tasks[name].extends.items():
            if (other := digests.get(earlier.digest())) is None:
                raise ConfigError(
                    f"task {name!r} extends {earlier_name!r}, which is not in the model any more as it was: the folder "
                    "could not be loaded. Add it again, or remove the task that extends it"
                )
            place(other)
        ordered[name] = tasks[name]

    for each in tasks:
        place(each)
    return {name: tasks[name] for name in ordered}


def _card(tasks: Mapping[str, Task], folders: Mapping[str, str], base_model: str | None) -> str:
    """The card of the whole; each adapter has its own."""
    rows = [
        f"| {in_code(name)} | [`{folders[name]}`]({folders[name]}) | {' + '.join(task.methods) or 'head alone'} "
        f"| {'masked' if task.masked else 'unmasked'} | {len(task.labels) or 'features'} |"
        for name, task in tasks.items()
    ]
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        library_name="memtune",
        pipeline_tag="image-classification",
        tags=["memtune", "multi-task"],
    )
    table = "\n".join(["| task | adapter | methods | mode | classes |", "| --- | --- | --- | --- | ---: |", *rows])
    text = (
        f"# {len(tasks)} tasks from one pass{f' of {base_model}' if base_model else ''}\n\nAdapters of "
        f"[memtune](https://pypi.org/project/memtune/); `memtune.MultiTaskModel.from_pretrained` loads them all, "
        f"`memtune.load(..., subfolder=...)` one.\n\n{table}\n"
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _folder_names(tasks: Iterable[str]) -> dict[str, str]:
    """A folder name for each task, its own as far as it can be one."""
    names: dict[str, str] = {}
    taken = {INDEX_NAME.lower(), CARD_NAME.lower(), *_RESERVED}
    for task in tasks:
        plain = re.sub(r"[^\w.-]+", "-", task).strip(".-")[:64].strip(".-") or "task"
        plain = f"task-{plain}" if plain.lower().partition(".")[0] in _RESERVED else plain
        name, number = plain, 1
        while name.lower() in taken:  # file systems may not tell upper from lower case
            number += 1
            name = f"{plain}-{number}"
        taken.add(name.lower())
        names[task] = name
    return names


def _folders_before(folder: Path) -> set[str]:
    """The folders of the tasks that are there, and of those that were."""
    tasks = set(read_index(folder).values())
    removed = read_json(place_of(folder, INDEX_NAME)).get("removed", [])
    return tasks | ({each for each in removed if _is_name(each)} if isinstance(removed, list) else set())


def read_index(folder: str | Path) -> dict[str, str]:
    """The folder of each task, by the task's name.

    Raises:
        CheckpointError: The index is missing, damaged, of a newer format, or leads out of the folder.
    """
    path = place_of(Path(folder), INDEX_NAME)
    if not path.exists():
        raise CheckpointError(f"{folder} has no {INDEX_NAME}: it is no folder of a multi-task model")
    try:
        index = read_json(path)
        version, tasks = index["format_version"], index["tasks"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, this memtune reads {FORMAT_VERSION}; update memtune to read it"
        )
    wrong = not isinstance(tasks, dict) or [each for each in tasks.values() if not _is_name(each)]
    if wrong:
        raise CheckpointError(f"{path}: tasks is {tasks!r}, expected the name of a folder for each task")
    return tasks


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None
