"""Models as graphs of torch.export and ONNX, with an output of its own for each task.

A graph has the backbone's pass once, and what the chosen tasks add to it. Their names are those of its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..backbones import Backbone, shadow_config
from ..errors import ConfigError, MemtuneError
from ..tasks import AdaptedLane, Arrangement, Batch, Task, check_images, check_task_names
from .multitask import MultiTaskModel
from .tuned import TunedModel

INPUT = "pixel_values"
"""What a graph's input is called."""

BASE = "base"
"""What the output of the backbone itself is called."""

LOGITS = "logits"
"""What the output of a tuned model, which has one task without a name, is called."""


def export_program(
    model: MultiTaskModel | TunedModel,
    *,
    tasks: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    dynamic_batch: bool = True,
) -> ExportedProgram:
    """Trace a model by torch.export.

    `program.module()(pixel_values)` gives a dictionary: `base`, the backbone's own logits or, where it has no head, the
    feature that a head would read; and for each task its logits, (batch, classes), by its name (`logits` for a tuned
    model). The model stays as it is; what is trained or added later does not reach the program.

    Example:
        >>> from memtune.export import export_program
        >>> program = export_program(memtune.load("pets-lora"))
        >>> program.module()(pixel_values)["logits"].shape
        torch.Size([4, 2])

    Args:
        model: The model.
        tasks: The tasks of a multi-task model to answer; None for all of them.
        image_size: Height and width of the images in pixels; by default those that the tasks were trained at.
        dynamic_batch: Take batches of any size; otherwise of one image.

    Raises:
        ConfigError: A task is unknown, or has a name that an input or output has; or the image size is none.
        InputError: The backbone takes no images of this size, or `tasks` names one twice.
    """
    graph = _Graph(model, _chosen(model, tasks), image_size)
    shapes = {INPUT: {0: Dim("batch")} if dynamic_batch else None}
    # Of one image torch.export would take the 1 for a constant.
    images = graph.images(2 if dynamic_batch else 1)
    with torch.no_grad():
        return torch.export.export(graph, (images,), dynamic_shapes=shapes, strict=False)


def export_onnx(
    model: MultiTaskModel | TunedModel,
    path: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    dynamic_batch: bool = True,
    **options: Any,
) -> None:
    """Write a model as an ONNX file, with the input `pixel_values` and the outputs of `export_program`.

    Args:
        model: The model.
        path: The file. One of more than 2 GB gets its weights in a second file, `<path>.data`.
        tasks: As for `export_program`.
        image_size: The same.
        dynamic_batch: The same.
        options: Further arguments of `torch.onnx.export`, such as `opset_version`.

    Raises:
        MemtuneError: The packages onnx and onnxscript are missing, or the path's folder is.
        ConfigError: As for `export_program`.
        InputError: The same.
    """
    _check_onnx(Path(path))
    program = export_program(model, tasks=tasks, image_size=image_size, dynamic_batch=dynamic_batch)
    program = program.run_decompositions({torch.ops.aten.repeat_interleave.self_int: _repeat})
    outputs = program.call_spec.out_spec
    assert outputs is not None
    names = list(outputs.unflatten(range(outputs.num_leaves)))
    size = sum(tensor.nbytes for tensor in [*program.state_dict.values(), *program.constants.values()])
    settings: dict[str, Any] = {"external_data": size > _MOST_BYTES, "verbose": False, "dynamo": True} | options
    torch.onnx.export(program, (), str(path), input_names=[INPUT], output_names=names, **settings)


def _repeat(states: Tensor, repeats: int, dim: int | None = None, *, output_size: int | None = None) -> Tensor:
    """`repeat_interleave`, which onnxscript 0.7 gets wrong where the number is that of the images."""
    states, dim = (states.flatten(), 0) if dim is None else (states, dim % states.ndim)
    sizes = [*states.shape[: dim + 1], repeats, *states.shape[dim + 1 :]]
    return states.unsqueeze(dim + 1).expand(sizes).flatten(dim, dim + 1)


_MOST_BYTES = 2**31 - 2**26
"""The size of a file of protocol buffers is limited to 2 GB; some of it is the graph's."""


