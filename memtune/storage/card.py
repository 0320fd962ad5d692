"""The README.md of an adapter folder: metadata that the Hub understands, and a text for people."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from ..errors import ConfigError

_TASKS: list[tuple[Mapping[Any, Any], str]] = [
    (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "image-classification"),
    (auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, "image-segmentation"),
    (auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES, "image-segmentation"),
    (auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES, "image-segmentation"),
    (auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, "object-detection"),
    (auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES, "depth-estimation"),
    (auto.MODEL_FOR_IMAGE_TO_IMAGE_MAPPING_NAMES, "image-to-image"),
    (auto.MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES, "visual-question-answering"),
    (auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES, "zero-shot-image-classification"),
]
"""The Hub's word for what the classes of transformers with a head of their own are for."""
_LABELS_SHOWN = 20
_TRAINING = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("optim", "learning_rate", "weight_decay", "momentum", "warmup_ratio", "lr_scheduler_type", "max_grad_norm"),
    *("label_smoothing_factor", "mixed_precision", "image_size", "seed"),
)
"""The settings of a training that a card shows; others may be paths of a machine, or say nothing about the adapter."""

_MODES = {
    False: "unmasked: the adapter changes what all tokens of the backbone see",
    True: "masked: a token of the task reads the backbone without being seen by it, so that the backbone's own answer "
    "stays and tasks can share its pass",
}

_TEXT = """\
# {title}

A memtune adapter ({methods}; {mode}).
It puts {parameters:,} trained values on a frozen {family} backbone{backbone}, whose own weights are not in here.

## Use

```python
{usage}
```

{answers}
{results}{training}
## Limits

{closed}- It works on the backbone that it was trained on and on no other; memtune compares the weights before it loads.
{extends}- {measured}
"""

_USAGE = """\
{imports}

{model}
{pixel_values}
with torch.no_grad():
    {answer}
print({shown})"""

_PREDICT = """\
{imports}

{model}
print(model.predict("image.jpg"{tasks}))  # or a folder, a list of files, PIL images"""

_FEATURES = """\
## Features

It has no head and no classes: it gives the features of an image, for a head of your own."""

_TITLES = {
    None: "## Classes",
    "multi_label_classification": "## Classes\n\nAny number of them may be in an image.",
    "regression": "## Numbers\n\nIt gives numbers, no classes.",
}

_BACKBONE_HEAD = """\
## Output

It has no head and no classes of its own: the head of the backbone, a `{model_class}`, reads the adapted tower, \
and the output is that class's."""

_PROCESSED = """\
image = Image.open("image.jpg").convert("RGB")
pixel_values = model.processor(image, return_tensors="pt").pixel_values"""

_NO_NAME = "path/to/the/backbone"


@dataclass(frozen=True)
class CardDetails:
    """What a card says that the adapter's own files do not know.

    Args:
        results: Names of metrics and their values, as `memtune.evaluate` gives them.
        datasets: Ids of the data sets on the Hub that the adapter was trained on; the results are those of the first.
        training: The `TrainingConfig` or `transformers.TrainingArguments` that it was trained with.
        repo_id: Where it is on the Hub.

    Raises:
        ConfigError: A result is no finite number, or a data set has no id.
    """

    results: Mapping[str, float] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    training: Any = None
    repo_id: str | None = None

    def __post_init__(self) -> None:
        results = {re.sub(r"[<>|`\s]+", " ", name.removeprefix("eval_")): v for name, v in (self.results or {}).items()}
        object.__setattr__(self, "results", results)
        object.__setattr__(self, "datasets", [self.datasets] if isinstance(self.datasets, str) else [*self.datasets])
        for name, value in self.results.items():
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ConfigError(f"results: {name} is {value!r}, expected a finite number")
        for name in self.datasets:
            if not _is_id(name):
                raise ConfigError(f"datasets: got {name!r}, expected the id of a data set on the Hub")


def public_name(name: str | None) -> str | None:
    """A name if it can be that of a model on the Hub (`user/name`); None for a folder of this machine."""
    return name if name and name.count("/") == 1 and _is_id(name) and not Path(name).exists() else None


def hub_name(model: PreTrainedModel) -> str | None:
    """The name of a model that was loaded from the Hub; None where the name may be that of a folder.

    transformers does not say where a model came from. One of the Hub is in huggingface_hub's cache.
    """
    name = public_name(model.name_or_path)
    if name is None:
        return None
    of_timm = getattr(model.config, "pretrained_cfg", None) or {}
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    return name if cached.is_dir() or of_timm.get("hf_hub_id") == name else None


