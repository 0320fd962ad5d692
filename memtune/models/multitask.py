"""`MultiTaskModel`: one frozen backbone with many tasks, for inference; and `combine`, for adapters trained apart."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from ..backbones import Backbone, Hold, HookWatch, fingerprint, same_weights, structure
from ..errors import BackboneMismatchError, CheckpointError, ConfigError, InputError, MemtuneError
from ..storage import (
    AdapterFolder,
    CardDetails,
    check_backbone,
    find_collection,
    find_folder,
    load_recorded_backbone,
    make_task,
    read_collection,
    read_folder,
    write_collection,
)
from ..tasks import (
    Arrangement,
    Plan,
    Task,
    answer_all,
    answer_each,
    check_images,
    check_task_names,
    interpolates,
    make_plan,
    outside_graphs,
)
from .prediction import Classify, TaskScores
from .shared import SharedModel
from .tuned import TunedModel, drop_backbone, forgive_backbone, refuse_backbone

if TYPE_CHECKING:
    from typing_extensions import Self

TaskSource: TypeAlias = str | Path | TunedModel
"""An adapter folder, an adapter's id on the Hub, or a model in memory."""

_CHANGES = threading.Lock()
"""Held while a model's tasks change, so that changes made in several threads all count."""


TaskOutput: TypeAlias = Any
"""An `ImageClassifierOutput` with `logits`, or of a task without a head a `BaseModelOutputWithPooling`."""


class MultiTaskOutput(dict[str, TaskOutput]):
    """Each task's answer for a batch of images, by its name.

    Attributes:
        base: The untouched backbone's own output; None if it was not asked for.
    """

    def __init__(self, answers: Mapping[str, TaskOutput], base: Any) -> None:
        super().__init__(answers)
        self.base = base


class MixedOutput(list[TaskOutput]):
    """For each image of a batch the answer of its own task, with `logits` (1, classes of that task), or features.

    Attributes:
        base: The untouched backbone's own output for all images; None if it was not asked for.
    """

    def __init__(self, answers: Sequence[TaskOutput], base: Any) -> None:
        super().__init__(answers)
        self.base = base


