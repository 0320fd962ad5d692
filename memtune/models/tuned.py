"""`TunedModel`: a frozen backbone and what is trained for one task."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import ModelOutput

from ..backbones import Backbone, Hold, HookWatch, as_pretrained, structure
from ..errors import ConfigError, InputError, MemtuneError, UnsupportedBackboneError
from ..storage import (
    STATE_KEY,
    CardDetails,
    check_backbone,
    find_folder,
    image_processor_of,
    load_recorded_backbone,
    make_task,
    read_folder,
    to_state,
    write_folder,
    write_peft_folder,
)
from ..streams import AdaptedStream, Pass, TaskStream, Trunk
from ..tasks import (
    AdaptedLane,
    Batch,
    HeadLane,
    Lane,
    MaskedLane,
    Task,
    check_images,
    head_lane_of,
    interpolates,
    lane_of,
    merge,
)
from .prediction import Classify, TaskScores
from .shared import SharedModel

if TYPE_CHECKING:
    from typing_extensions import Self

_DISABLED: ContextVar[frozenset[int]] = ContextVar("memtune_disabled", default=frozenset())
"""Ids of the models that answer as their backbones do in the present context."""


_COUNTING = threading.Lock()
"""Held while the contexts without an adapter are counted."""


class _Views(NamedTuple):
    """What a pass runs.

    Attributes:
        described: The backbone in blocks and roles.
        trunk: Its untouched pass, in masked mode.
        lane: The task's own.
        from_trunk: What answers from a pass of the trunk alone; None for an unmasked task that changes the backbone.
        made_for: What they were made for; where that is something else now, they are made anew.
        hooks: Notices that it may be so between two calls of `train` or `eval`, when users place hooks.
    """

    described: Backbone
    trunk: Trunk | None
    lane: MaskedLane | AdaptedLane
    from_trunk: MaskedLane | HeadLane | None
    made_for: Hashable
    hooks: HookWatch


class TunedModel(SharedModel):
    """A frozen backbone with what is trained for one task. Made by `wrap`, `load` or `from_pretrained`.

    `state_dict()` and the trainable parameters are the task's alone. `train()` leaves the backbone in evaluation mode.

    Example:
        >>> model = memtune.load("pets-lora")
        >>> model.predict("cat.jpg", top_k=1)[0]["label"] in ("cat", "dog")
        True

    Attributes:
        backbone: The model that was wrapped; its own forward is never changed.
        task: The parameters of the task and its labels.
        config: A copy of the backbone's configuration, with the task's labels unless the head is the backbone's.
        processor: The image processor, or None.
    """

    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True

    task: Task

    def __init__(self, backbone: PreTrainedModel | nn.Module, task: Task, processor: Any = None) -> None:
        super().__init__()
        self.backbone = backbone = as_pretrained(backbone)
        self.task = task
        self.processor = image_processor_of(processor)
        if processor is not None and (isinstance(processor, type) or not callable(self.processor)):
            raise ConfigError(
                f"processor: got {processor!r}, expected an image processor, such as "
                "AutoImageProcessor.from_pretrained(...)"
            )
        self.config: Any = copy.deepcopy(backbone.config)
        if not task.backbone_head:
            self.config.id2label = dict(enumerate(task.labels))
            self.config.problem_type = task.problem_type  # whatever the backbone's own head was for
            self.config.label2id = {label: index for index, label in enumerate(task.labels)}
        self._recompute: dict[str, Any] | None = None
        self._enabled = True
        self._disabling = 0  # contexts without the adapter, of any thread: torch.compile cannot look into a ContextVar
        self._loaded_prefix = ""
        self._views: _Views | None = None
        self._renew()  # first, as it refuses a backbone that has no view
        self._hold = Hold(backbone)
        self.task.to(device=backbone.device)
        self.register_state_dict_post_hook(drop_backbone)
        self.register_state_dict_post_hook(_add_description)
        self.register_load_state_dict_pre_hook(refuse_backbone)
        self.register_load_state_dict_post_hook(forgive_backbone)
        self.train(self._hold.was_training)

    def _renew(self) -> _Views:
        """Make the views anew if the backbone's modules, or what is asked of them, are others now.

        Values, devices and types need no new views: these have the tensors of the backbone and of the task. They are
        put in place when they are finished, so that other threads have the old ones or the new ones.
        """
        recompute = self._recompute if self.training else None
        made_for = structure(self.backbone), repr(recompute)
        views = self._views
        if views is None or views.made_for != made_for:
            described = Backbone(self.backbone)
            options = {} if self.task.masked else {"recompute": recompute, "whole_model": self.task.backbone_head}
            lane = lane_of(described, self.task, **options)
            from_trunk = lane if isinstance(lane, MaskedLane) else head_lane_of(described, self.task)
            trunk = None if from_trunk is None else Trunk(described)
            views = self._views = _Views(described, trunk, lane, from_trunk, made_for, HookWatch(self.backbone))
        elif views.hooks.rings():  # for hooks that are not of the backbone
            views = self._views = views._replace(hooks=HookWatch(self.backbone))
        return views

    @property
    def _current(self) -> _Views:
        """The views, made anew if hooks were placed on the backbone or removed from it."""
        views = self._views
        stale = views is None or (not torch.compiler.is_compiling() and views.hooks.rings())
        return self._renew() if views is None or stale else views

    @property
    def stream(self) -> AdaptedStream | TaskStream:
        """What a pass runs beside the trunk; another one when the views have been made anew."""
        return self._current.lane.stream

    @property
    def _trunk(self) -> Trunk | None:
        return self._current.trunk

    @property
    def _active(self) -> bool:
        """Whether the adapter is part of the answer in the present context."""
        return self._enabled and not (self._disabling and id(self) in _DISABLED.get())

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        trunk: Pass | None = None,
        **inputs: Any,
    ) -> ImageClassifierOutput | BaseModelOutputWithPooling | ModelOutput | tuple[Tensor, ...]:
        """Classify images by the task's labels; without a head, give their features; by the backbone's, its own output.

        Args:
            pixel_values: Images as the processor gives them, (batch, channels, height, width).
            labels: Indices of the right classes, (batch,); of a task of several classes an image, or of numbers, floats
                (batch, labels). The output then has the mean loss as `loss` (cross-entropy, binary cross-entropy, the
                squared error), in training with what the methods add to it. Where the head is the backbone's, what
                that takes as labels.
            interpolate_pos_encoding: Accept images of another size than the backbone's.
            return_dict: False for a plain tuple.
            trunk: What `trunk_pass` gave for the images, in their place (masked mode, or a head alone).
            inputs: What else the backbone's own forward takes, where the head is the backbone's.

        Returns:
            `logits` (batch, classes), and `loss` if labels were given; of an adapter without a head `pooler_output`
            (batch, width); where the head is the backbone's, the output of the backbone's class. Within
            `disable_adapter()`: the backbone's own output.

        Raises:
            InputError: The images or labels have the wrong shape, type, size, or range; or there are inputs that the
                head does not take.
            ConfigError: `trunk` was given to an unmasked model that changes the backbone, or within
                `disable_adapter()`; or `labels` without a head.
        """
        if self.task.backbone_head and trunk is None:
            options = {"labels": labels, "interpolate_pos_encoding": interpolate_pos_encoding or None}
            return self._run_backbone(pixel_values, inputs | options, return_dict)
        if inputs:
            raise InputError(f"got {sorted(inputs)}; a head that is not the backbone's takes pixel_values and labels")
        if trunk is not None:
            if not self._active:
                raise ConfigError("trunk: without its adapter the model reads images; pass pixel_values")
            return self._answer(self._from_trunk(), Batch(trunk), labels, return_dict)
        views = self._current
        described = views.described
        interpolate_pos_encoding = self._interpolates(pixel_values, asked=interpolate_pos_encoding)
        pixel_values = check_images(pixel_values, described, interpolate=interpolate_pos_encoding)
        if not self._active:
            options = {} if described.family.any_size else {"interpolate_pos_encoding": interpolate_pos_encoding}
            images_alone = self.backbone.main_input_name == "pixel_values"
            return (self.backbone if images_alone else described.tower)(pixel_values=pixel_values, **options)
        return self._answer(views.lane, self._batch(pixel_values, interpolate_pos_encoding), labels, return_dict)

    def _run_backbone(self, pixel_values: Any, inputs: dict[str, Any], return_dict: bool | None) -> Any:
        """The output of the backbone's own class, its head reading the adapted tower."""
        given = {name: value for name, value in inputs.items() if value is not None}
        interpolate = self._interpolates(pixel_values, asked="interpolate_pos_encoding" in given)
        if interpolate:
            given["interpolate_pos_encoding"] = True
        views = self._current
        pixel_values = check_images(pixel_values, views.described, interpolate=interpolate)
        if views.described.family.any_size:
            given.pop("interpolate_pos_encoding", None)
        if active := self._active:
            assert isinstance(views.lane, AdaptedLane)
            output = views.lane.stream.run_model(pixel_values, **given)
        else:
            output = self.backbone(pixel_values=pixel_values, return_dict=True, **given)
        penalty = self.task.penalty() if self.training and active else None
        if penalty is not None and output.get("loss") is not None:
            output["loss"] = output["loss"] + penalty
        return output.to_tuple() if return_dict is False else output

    def _interpolates(self, pixel_values: Any, *, asked: bool) -> bool:
        """Whether positions are interpolated: where it is asked, or where the task was trained so.

        Raises:
            InputError: The images are not of the size that the task was trained at.
        """
        size = self.task.image_size if self._active else None
        return interpolates(pixel_values, {} if size is None else {"": size}, asked=asked)

    def _batch(self, pixel_values: Tensor, interpolate: bool) -> Batch:
        """Images (batch, channels, height, width), which have been checked, with the trunk's pass in masked mode."""
        trunk = self._current.trunk
        if trunk is None or not self.task.masked:
            return Batch(Pass(), pixel_values, interpolate)
        current, _ = trunk.run(pixel_values, interpolate_pos_encoding=interpolate)
        return Batch(current, pixel_values, interpolate)

    @property
    def reads_trunk(self) -> bool:
        """Whether a pass of the trunk is all that it needs of an image: in masked mode, or with a head alone."""
        return self._current.from_trunk is not None

    def _from_trunk(self) -> MaskedLane | HeadLane:
        """The lane that answers from a pass of the trunk.

        Raises:
            ConfigError: The model is unmasked, and changes the backbone.
        """
        lane = self._current.from_trunk
        if lane is None:
            raise ConfigError(
                "trunk: got an unmasked model whose adapter changes the backbone, so that the untouched one's pass is "
                "not its own; pass pixel_values, or wrap with masked=True"
            )
        return lane

    def _answer(
        self, lane: Lane, batch: Batch, labels: Tensor | None, return_dict: bool | None
    ) -> ImageClassifierOutput | BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """The output of a lane for a batch."""
        answer = lane.run(batch).squeeze(1)  # logits (batch, classes), or without a head features (batch, width)
        if self.task.head is None and labels is None:
            pooled = BaseModelOutputWithPooling(pooler_output=answer)
            return pooled.to_tuple() if return_dict is False else pooled
        loss = None
        if labels is not None:
            self.task.require_head("labels")
            self.task.objective.check(labels, answer.shape[0], len(self.task.labels))
            loss = self.task.objective.loss(answer, labels)
            if self.training and (penalty := self.task.penalty()) is not None:
                loss = loss + penalty
        output = ImageClassifierOutput(loss=loss, logits=answer)
        return output.to_tuple() if return_dict is False else output

    def features(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> Tensor:
        """What the head reads of images (batch, channels, height, width): (batch, width).

        Raises:
            InputError: The images have the wrong shape, type or size.
        """
        views = self._current
        interpolate_pos_encoding = self._interpolates(pixel_values, asked=interpolate_pos_encoding)
        pixel_values = check_images(pixel_values, views.described, interpolate=interpolate_pos_encoding)
        return views.lane.features(self._batch(pixel_values, interpolate_pos_encoding)).squeeze(1)

    def _classifier(self, tasks: Sequence[str] | None) -> tuple[Classify, Any]:
        if tasks is not None:
            raise ConfigError(f"tasks: got {tasks!r}, but this model has one task")
        self.task.require_head("predict")
        self.require_adapter("predict")

        @torch.no_grad()
        def classify(pixel_values: Tensor) -> dict[str, TaskScores]:
            training = self.training
            try:
                output: Any = self.eval()(pixel_values) if training else self(pixel_values)
            finally:
                if training:
                    self.train()
            return {"": TaskScores(self.task, output.logits)}

        return classify, self.processor

    def trunk_pass(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> Pass:
        """The trunk's pass over images (batch, channels, height, width): the same whatever is trained.

        Raises:
            ConfigError: The model is unmasked, and changes the backbone.
            InputError: The images have the wrong shape, type or size.
        """
        self._from_trunk()
        views = self._current
        assert views.trunk is not None
        interpolate_pos_encoding = self._interpolates(pixel_values, asked=interpolate_pos_encoding)
        pixel_values = check_images(pixel_values, views.described, interpolate=interpolate_pos_encoding)
        return views.trunk.run(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)[0]

    def features_of(self, trunk: Pass) -> Tensor:
        """What the head reads, (batch, width), of images whose `trunk_pass` is there already.

        Raises:
            ConfigError: The model is unmasked, and changes the backbone.
        """
        return self._from_trunk().features(Batch(trunk)).squeeze(1)

    def train(self, mode: bool = True) -> TunedModel:
        """Set the adapter's mode. The frozen backbone stays in evaluation mode: no dropout, no stochastic depth."""
        self.training = mode
        self.task.train(mode)
        self.backbone.eval()
        self._renew()
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute blocks in the backward pass to save memory (masked mode has nothing to recompute).

        Args:
            activation_checkpointing_kwargs: Arguments of `torch.utils.checkpoint.checkpoint`.
            options: Those of the method of this name of transformers' models, such as `every_n_layers`.

        Raises:
            UnsupportedBackboneError: The backbone's class does not support it.
        """
        if not self.backbone.supports_gradient_checkpointing:
            raise UnsupportedBackboneError(
                f"{type(self.backbone).__name__} does not support activation checkpointing; train without it, with "
                "smaller batches or in mixed precision"
            )
        settings = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if settings["use_reentrant"]:
            raise ConfigError(
                "use_reentrant: got True, under which nothing in a block would get a gradient, as what enters the "
                "first one needs none; leave it out, or pass False"
            )
        self._recompute = {"kwargs": settings, **options}
        self._renew()

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._recompute = None
        self._renew()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    gradient_checkpointing_disable = activation_checkpointing_disable

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model answers as the untouched backbone does; in other threads as ever."""
        before = _DISABLED.set(_DISABLED.get() | {id(self)})
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)
            _DISABLED.reset(before)

    def require_adapter(self, what: str) -> None:
        """Raise `ConfigError`, which names what needs it, within `disable_adapter()`, where labels mean nothing."""
        if not self._active:
            raise ConfigError(f"{what}: within disable_adapter() the answers are the backbone's own; leave that first")

    def _count(self, more: int) -> None:
        with _COUNTING:
            self._disabling += more

    def merge(self) -> PreTrainedModel:
        """A plain Hugging Face model with this task in its weights (see `memtune.tasks.merge`); this one stays."""
        return merge(self.backbone, self.task)

    def export_peft(self, folder: str | Path) -> None:
        """Save an unmasked LoRA adapter as a folder that PEFT reads.

        `PeftModel.from_pretrained` loads it onto the backbone as `AutoModelForImageClassification` loads that with the
        task's `num_labels`, head included. Where there is no such class whose head reads what the task's reads, the
        folder is for the backbone's own class and has no head, and a warning says so.

        Args:
            folder: Where to; made if it is not there.

        Raises:
            ConfigError: Another mode or method; or the backbone has query, key and value in one layer.
            CheckpointError: The path is a file.
        """
        write_peft_folder(folder, self.task, self.backbone, self.processor)

    def detach(self) -> PreTrainedModel:
        """Give the backbone back as it was before `wrap`, and end this model.

        Returns:
            The backbone, with the parameters trainable that were so, and in the mode it was in; while another tuned
            model uses it, it stays frozen.
        """
        backbone = self.backbone
        self._hold.release(backbone)
        del self._views
        self._modules.clear()
        return backbone

    def trainable_parameters(self) -> dict[str, int]:
        """Trained values by part: each method's, `class_token`, `head`, their `total`, and the frozen `backbone`'s."""
        counts = {
            method: sum(parameter.numel() for parameter in adapter.parameters())
            for method, adapter in zip(self.task.methods, self.task.adapters, strict=True)
        }
        counts["class_token"] = 0 if self.task.class_token is None else self.task.class_token.numel()
        counts["head"] = 0 if self.task.head is None else sum(each.numel() for each in self.task.head.parameters())
        counts["total"] = sum(counts.values())
        return counts | {"backbone": sum(parameter.numel() for parameter in self.backbone.parameters())}

    def print_trainable_parameters(self) -> None:
        """Print the number of trained values beside that of all values, in PEFT's words."""
        counts = self.trainable_parameters()
        trained, total = counts["total"], counts["total"] + counts["backbone"]
        share = 100 * trained / total
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")  # noqa: T201

    def __repr__(self) -> str:
        if "backbone" not in self._modules:
            return "TunedModel(detached)"
        counts = self.trainable_parameters()
        kind = type(self.backbone).__name__
        return f"TunedModel({self.task.summary()}; {counts['total']:,} values on {kind} with {counts['backbone']:,})"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("backbone", "task", "_views"):
                raise MemtuneError("this model has been detached from its backbone; wrap the backbone again") from None
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._views, self._disabling = None, 0
        self._hold.join(self.backbone)

    def _replicate_for_data_parallel(self) -> TunedModel:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[operator]
        replica._views = None  # those of the replica's own tensors are made when these are there
        replica._enabled = self._active  # the threads of nn.DataParallel have contexts of their own
        return replica

    def _write(self, folder: str | Path, name: str | None, details: CardDetails) -> None:
        write_folder(folder, self.task, self.backbone, self.processor, name, details)

    @classmethod
    def _open(
        cls,
        source: str | Path,
        backbone: PreTrainedModel | nn.Module | None,
        any_weights: bool,
        place: Mapping[str, Any],
    ) -> Self:
        adapter = read_folder(find_folder(source, **place))
        if backbone is None:
            access = {name: place[name] for name in ("token", "cache_dir", "local_files_only")}
            backbone = load_recorded_backbone(adapter, **access)
        described = Backbone(backbone)
        check_backbone(adapter, described, any_weights=any_weights)
        tuned = cls(backbone, make_task(adapter, described), processor=adapter.processor)
        tuned.train(False)
        return tuned


def drop_backbone(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The state of a tuned model is the task's: the frozen backbone is saved by whoever owns it."""
    for key in [key for key in state if key.startswith(f"{prefix}backbone.")]:
        del state[key]


def _add_description(module: TunedModel, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Where a tuned model's state is a file's, the file says what an adapter folder says: Trainer saves no more.

    Within other modules' states (DistributedDataParallel's) it is left out, as it is where the backbone is in shards.
    """
    in_shards = any(hasattr(each, "full_tensor") or hasattr(each, "ds_id") for each in module.backbone.parameters())
    if not prefix and not in_shards:
        state |= to_state(module.task, module.backbone, module.processor)


def refuse_backbone(module: Any, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
    """The frozen backbone's values never come from a state; keeps the state's prefix, for `forgive_backbone`."""
    module._loaded_prefix = prefix
    state.pop(f"{prefix}{STATE_KEY}", None)
    if given := [key for key in state if key.startswith(f"{prefix}backbone.")]:
        drop_backbone(module, state, prefix, None)
        warnings.warn(
            f"the state has {len(given)} tensors of a backbone ({given[0]}, ...), which are left out: load them into "
            "the backbone itself before it is wrapped, if they are its own",
            stacklevel=3,
        )


def forgive_backbone(module: Any, incompatible: Any) -> None:
    """A state without the backbone lacks nothing."""
    frozen = f"{module._loaded_prefix}backbone."
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith(frozen)]


load = TunedModel.from_pretrained
