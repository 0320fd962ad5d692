"""`MultiTaskModel`: one frozen backbone with many tasks, for inference."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from ..backbones import Backbone, Hold
from ..errors import CheckpointError, ConfigError, InputError, MemtuneError
from ..storage import (
    find_collection,
    load_recorded_backbone,
    make_repository,
    public_name,
    push_folder,
    read_folder,
    read_index,
    write_collection,
)
from ..tasks import Arrangement, Plan, Task, answer_all, answer_each, check_images, check_task_names, eager, make_plan
from .conventions import VisionModel
from .sources import SourceReader, TaskSource

_CHANGES = threading.Lock()
"""Held while a model's tasks change, so that changes made in several threads all count."""


TaskOutput: TypeAlias = Any
"""An `ImageClassifierOutput` with `logits`, or of a task without a head a `BaseModelOutputWithPooling`."""


class MultiTaskOutput(dict[str, TaskOutput]):
    """Each task's answer for a batch of images, by its name.

    Attributes:
        base: The untouched backbone's own output.
    """

    def __init__(self, answers: Mapping[str, TaskOutput], base: Any) -> None:
        super().__init__(answers)
        self.base = base


class MixedOutput(list[TaskOutput]):
    """For each image of a batch the answer of its own task, with `logits` (1, classes of that task), or features.

    Attributes:
        base: The untouched backbone's own output for all images.
    """

    def __init__(self, answers: Sequence[TaskOutput], base: Any) -> None:
        super().__init__(answers)
        self.base = base


