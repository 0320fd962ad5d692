"""What the commands of `memtune.cli` do: each takes the parsed arguments and gives a result, and prints nothing."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from ..data import load_folder
from ..drawing import check_picture, draw_sheet, new_figure
from ..errors import CheckpointError, ConfigError, InputError
from ..evaluation import EvaluationReport
from ..evaluation import evaluate as evaluate_model
from ..evaluation import inspect_data as look_at_data
from ..explaining import explain as explain_image
from ..models import MultiTaskModel, Prediction, TableWriter, TunedModel, caption, export_onnx, export_program, lines_of
from ..models import combine as combine_tasks
from ..preparation import TrainingConfig
from ..storage import (
    FORMAT_VERSION,
    AdapterFolder,
    decode,
    find_folder,
    is_collection,
    list_adapters,
    load_recorded_backbone,
    read_collection,
    read_folder,
    sized,
)
from ..trunk_cache import find_damaged, list_folders
from ..trunk_cache import prune as prune_cache
from . import finetuning, sequences, sweeping
from .terminal import visible

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a command found.

    Attributes:
        values: As JSON values.
        text: For people; nothing in a process that is one of several, but not the main one.
        exit_code: That of the process.
    """

    values: Any
    text: str
    exit_code: int = 0


def finetune(options: Namespace) -> Result:
    """Train an adapter on a folder of images, with one folder for each class, or on a data set of the Hub.

    The adapter, its card, its learning curves and all_results.json go to --output_dir, with checkpoints to go on from.
    Several GPUs: accelerate launch -m memtune finetune ...
    """
    summary = finetuning.run(options, options.command)
    return Result(None, "") if summary is None else Result(summary, finetuning.describe(summary, options.output_dir))


def sweep(options: Namespace) -> Result:
    """Search for settings on a folder of images, and train the best with some seeds."""
    result = sweeping.run(options)
    return Result(None, "") if result is None else Result(result.to_dict(), str(result))


def continual(options: Namespace) -> Result:
    """Learn classes that come in tasks, one after the other."""
    result = sequences.run(options, options.command)
    return Result(None, "") if result is None else Result(result.metrics(), sequences.describe(result))


def inspect(options: Namespace) -> Result:
    """Show the methods, mode, labels, counts and backbone of an adapter.

    A folder that cannot be loaded is reported with what is wrong with it, and the exit code is 1.
    """
    folder = find_folder(options.adapter)
    try:
        adapter = read_folder(folder)
    except CheckpointError as error:
        return Result({"adapter": options.adapter, "problem": str(error)}, f"{options.adapter}: {error}", exit_code=1)
    backbone = adapter.backbone
    values = {
        "adapter": options.adapter,
        "format_version": FORMAT_VERSION,
        "methods": [config.to_dict() for config in adapter.configs],
        "mode": "masked" if adapter.masked else "unmasked",
        "labels": adapter.labels,
        "problem_type": adapter.problem_type if adapter.labels else None,
        "head": "backbone" if adapter.backbone_head else "linear" if adapter.labels else None,
        "extends": list(adapter.extends),
        "trained_values": sum(tensor.numel() for tensor in adapter.tensors.values()),
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "backbone": {name: value for name, value in backbone.items() if not name.endswith("fingerprint")},
        "fingerprint": backbone["fingerprint"],
        "processor": adapter.processor is not None,
    }
    return Result(values, _describe(values))