def _check_onnx(path: Path) -> None:
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise MemtuneError(
            f"ONNX files are written by {' and '.join(missing)}, not installed: pip install memtune[onnx]"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise MemtuneError(f"got {path}, expected the path of a file in a folder that is there")


def _chosen(model: MultiTaskModel | TunedModel, names: Sequence[str] | None) -> dict[str, Task]:
    """The tasks to export by the names of their outputs."""
    if isinstance(model, TunedModel):
        if names is not None:
            raise ConfigError(f"tasks: got {names!r}, but a tuned model has one task only; leave it out")
        model.task.require_head("export")
        return {LOGITS: model.task}
    if not isinstance(model, MultiTaskModel):
        raise ConfigError(f"got {type(model).__name__}, expected a MultiTaskModel or a TunedModel")
    known = model.arrangement.tasks
    asked = list(known) if names is None else names
    check_task_names("tasks", asked, known)
    if taken := sorted({BASE, INPUT} & set(asked)):
        raise ConfigError(f"tasks: the graph itself has something called {taken[0]!r}; give the task another name")
    for name in asked:
        known[name].require_head(f"export of the task {name!r}")
    return {name: known[name] for name in asked}


class _Graph(nn.Module):
    """What is traced: images -> the outputs by name.

    Args:
        model: The model.
        tasks: The tasks to answer, by the names of their outputs.
        image_size: Height and width of the images; None for the backbone's.
    """

    def __init__(
        self, model: MultiTaskModel | TunedModel, tasks: Mapping[str, Task], image_size: tuple[int, int] | None
    ) -> None:
        super().__init__()
        backbone = Backbone(model.backbone)
        self._size = _check_size(image_size, backbone, tasks)
        self._interpolate = not backbone.family.any_size and self._size != backbone.image_size
        arrangement = Arrangement.of(backbone, tasks)
        self._trunk, self._lanes = arrangement.trunk, arrangement.lanes
        for lane in self._lanes:
            lane.begin()
        self._classes = {name: len(task.labels) for name, task in tasks.items()}
        if backbone.family.attention_function:
            for view in (
                self._trunk.view,
                *(lane.stream.view for lane in self._lanes if isinstance(lane, AdaptedLane)),
            ):
                _leave_out_masks(view)
        # Registered, so that the views' tensors are the program's parameters; without a text tower, which is not run.
        self.backbone = backbone.model if backbone.model.main_input_name == INPUT else backbone.tower
        check_images(self.images(1), backbone, interpolate=self._interpolate)
        self.eval()

    def images(self, number: int) -> Tensor:
        """Blank images to trace with."""
        view = self._trunk.view
        model = view.model
        return torch.zeros(number, view.channels, *self._size, dtype=model.dtype, device=model.device)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        current, output = self._trunk.answer(pixel_values, interpolate_pos_encoding=self._interpolate)
        batch = Batch(current, pixel_values, self._interpolate)
        answers: dict[str, Tensor] = {}
        for lane in self._lanes:
            logits = lane.run(batch)
            answers |= {name: logits[:, number, : self._classes[name]] for name, number in lane.numbers.items()}
        base = getattr(output, "logits", None)
        base = current.query if base is None else base
        return ({} if base is None else {BASE: base}) | {name: answers[name] for name in self._classes}


def _check_size(size: Any, backbone: Backbone, tasks: Mapping[str, Task]) -> tuple[int, int]:
    if size is None:
        trained = {task.image_size or backbone.image_size for task in tasks.values()}
        if len(trained) > 1:
            raise ConfigError(
                f"image_size: the tasks were trained at the sizes {sorted(trained)}; say which to export for"
            )
        return trained.pop() if trained else backbone.image_size
    if not isinstance(size, Sequence) or len(size) != 2 or not all(type(each) is int and each > 0 for each in size):
        raise ConfigError(f"image_size: got {size!r}, expected height and width in pixels, or None")
    return size[0], size[1]


def _leave_out_masks(view: Backbone) -> None:
    """Let a view's tower make no mask that hides nothing.

    Transformers leaves it out too, but not while a graph is traced: there SDPA gets a boolean one, which BEiT adds to
    its numbers. A tower whose attention function is not known to make masks gets none. What the attention modules call
    in the end, their sites know.
    """
    attention = [block["attention"] for block in view.blocks]
    for module in view.tower.modules():
        config = module.__dict__.get("config")
        if config is not None and module not in attention:
            module.config = shadow_config(config)
            module.config._attn_implementation_internal = "memtune_trunk"