class MultiTaskModel(SharedModel):
    """A frozen backbone with several tasks, for inference: one pass over an image answers all of them.

    Made by `combine`. Calls may come from several threads, also while tasks are added and removed.

    Example:
        >>> both = memtune.combine(backbone, {"pets": "pets-lora", "birds": "birds-lora"})
        >>> both.save_pretrained("both")
        >>> both = memtune.MultiTaskModel.from_pretrained("both", backbone)

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
        self._structure, self._hooks = structure(backbone), HookWatch(backbone)
        self.register_state_dict_post_hook(drop_backbone)
        self.register_load_state_dict_pre_hook(refuse_backbone)
        self.register_load_state_dict_post_hook(forgive_backbone)
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
        self._add(tasks, any_weights)

    def _add(self, tasks: Mapping[str, TaskSource | AdapterFolder], any_weights: bool) -> None:
        with _CHANGES:
            before, backbone = self.arrangement.tasks, Backbone(self.backbone)
            sources = TaskSources(backbone, any_weights=any_weights)
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
                    task, processors[name] = sources.read(source, before | added)
                    if task.backbone_head:
                        task.require_head("combine")
                except MemtuneError as error:
                    raise type(error)(f"task {name!r}: {error}") from error
                added[name] = task.requires_grad_(False).eval().to(self.backbone.device)
            self.arrangement = Arrangement.of(backbone, _copied(before) | added, self.arrangement)
            self._processors |= processors

    def _filled(self, tasks: Mapping[str, TaskSource | AdapterFolder], any_weights: bool) -> Self:
        """This new model with its tasks; if one cannot be added, the backbone is given back as it was."""
        try:
            self._add(tasks, any_weights)
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
            self.arrangement = Arrangement.of(Backbone(self.backbone), _copied(tasks), self.arrangement)
            self._processors.pop(name, None)

    def forward(
        self,
        pixel_values: Tensor,
        tasks: Sequence[str] | None = None,
        rows: Sequence[str] | None = None,
        interpolate_pos_encoding: bool = False,
        base: bool = True,
    ) -> MultiTaskOutput | MixedOutput:
        """Classify images by the labels of several tasks; for those without a head, give their features.

        Args:
            pixel_values: Images as the processor gives them, (batch, channels, height, width).
            tasks: The tasks to answer for all images; None for all of them.
            rows: The task of each image, where each has one of its own (a mixed batch).
            interpolate_pos_encoding: Accept images of another size than the backbone's.
            base: Give the backbone's own output too. Without it only what the tasks read of the backbone is run: for
                unmasked tasks the blocks before the first that they change.

        Returns:
            The answers by task, with `logits` (batch, classes) or, of a task without a head, `pooler_output` (batch,
            width); or for `rows` a list of answers, one for each image, with a batch of one. Both have the backbone's
            own output as `base`, or None.

        Raises:
            InputError: The images have the wrong shape, type or size; both `tasks` and `rows` are given; or `rows` does
                not name one task for each image.
            ConfigError: A task is unknown.
        """
        return self._answer(pixel_values, tasks, rows, interpolate_pos_encoding, base)

    @outside_graphs
    def _answer(
        self,
        pixel_values: Tensor,
        tasks: Sequence[str] | None,
        rows: Sequence[str] | None,
        interpolate: bool,
        base: bool,
    ) -> MultiTaskOutput | MixedOutput:
        if self._hooks.rings():
            self._renew()
        arrangement, backbone = self.arrangement, self.arrangement.trunk.view
        batch = len(pixel_values) if isinstance(pixel_values, Tensor) and pixel_values.ndim else 0
        names = _check_names(tasks, rows, batch, arrangement.tasks)
        sizes = {name: arrangement.tasks[name].image_size for name in names}
        trained = {name: size or backbone.image_size for name, size in sizes.items()} if any(sizes.values()) else {}
        interpolate = interpolates(pixel_values, trained, asked=interpolate)
        pixel_values = check_images(pixel_values, backbone, interpolate=interpolate)
        if rows is not None:
            each, output = answer_each(arrangement, pixel_values, names, interpolate=interpolate, base=base)
            own = [arrangement.tasks[name] for name in names]
            return MixedOutput(list(map(_as_output, own, each)), output)
        answers, output = answer_all(arrangement, pixel_values, names, interpolate=interpolate, base=base)
        return MultiTaskOutput({name: _as_output(arrangement.tasks[name], answers[name]) for name in names}, output)

    def _renew(self) -> None:
        """Make the views anew if hooks were placed on the backbone or removed from it."""
        with _CHANGES:
            if (now := structure(self.backbone)) != self._structure:
                self.arrangement = Arrangement.of(Backbone(self.backbone), _copied(self.arrangement.tasks))
            self._structure, self._hooks = now, HookWatch(self.backbone)

    def _classifier(self, tasks: Sequence[str] | None) -> tuple[Classify, Any]:
        if tasks is None:
            tasks = [name for name, labels in self.tasks.items() if labels]
            if not tasks:
                raise ConfigError("tasks: the model has none that have labels; add one first")
        self.check_labelled(tasks)
        names = list(tasks)

        def classify(pixel_values: Tensor) -> dict[str, TaskScores]:
            tasks = self.arrangement.tasks
            output: Any = self(pixel_values, tasks=names, base=False)
            return {name: TaskScores(tasks[name], output[name].logits) for name in names}

        return classify, self.shared_processor(names)

    def check_labelled(self, tasks: Sequence[str]) -> None:
        """Raise `ConfigError` unless these are tasks that have labels."""
        check_task_names("tasks", tasks, self.arrangement.tasks)
        if without := [name for name in tasks if not self.arrangement.tasks[name].labels]:
            raise ConfigError(
                f"tasks: got {without}, which have no labels (they were wrapped with head=None, and give features); "
                "pass tasks=[...] with those that have"
            )

    def shared_processor(self, tasks: Sequence[str] | None = None) -> Any:
        """The image processor of all tasks, or of some, that have one; None if there is none.

        Raises:
            ConfigError: They have several.
        """
        own = {name: self._processors[name] for name in (self._processors if tasks is None else tasks)}
        found = {name: processor for name, processor in own.items() if processor is not None}
        first = next(iter(found), "")
        if others := [name for name in found if found[name].to_dict() != found[first].to_dict()]:
            raise ConfigError(
                f"image_processor: the tasks {first!r} and {others[0]!r} were trained with different ones, and one "
                "pass answers both; pass the one to use, or make a model of the tasks that share theirs"
            )
        return found.get(first)

    def plan(self) -> Plan:
        """What the tasks share, and what they cost in multiply-adds; print it to see a table."""
        return make_plan(self.arrangement.trunk, self.arrangement.lanes)

    def train(self, mode: bool = True) -> MultiTaskModel:
        """Stay in evaluation mode: this model is for inference; `wrap` trains."""
        return super().train(False)

    def _details(
        self, results: Mapping[str, float] | None, datasets: str | Sequence[str], training: Any
    ) -> CardDetails:
        if results or datasets or training is not None:
            raise ConfigError(
                "results, datasets, training: the card of a model of many tasks has no place for those of one; save "
                "the task's own TunedModel with them"
            )
        return CardDetails()

    def _write(self, folder: str | Path, name: str | None, details: CardDetails) -> None:
        write_collection(folder, self.arrangement.tasks, self.backbone, self._processors, name)

    @classmethod
    def _open(
        cls,
        source: str | Path,
        backbone: PreTrainedModel | nn.Module | None,
        any_weights: bool,
        place: Mapping[str, Any],
    ) -> Self:
        folder = find_collection(source, **place)
        adapters = read_collection(folder)
        if backbone is None:
            if not adapters:
                raise CheckpointError(f"{folder} has no tasks that would name their backbone; pass backbone=...")
            access = {name: place[name] for name in ("token", "cache_dir", "local_files_only")}
            backbone = load_recorded_backbone(next(iter(adapters.values())), **access)
        return cls(backbone)._filled(adapters, any_weights)

    def detach(self) -> PreTrainedModel:
        """Give the backbone back as it was before `combine`, and end this model (see `TunedModel.detach`)."""
        backbone = self.backbone
        self._hold.release(backbone)
        self._modules.clear()
        return backbone

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, task in self.arrangement.tasks.items():
            task.state_dict(destination=destination, prefix=f"{prefix}tasks.{name}.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *given)
        own = f"{prefix}tasks."
        found: dict[str, dict[str, Tensor]] = {name: {} for name in self.arrangement.tasks}
        for key in [key for key in state_dict if key.startswith(own)]:
            name = next((each for each in found if key.startswith(f"{own}{each}.")), None)
            if name is None:
                unexpected_keys.append(key)
                continue
            if key in unexpected_keys:
                unexpected_keys.remove(key)
            found[name][key.removeprefix(f"{own}{name}.")] = state_dict[key]
        for name, task in self.arrangement.tasks.items():
            try:
                result = task.load_state_dict(found[name], strict=False)
            except RuntimeError as error:
                error_msgs.append(str(error))
                continue
            missing_keys += [f"{own}{name}.{key}" for key in result.missing_keys]
            unexpected_keys += [f"{own}{name}.{key}" for key in result.unexpected_keys]

    def _apply(self, *arguments: Any, **options: Any) -> MultiTaskModel:
        super()._apply(*arguments, **options)
        tasks = {name: task._apply(*arguments, **options) for name, task in self.arrangement.tasks.items()}
        self.arrangement = Arrangement.of(Backbone(self.backbone), tasks)
        return self

    def __repr__(self) -> str:
        if "backbone" not in self._modules:
            return "MultiTaskModel(detached)"
        tasks = "".join(f"\n  {name}: {task.summary()}" for name, task in self.arrangement.tasks.items())
        return f"MultiTaskModel({len(self.tasks)} tasks on {type(self.backbone).__name__}{tasks}\n)"

    def __getstate__(self) -> dict[str, Any]:
        made = ("_structure", "_hooks")
        kept = {name: value for name, value in self.__dict__.items() if name not in made}
        return kept | {"arrangement": self.arrangement.tasks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold.join(self.backbone)
        self.arrangement = Arrangement.of(Backbone(self.backbone), state["arrangement"])
        self._structure, self._hooks = structure(self.backbone), HookWatch(self.backbone)


def _copied(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """Tasks for another arrangement: it moves their values, which passes of the present one may be reading."""
    return {name: copy.deepcopy(task) for name, task in tasks.items()}


def _as_output(task: Task, answer: Tensor) -> TaskOutput:
    if task.head is None:
        return BaseModelOutputWithPooling(pooler_output=answer)
    return ImageClassifierOutput(logits=answer)


@outside_graphs
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


class TaskSources:
    """Reads tasks for one backbone, whose fingerprint is taken once for all of them.

    Args:
        backbone: The backbone that the tasks must have been trained on.
        any_weights: Accept a backbone of the right shape with other weights.
    """

    def __init__(self, backbone: Backbone, *, any_weights: bool) -> None:
        self._backbone = backbone
        self._any_weights = any_weights

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        return fingerprint(self._backbone)

    def read(self, source: Any, known: Mapping[str, Task]) -> tuple[Task, Any]:
        """A task of its own, and its image processor.

        Args:
            source: The task's source.
            known: Tasks that it may extend.

        Raises:
            BackboneMismatchError: The task was trained on another backbone.
            CheckpointError: The folder is damaged, or a task that it extends is missing.
            ConfigError: The source is none.
        """
        if isinstance(source, TunedModel):
            self._check_model(source.backbone)
            return copy.deepcopy(source.task), source.processor
        if not isinstance(source, (str, Path, AdapterFolder)):
            raise ConfigError(
                f"got {type(source).__name__}, expected an adapter folder, an adapter's id on the Hub, or a TunedModel"
            )
        folder = source if isinstance(source, AdapterFolder) else read_folder(find_folder(source))
        own = None if self._any_weights else self._fingerprint
        check_backbone(folder, self._backbone, any_weights=self._any_weights, own=own)
        return make_task(folder, self._backbone, known), folder.processor

    def _check_model(self, model: PreTrainedModel) -> None:
        if model is self._backbone.model or self._any_weights:
            return
        other = Backbone(model)
        same_shape = other.describe() == self._backbone.describe()
        if not same_shape or not same_weights(fingerprint(other), self._fingerprint):
            raise BackboneMismatchError(
                f"it was wrapped around another {type(model).__name__}, of other shape or weights; "
                "combine adapters of one backbone (any_weights=True takes it nevertheless)"
            )


def combine(
    backbone: PreTrainedModel | nn.Module, tasks: Mapping[str, TaskSource], *, any_weights: bool = False
) -> MultiTaskModel:
    """Put adapters that were trained apart, on the same backbone, into one model.

    Example:
        >>> both = memtune.combine(backbone, {"pets": "pets-lora", "signs": "me/vit-signs-memory"})
        >>> sorted(both(pixel_values))
        ['pets', 'signs']

    Args:
        backbone: The backbone that all of them were trained on, one of transformers' or timm's.
        tasks: The adapters by the names that their tasks shall have: folders, ids on the Hub, or tuned models, of which
            a copy is taken.
        any_weights: Accept a backbone of the right shape with other weights than an adapter was trained on.

    Raises:
        ConfigError: There are no tasks, or a name is no name.
        BackboneMismatchError: An adapter was trained on another backbone; it is named.
        CheckpointError: An adapter folder is damaged; it is named.
    """
    if not isinstance(tasks, Mapping) or not tasks:
        raise ConfigError(f"tasks: got {tasks!r}, expected adapters by the names of their tasks, at least one")
    return MultiTaskModel(backbone)._filled(tasks, any_weights)