class MultiTaskModel(VisionModel):
    """A frozen backbone with several tasks, for inference: one pass over an image answers all of them.

    Made by `combine`. Calls may come from several threads, also while tasks are added and removed.

    Attributes:
        backbone: The backbone; its own forward is never changed.
        arrangement: What a pass runs; replaced as a whole when tasks come or go, so that one under way keeps its own.
    """

    arrangement: Arrangement

    def __init__(self, backbone: PreTrainedModel | nn.Module) -> None:
        super().__init__()
        described = Backbone(backbone)
        self.backbone = backbone = described.model
        self._hold = Hold(backbone)
        backbone.eval()
        self._processors: dict[str, Any] = {}
        self.arrangement = Arrangement.of(described, {})
        self.eval()

    @property
    def tasks(self) -> dict[str, list[str]]:
        """The labels of each task, by its name; none of a task without a head."""
        return {name: list(task.labels) for name, task in self.arrangement.tasks.items()}

    @property
    def processors(self) -> dict[str, Any]:
        """The image processor of each task, or None, by its name."""
        return dict(self._processors)

    def masked_tasks(self) -> dict[str, Task]:
        """Copies of the tasks of masked mode, by name."""
        return {name: copy.deepcopy(task) for name, task in self.arrangement.tasks.items() if task.masked}

    def add_tasks(self, tasks: Mapping[str, TaskSource], *, any_weights: bool = False) -> None:
        """Add tasks (see `combine`), those that extend others after them; if one cannot be added, none is."""
        with _CHANGES:
            before, backbone = self.arrangement.tasks, Backbone(self.backbone)
            reader = SourceReader(backbone, any_weights=any_weights)
            added: dict[str, Task] = {}
            processors: dict[str, Any] = {}
            for name, source in tasks.items():
                if not isinstance(name, str) or not name:
                    raise ConfigError(f"tasks: got the name {name!r}, expected a string")
                if name in before:
                    raise ConfigError(
                        f"tasks: there is a task {name!r} already; remove it first, or choose another name"
                    )
                try:
                    task, processors[name] = reader.read(source, before | added)
                    if task.backbone_head:
                        task.require_head("combine")
                except MemtuneError as error:
                    raise type(error)(f"task {name!r}: {error}") from error
                added[name] = task.requires_grad_(False).eval().to(self.backbone.device)
            self.arrangement = Arrangement.of(backbone, before | added, self.arrangement)
            self._processors |= processors

    def _filled(self, tasks: Mapping[str, TaskSource], any_weights: bool) -> MultiTaskModel:
        """This new model with its tasks; if one cannot be added, the backbone is given back as it was."""
        try:
            self.add_tasks(tasks, any_weights=any_weights)
        except BaseException:
            self._hold.release(self.backbone)
            raise
        return self

    def add_task(self, name: str, source: TaskSource, *, any_weights: bool = False) -> None:
        """Add one task (see `combine`)."""
        self.add_tasks({name: source}, any_weights=any_weights)

    def remove_task(self, name: str) -> None:
        """Take a task out; a pass that is under way in another thread still answers it.

        Raises:
            ConfigError: There is no such task.
        """
        with _CHANGES:
            before = self.arrangement.tasks
            check_task_names("tasks", [name], before)
            tasks = {other: task for other, task in before.items() if other != name}
            self.arrangement = Arrangement.of(Backbone(self.backbone), tasks, self.arrangement)
            self._processors.pop(name, None)

    def forward(
        self,
        pixel_values: Tensor,
        tasks: Sequence[str] | None = None,
        rows: Sequence[str] | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> MultiTaskOutput | MixedOutput:
        """Classify images by the labels of several tasks; for those without a head, give their features.

        Args:
            pixel_values: Images as the processor gives them, (batch, channels, height, width).
            tasks: The tasks to answer for all images; None for all of them.
            rows: The task of each image, where each has one of its own (a mixed batch).
            interpolate_pos_encoding: Accept images of another size than the backbone's.

        Returns:
            The answers by task, with `logits` (batch, classes) or, of a task without a head, `pooler_output` (batch,
            width); or for `rows` a list of answers, one for each image, with a batch of one. Both have the backbone's
            own output as `base`.

        Raises:
            InputError: The images have the wrong shape, type or size; both `tasks` and `rows` are given; or `rows` does
                not name one task for each image.
            ConfigError: A task is unknown.
        """
        return self._answer(pixel_values, tasks, rows, interpolate_pos_encoding)

    @eager
    def _answer(
        self, pixel_values: Tensor, tasks: Sequence[str] | None, rows: Sequence[str] | None, interpolate: bool
    ) -> MultiTaskOutput | MixedOutput:
        arrangement = self.arrangement
        pixel_values = check_images(pixel_values, arrangement.trunk.view, interpolate=interpolate)
        names = _check_names(tasks, rows, pixel_values.shape[0], arrangement.tasks)
        place = arrangement.trunk, arrangement.lanes
        if rows is not None:
            each, base = answer_each(*place, pixel_values, names, interpolate=interpolate)
            own = [arrangement.tasks[name] for name in names]
            return MixedOutput(list(map(_as_output, own, each)), base)
        answers, base = answer_all(*place, pixel_values, names, interpolate=interpolate)
        return MultiTaskOutput({name: _as_output(arrangement.tasks[name], answers[name]) for name in names}, base)

    def plan(self) -> Plan:
        """What the tasks share, and what they cost in multiply-adds; print it to see a table."""
        return make_plan(self.arrangement.trunk, self.arrangement.lanes)

    def train(self, mode: bool = True) -> MultiTaskModel:
        """Stay in evaluation mode: this model is for inference; `wrap` trains."""
        return super().train(False)

    def save_pretrained(self, save_directory: str | Path, *, base_model_name: str | None = None) -> None:
        """Save as a folder with an adapter folder for each task, which can also be used alone.

        Args:
            save_directory: The folder; made if it is not there.
            base_model_name: The backbone's name to record, where it was loaded from a path of this machine.
        """
        write_collection(
            save_directory, self.arrangement.tasks, self.backbone, self._processors, base_model_name or None
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        base_model_name: str | None = None,
    ) -> CommitInfo:
        """Share all tasks on the Hub as one repository, in one commit (see `TunedModel.push_to_hub`).

        Raises:
            HubError: The Hub refused or could not be reached; the repository has the old tasks or the new ones.
        """
        repo_id = make_repository(repo_id, private=private, token=token)
        name = public_name(base_model_name or self.backbone.name_or_path) or ""  # no path of this machine gets out
        with TemporaryDirectory() as folder:
            write_collection(folder, self.arrangement.tasks, self.backbone, self._processors, name)
            options: dict[str, Any] = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
            return push_folder(Path(folder), repo_id, token=token, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        backbone: PreTrainedModel | nn.Module | None = None,
        *,
        any_weights: bool = False,
        revision: str | None = None,
        **access: Any,
    ) -> MultiTaskModel:
        """Load what `save_pretrained` saved, or `push_to_hub` shared.

        Args:
            source: The folder, or `user/name` on the Hub; a folder of that name goes first.
            backbone: The frozen backbone, loaded already; None to load it by the name that the adapters recorded.
            any_weights: Accept a backbone of the right shape with other weights than an adapter was trained on.
            revision: Branch, tag, pull request or commit on the Hub.
            access: `token`, `cache_dir`, `local_files_only` and `force_download`, as for `TunedModel.from_pretrained`.

        Raises:
            CheckpointError: The folder is missing, incomplete, damaged or of an unknown format.
            BackboneMismatchError: The backbone is not the one that an adapter was trained on.
        """
        source = find_collection(source, revision=revision, **access)
        folders = {name: source / folder for name, folder in read_index(source).items()}
        if backbone is None:
            if not folders:
                raise CheckpointError(f"{source} has no tasks that would name their backbone; pass backbone=...")
            kept = {name: access[name] for name in ("token", "cache_dir", "local_files_only") if name in access}
            backbone = load_recorded_backbone(read_folder(next(iter(folders.values()))), **kept)
        return cls(backbone)._filled(folders, any_weights)

    def _apply(self, *arguments: Any, **options: Any) -> MultiTaskModel:
        super()._apply(*arguments, **options)
        tasks = {name: task._apply(*arguments, **options) for name, task in self.arrangement.tasks.items()}
        self.arrangement = Arrangement.of(Backbone(self.backbone), tasks)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "arrangement": self.arrangement.tasks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold.join(self.backbone)
        self.arrangement = Arrangement.of(Backbone(self.backbone), state["arrangement"])


def _as_output(task: Task, answer: Tensor) -> TaskOutput:
    if task.head is None:
        return BaseModelOutputWithPooling(pooler_output=answer)
    return ImageClassifierOutput(logits=answer)


@eager
def _check_names(
    tasks: Sequence[str] | None, rows: Sequence[str] | None, batch: int, known: Mapping[str, Task]
) -> Sequence[str]:
    names, what = (tasks, "tasks") if rows is None else (rows, "rows")
    if tasks is not None and rows is not None:
        raise InputError("got both tasks and rows; give tasks for all images, or rows with one task for each image")
    if names is None:
        return list(known)
    check_task_names(what, names, known, once=rows is None)
    if rows is not None and len(names) != batch:
        raise InputError(f"rows: got {len(names)} names for {batch} images, expected one for each image")
    return names