def _describe(values: dict[str, Any]) -> str:
    methods = [
        f"{config['method']} ({', '.join(f'{key}={value}' for key, value in config.items() if key != 'method')})"
        for config in values["methods"]
    ]
    labels = values["labels"]
    backbone = values["backbone"]
    none = f"the head of {backbone['model_class']} reads it" if values["head"] else "it gives features"
    more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
    rows = {
        "adapter": f"{values['adapter']} (format {values['format_version']}, {values['bytes']:,} bytes)",
        "methods": " + ".join(methods) or "head alone",
        "mode": values["mode"] + (f", extends {', '.join(values['extends'])}" if values["extends"] else ""),
        "labels": f"{len(labels)}: {', '.join(labels[:8])}{more}" if labels else f"none: {none}",
        "trained values": f"{values['trained_values']:,}",
        "backbone": f"{backbone.get('name_or_path') or 'no name'} ({backbone['family']}, {backbone['depth']} blocks)",
        "processor": "saved with it" if values["processor"] else "none",
        "fingerprint": values["fingerprint"]["values"][:24] + "...",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {visible(value)}" for name, value in rows.items())


def inspect_data(options: Namespace) -> Result:
    """Look at a folder of images before training on it."""
    validation = None if options.validation_dir is None else load_folder(options.validation_dir)
    model = None
    if options.adapter is not None:
        model = TunedModel.from_pretrained(options.adapter, _load_backbone(options.backbone))
    if options.picture:
        check_picture(options.picture, "--picture")
        if model is None:
            raise ConfigError("--picture: it shows what a model sees; name one by --adapter")
    report = look_at_data(options.folder, validation=validation, model=model, max_images=options.max_images)
    if options.picture:
        report.draw(options.picture)
    return Result(report.to_dict(), str(report), exit_code=1 if report.problems else 0)


def predict(options: Namespace) -> Result:
    """Classify images by the labels of each adapter, all of them in one pass over an image.

    Images that cannot be read are named, and the exit code is 1; the others are answered all the same.
    """
    for name in ("top_k", "batch_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}: got {getattr(options, name)}, expected 1 or more")
    if options.sheet:
        check_picture(options.sheet, "--sheet")
    if options.output and not Path(options.output).parent.is_dir():
        raise ConfigError(f"--output: got {options.output!r}, but there is no folder {Path(options.output).parent}")
    model, processor = _load_model(options)
    if without := [name for name, own in model.tasks.items() if not own]:
        raise ConfigError(f"--adapter: {without} have no labels to predict: they give features")
    if options.image_size is not None:
        processor = sized(processor, options.image_size)
    found = model.predict_each(
        options.images,
        top_k=options.top_k,
        batch_size=options.batch_size,
        on_error="skip",
        image_processor=processor,
    )
    answered = _answered(found, options)
    if not answered.count:
        raise InputError("; ".join(answered.problems))
    for problem in answered.problems:
        logger.error("%s", problem)
    if options.sheet:
        draw_sheet([(decode(each.image), caption(each.image, each.tasks)) for each in answered.drawn], options.sheet)
    values: Any = [
        {
            "image": each.image,
            "tasks": {name: [(best["label"], best["score"]) for best in own] for name, own in each.tasks.items()},
        }
        for each in answered.kept
    ]
    text = "\n".join(
        "\t".join(map(visible, line.split("\t"))) for each in answered.kept for line in lines_of(each.image, each.tasks)
    )
    if options.output:
        values = {"images": answered.count, "output": options.output}
        text = f"{answered.count} images; the answers are in {options.output}"
    return Result(values, text, exit_code=1 if answered.problems else 0)


@dataclass
class _Answered:
    """What came of some images.

    Attributes:
        count: How many were answered.
        kept: Their predictions, unless these go to a file.
        drawn: The first of them.
        problems: What is wrong with the others.
    """

    count: int = 0
    kept: list[Prediction] = field(default_factory=list)
    drawn: list[Prediction] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


_DRAWN = 60
"""So many images at most are on a contact sheet."""


def _answered(found: Iterable[Prediction], options: Namespace) -> _Answered:
    """Go through predictions, and write them to a file, if there is to be one, as they come."""
    answered = _Answered()
    with Path(options.output).open("w", newline="", encoding="utf-8") if options.output else nullcontext() as file:
        writer = None if file is None else TableWriter(file)
        for each in found:
            if each.problem:
                answered.problems.append(each.problem)
                continue
            answered.count += 1
            if len(answered.drawn) < _DRAWN:
                answered.drawn.append(each)
            if writer is None:
                answered.kept.append(each)
            else:
                writer.write(each)
    return answered


def _load_model(options: Namespace) -> tuple[MultiTaskModel, Any]:
    sources: dict[str, Any] = {}
    for name, source in options.adapter:
        several = not name and is_collection(source)
        own = dict(read_collection(Path(source))) if several else {name or Path(source).name: source}
        if twice := sorted(sources.keys() & own.keys()):
            raise ConfigError(f"--adapter: got {[*sources, *own]}, which names a task twice: {twice[0]!r}")
        sources |= own
    if not sources:
        raise ConfigError(f"--adapter: {options.adapter[0][1]} has no tasks")
    first = next(iter(sources.values()))
    first = first if isinstance(first, AdapterFolder) else read_folder(find_folder(first))
    backbone = _load_backbone(options.backbone) or load_recorded_backbone(first)
    device = getattr(options, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = combine_tasks(backbone, sources).to(device)
    except RuntimeError as error:
        raise ConfigError(f"--device: {device!r} cannot be used: {error}") from error
    return model, model.shared_processor() or AutoImageProcessor.from_pretrained(
        backbone.name_or_path, trust_remote_code=False
    )


def _load_backbone(name: str | None) -> PreTrainedModel | None:
    """The backbone that the user named; None to take the one that an adapter recorded."""
    if name is None:
        return None
    try:
        return AutoModelForImageClassification.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--backbone: {name!r} cannot be loaded: {error}") from error


def evaluate(options: Namespace) -> Result:
    """Measure an adapter on a folder with one folder of images for each class, named by its labels.

    Of a folder of many tasks each is measured on a folder of its own.
    """
    several = is_collection(options.adapter)
    folders = dict(options.data)
    if len(folders) < len(options.data) or several == ("" in folders) or (len(folders) > 1 and not several):
        expected = "TASK=FOLDER for each task to measure" if several else "one FOLDER"
        raise ConfigError(f"--data: got {[folder for _, folder in options.data]}, expected {expected}")
    if options.report is not None:
        new_figure()  # asked for now, and not after hours
    data = {name: load_folder(folder) for name, folder in folders.items()}
    model: Any = _open(options)
    config = TrainingConfig(disable_tqdm=True, image_size=options.image_size)
    found: Any = evaluate_model(model, data if several else data[""], config, report=options.report is not None)
    values: dict[str, Any] = {"adapter": options.adapter}
    lines = []
    for name, own in (found if several else {"": found}).items():
        scores = own.summary if isinstance(own, EvaluationReport) else own
        (values.setdefault(name, {}) if name else values).update(images=len(data[name]), **scores)
        text = f"{finetuning.in_words(scores)} of {len(data[name])} images, loss {scores['loss']:.4f}"
        if isinstance(own, EvaluationReport):
            folder = Path(str(options.report), name)
            own.save(folder)
            text = f"{own}\n\n{folder / 'report.html'}"
        lines.append(f"{name}: {text}" if name else text)
    return Result(values, "\n".join(lines))


def _open(options: Namespace) -> TunedModel | MultiTaskModel:
    """The model of an adapter, or of a folder of many."""
    kind = MultiTaskModel if is_collection(options.adapter) else TunedModel
    return kind.from_pretrained(options.adapter, _load_backbone(options.backbone))


def merge(options: Namespace) -> Result:
    """Write an adapter into the weights of a copy of its backbone, and save that as a plain model of transformers."""
    model = TunedModel.from_pretrained(options.adapter, _load_backbone(options.backbone))
    merged = model.merge()
    merged.save_pretrained(options.output)
    if model.processor is not None:
        model.processor.save_pretrained(options.output)
    name = type(merged).__name__
    return Result({"output": options.output, "model_class": name}, f"{name} in {options.output}")


def export(options: Namespace) -> Result:
    """Write a model as a file for ONNX Runtime (.onnx) or torch.export (.pt2), with an output for each task."""
    path = Path(options.output)
    if path.suffix not in (".onnx", ".pt2") or not path.parent.is_dir():
        raise ConfigError(f"output: got {options.output!r}, expected a file .onnx or .pt2 in a folder that is there")
    size = None if options.image_size is None else (options.image_size, options.image_size)
    model = _open(options)
    if path.suffix == ".onnx":
        export_onnx(model, path, image_size=size)
    else:
        torch.export.save(export_program(model, image_size=size), path)
    return Result({"output": options.output, "bytes": path.stat().st_size}, f"{path}: {path.stat().st_size:,} bytes")


def explain(options: Namespace) -> Result:
    """Draw what a model looks at in an image, block by block."""
    check_picture(options.output, "output")
    image = decode(options.image)
    found = explain_image(_open(options), image, task=options.task)
    found.save(options.output)
    values = {"label": found.label, "probability": found.probability, "output": options.output}
    return Result(
        values, f"{found.label} ({found.probability:.3f}), {options.output}" if found.label else options.output
    )


def cache(options: Namespace) -> Result:
    """Show, check or clear the folder of a trunk cache."""
    if options.action == "verify":
        damaged = [str(path) for path in find_damaged(options.folder)]
        text = "\n".join(damaged) or "all entries are whole"
        return Result({"damaged": damaged}, text, exit_code=1 if damaged else 0)
    if options.action == "prune":
        folders = prune_cache(options.folder, days=options.days, max_gb=options.max_gb)
    else:
        folders = list_folders(options.folder)
    rows = [
        {
            "folder": each.path.name,
            "backbone": each.backbone,
            "dtype": each.context.get("dtype"),
            "images": each.images,
            "bytes": each.bytes,
            "days": round(each.days, 1),
        }
        for each in folders
    ]
    what = "deleted " if options.action == "prune" else ""
    lines = [
        f"{what}{row['folder']}  {visible(row['backbone'])}  {row['dtype']}  {row['images']:,} images  "
        f"{row['bytes'] / 1e9:.3f} GB  {row['days']} days old"
        for row in rows
    ]
    return Result(rows, "\n".join(lines) or "nothing")


def combine(options: Namespace) -> Result:
    """Put adapters of one backbone into a folder that `memtune.MultiTaskModel.from_pretrained` loads.

    Prints what the tasks share, and what they cost beside a pass of the backbone.
    """
    model, _ = _load_model(options)
    model.save_pretrained(options.output)
    plan = model.plan()
    lanes = [
        {"tasks": list(lane.tasks), "stream": lane.stream, "multiply_adds": lane.multiply_adds} for lane in plan.lanes
    ]
    return Result({"output": options.output, "multiply_adds": plan.multiply_adds, "lanes": lanes}, str(plan))


def push(options: Namespace) -> Result:
    """Share an adapter on the Hub in one commit. You must be logged in (`hf auth login`)."""
    model = TunedModel.from_pretrained(options.adapter, _load_backbone(options.backbone))
    info = model.push_to_hub(
        options.repo_id,
        private=options.private,
        revision=options.revision,
        commit_message=options.commit_message,
        create_pr=options.create_pr,
    )
    url = info.pr_url or info.commit_url
    return Result({"repo_id": options.repo_id, "commit": info.oid, "url": url}, url)


def zoo(options: Namespace) -> Result:
    """List the adapters on the Hub whose cards name a backbone."""
    found = [
        {"id": info.id, "tags": info.tags, "downloads": info.downloads} for info in list_adapters(options.backbone)
    ]
    text = "\n".join(each["id"] for each in found) or f"no adapters for {options.backbone} were found"
    return Result(found, text)