def _is_id(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def write_card(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base_model: str | None = None,
    details: CardDetails | None = None,
) -> str:
    """The card of an adapter. No path of this machine stands in it.

    Args:
        config: The adapter's configuration file.
        tensors: Its tensors.
        base_model: The backbone's name on the Hub, if it has one.
        details: What else it says.
    """
    details = details or CardDetails()
    methods, labels, backbone = [method["method"] for method in config["methods"]], config["labels"], config["backbone"]
    title = " + ".join(methods) + " adapter" + (f" for {base_model}" if base_model else "")
    text = _TEXT.format(
        title=title,
        methods=" + ".join(methods),
        mode=_MODES[config["masked"]],
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        family=backbone["family"],
        backbone=f", [{base_model}](https://huggingface.co/{base_model})" if base_model else "",
        usage=_usage(config, base_model, details),
        answers=_answers(config),
        closed="- It answers with one of these classes whatever the image shows.\n"
        if labels and not config.get("problem_type")
        else "",
        results=_table(
            "Results", ("metric", "value"), {name: f"{value:.4g}" for name, value in details.results.items()}
        ),
        training=_table("Training", ("setting", "value"), _settings(details.training)),
        extends=_extends(config),
        measured="Images of another kind than those of the results were not measured."
        if details.results
        else "How well it does was not recorded.",
    )
    return str(ModelCard(f"---\n{_metadata(config, details, base_model, title).to_yaml()}\n---\n\n{text}"))


def _answers(config: Mapping[str, Any]) -> str:
    labels = config["labels"]
    if labels:
        return f"{_TITLES[config.get('problem_type')]}\n\n{len(labels)}: {_list_labels(labels)}"
    return _BACKBONE_HEAD.format(model_class=config["backbone"]["model_class"]) if config.get("head") else _FEATURES


def _task(config: Mapping[str, Any]) -> str:
    """The Hub's word for what an adapter does."""
    if config["labels"]:
        return "image-classification"
    if config.get("head"):
        for classes, task in _TASKS:
            one_or_several = [[each] if isinstance(each, str) else each for each in classes.values()]
            if any(config["backbone"]["model_class"] in several for several in one_or_several):
                return task
    return "image-feature-extraction"


def _metadata(config: Mapping[str, Any], details: CardDetails, base_model: str | None, title: str) -> ModelCardData:
    task = _task(config)
    scores = {name: value for name, value in details.results.items() if name != "loss"}
    dataset = details.datasets[0] if details.datasets else "unknown"
    results = [
        EvalResult(
            task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=name, metric_value=float(value)
        )
        for name, value in scores.items()
    ]
    mode = ["masked"] if config["masked"] else []
    return ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        datasets=list(details.datasets) or None,
        eval_results=results or None,
        library_name="memtune",
        metrics=list(scores) or None,
        model_name=title if results else None,
        pipeline_tag=task,
        tags=["memtune", *(method["method"] for method in config["methods"]), *mode],
    )


def _usage(config: Mapping[str, Any], base_model: str | None, details: CardDetails) -> str:
    """Python that runs as it stands: beside the folder's files, or anywhere once the adapter is on the Hub."""
    recorded, model_class = config["backbone"]["name_or_path"], config["backbone"]["model_class"]
    backbone = f"{model_class}.from_pretrained({json.dumps(base_model or _NO_NAME)})"
    source, earlier = json.dumps(details.repo_id or "."), list(config.get("extends", ()))
    imports, from_transformers = ["import memtune", "import torch"], []
    if earlier:
        tasks = ", ".join([f'{json.dumps(name)}: "path/to/it"' for name in earlier] + [f'"this": {source}'])
        model = f"model = memtune.combine({backbone}, {{{tasks}}})"
        logits, labels = 'model(pixel_values, tasks=["this"])["this"].logits', 'model.tasks["this"]'
    else:
        model = f"model = memtune.load({source}{'' if recorded else f', backbone={backbone}'})"
        logits, labels = "model(pixel_values).logits", "model.config.id2label"
    if earlier or not recorded:
        from_transformers.append(model_class)
    if config["processor"] and config["labels"]:
        imports = ["import memtune"] + ([f"from transformers import {model_class}"] if from_transformers else [])
        tasks = ', tasks=["this"]' if earlier else ""
        return _PREDICT.format(imports="\n".join(imports), model=model, tasks=tasks)
    if config["processor"]:
        imports.append("from PIL import Image")
    if from_transformers:
        imports.append(f"from transformers import {', '.join(sorted(from_transformers))}")
    size = ", ".join(str(number) for number in (1, config["backbone"]["channels"], *config["backbone"]["image_size"]))
    random = f"pixel_values = torch.rand({size})  # an image as the backbone's processor gives it"
    answer, shown = f"logits = {logits}", f"{labels}[logits.argmax().item()]"
    if config.get("problem_type"):
        sigmoid = ".sigmoid()" if config["problem_type"] == "multi_label_classification" else ""
        names = labels if earlier else f"{labels}.values()"
        shown = f"dict(zip({names}, logits[0]{sigmoid}.tolist()))"
    if config.get("head"):
        answer, shown = "output = model(pixel_values)", "list(output)"
    elif not config["labels"]:
        answer, shown = "features = model(pixel_values).pooler_output", "features.shape"
    return _USAGE.format(
        imports="\n".join(imports),
        model=model,
        pixel_values=_PROCESSED if config["processor"] else random,
        answer=answer,
        shown=shown,
    )


def _extends(config: Mapping[str, Any]) -> str:
    names = ", ".join(f"`{_one_line(name)}`" for name in config.get("extends", ()))
    return f"- It reads other tasks ({names}), and works together with them only.\n" if names else ""


def _list_labels(labels: Sequence[str]) -> str:
    shown = ", ".join(f"`{_one_line(label)}`" for label in labels[:_LABELS_SHOWN])
    more = len(labels) - _LABELS_SHOWN
    return f"{shown} and {more:,} more, all in `adapter_config.json`" if more > 0 else shown


def in_code(text: str) -> str:
    """A name in a table: as it is if it is plain, else where it can do nothing."""
    return text if re.fullmatch(r"[\w .-]+", text) else "`" + _one_line(text).replace("|", "\\|") + "`"


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _settings(training: Any) -> dict[str, str]:
    """The settings that a training has, enumerations by their values."""
    values = {name: getattr(training, name, None) for name in _TRAINING}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    return {name: str(value) for name, value in values.items() if value is not None}


def _table(title: str, header: tuple[str, str], rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    lines = [f"| {in_code(name)} | {value} |" for name, value in {header[0]: header[1], "---": "---", **rows}.items()]
    return "\n".join(["", f"## {title}", "", *lines, ""])
