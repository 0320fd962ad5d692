"""`pipeline()`: a model as one of transformers' pipelines, from image files to labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ImageClassificationPipeline
from transformers.image_utils import load_image

from ..backbones import Backbone
from ..errors import ConfigError
from ..storage import decode
from .multitask import MultiTaskModel
from .tuned import TunedModel

_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}
"""What `function_to_apply` can be."""

_KEY = "logits of "
"""Before a task's name among the outputs of a pass, some names of which have a meaning of their own to a pipeline."""


def pipeline(
    model: TunedModel | MultiTaskModel,
    *,
    image_processor: Any = None,
    device: torch.device | str | int | None = None,
    **options: Any,
) -> TaskPipeline:
    """A pipeline that takes images as `transformers.pipeline("image-classification")` does, and answers as it does.

    It is called with a path, a URL, a PIL image, a list of these, a generator, or a `torch.utils.data.Dataset` of them.
    For a tuned model it gives for each image a list of {"label", "score"}, the best first; for a model of many tasks a
    dictionary of such lists by task, all of them from one pass.

    Example:
        >>> classify = memtune.pipeline(memtune.load("pets-lora"))
        >>> len(classify("cat.jpg"))
        2

    Args:
        model: The model; it is put in evaluation mode.
        image_processor: The image processor; by default the one that the model's tasks brought along.
        device: Where to run; by default where the model is.
        options: Those of transformers' pipeline: `batch_size`, `num_workers`, `top_k`, `function_to_apply`, `timeout`;
            for many tasks also `tasks`, those to answer. All but the first two can also be given in each call.

    Raises:
        ConfigError: It is no such model, it has no tasks or no head, or no image processor can be told from its tasks.
    """
    if not isinstance(model, (TunedModel, MultiTaskModel)):
        raise ConfigError(f"model: got {type(model).__name__}, expected a TunedModel or a MultiTaskModel")
    if isinstance(model, MultiTaskModel) and not model.tasks:
        raise ConfigError("model: got a model without tasks; add one first")
    if isinstance(model, TunedModel):
        model.task.require_head("pipeline")
    elif "tasks" not in options:
        model.check_labelled(list(model.tasks))
    if image_processor is None:
        image_processor = model.processor if isinstance(model, TunedModel) else model.shared_processor()
    if not callable(image_processor):
        raise ConfigError(
            f"image_processor: got {image_processor!r}; pass one, such as AutoImageProcessor.from_pretrained(...)"
        )
    kind = TaskPipeline if isinstance(model, TunedModel) else MultiTaskPipeline
    return kind(
        model=model.eval(),
        image_processor=image_processor,
        task="image-classification",
        device=model.device if device is None else device,
        **options,
    )


class TaskPipeline(ImageClassificationPipeline):
    """transformers' pipeline for image classification, around a `TunedModel`. Made by `pipeline`."""

    def check_model_type(self, supported_models: Any) -> None:
        """Accept memtune's models, which transformers' own list does not name."""

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:
        """What the model takes of an image: of a file here, or a PIL image, read as in training."""
        if isinstance(image, Image.Image) or (isinstance(image, str) and Path(image).is_file()):
            model: Any = self.model
            image = decode(image, Backbone(model.backbone).channels)
        else:
            image = load_image(image, timeout=timeout)
        assert self.image_processor is not None
        inputs: Any = self.image_processor(images=image, return_tensors="pt")
        return inputs.to(self.model.dtype)


class MultiTaskPipeline(TaskPipeline):
    """The same around a `MultiTaskModel`, which gives for each image a list of labels and scores by task."""

    model: Any

    def _sanitize_parameters(
        self, top_k: int | None = None, function_to_apply: Any = None, timeout: Any = None, tasks: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        before, _, after = super()._sanitize_parameters(top_k, function_to_apply, timeout)
        if tasks is not None:
            self.model.check_labelled(tasks)
        return before, {} if tasks is None else {"tasks": tasks}, after

    def _forward(self, model_inputs: Any, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        return {_KEY + name: answer.logits for name, answer in self.model(**model_inputs, tasks=tasks).items()}

    def postprocess(self, model_outputs: dict[str, Tensor], function_to_apply: Any = None, top_k: int = 5) -> Any:
        """Labels and scores by task, for the logits (1, classes) of one image."""
        given = None if function_to_apply is None else _SCORES[function_to_apply.value]
        tasks = self.model.arrangement.tasks
        answers: dict[str, list[dict[str, Any]]] = {}
        for key, logits in model_outputs.items():
            name = key.removeprefix(_KEY)
            scores_of = given or tasks[name].objective.scores
            scores, places = scores_of(logits[0].float()).topk(min(top_k, logits.shape[-1]))
            found = zip(places.tolist(), scores.tolist(), strict=True)
            answers[name] = [{"label": tasks[name].labels[place], "score": score} for place, score in found]
        return answers
