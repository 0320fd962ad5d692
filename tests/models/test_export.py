"""Exported graphs answer as the models do, with an output for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, FAMILIES, GLOBAL, PLAIN, Case, each
from multitask import tune, tune_all
from torch.export import ExportedProgram

import memtune
from memtune import LoraConfig, MemoryConfig
from memtune.errors import ConfigError, InputError, MemtuneError
from memtune.models.export import export_onnx, export_program

pytestmark = [
    # torch's own, when a program is copied (torch 2.13)
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(onnx|torch)"),
]

VIT = BY_NAME["vit-head"]
FEW = [("head", False), ("lora", False), ("lora at the end", False), ("memory", True), ("memory and lora", True)]
UNMASKED = [("head", False), ("lora", False), ("lora at the end", False), ("dora", False), ("prompts", False)]
MASKED = [("memory", True), ("more memory", True), ("lora", True), ("softmax prompts", True), ("coda", True)]
WITH_SOURCES = [("memory", False), ("memory at the end", False), ("coda", False), ("memory and lora", False)]


def images(number: int, size: int = 32) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(number))


@torch.no_grad()
def assert_same_answers(program: ExportedProgram, model: Any, case: Case, numbers: tuple[int, ...] = (1, 3)) -> None:
    run = program.module()
    for number in numbers:
        shown = torch.randn(number, *case.images(1).shape[1:])
        outputs, expected = run(shown), model(shown)
        base = [] if case in PLAIN and not case.tower_path else ["base"]  # such a tower's feature is not kept
        assert list(outputs) == [*base, *expected]
        for name, answer in expected.items():
            torch.testing.assert_close(outputs[name], answer.logits, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_program_has_an_output_for_each_task() -> None:
    backbone = VIT.build()
    model = memtune.combine(backbone, tune_all(backbone, FEW))
    shown = images(2)
    before = model(shown)
    program = export_program(model)
    assert_same_answers(program, model, VIT, (1, 2, 5))
    torch.testing.assert_close(program.module()(shown)["base"], backbone(shown).logits)
    for name, answer in model(shown).items():
        assert torch.equal(answer.logits, before[name].logits)


VARIANTS = [
    "deit",
    "vit_msn",
    "beit-shared",
    "beit-absolute",
    "dinov2-swiglu",
    "dinov3-gated",
    "altclip",
    "chinese_clip",
    "clipseg",
    "metaclip_2",
    "swinv2-head",
    "pvt-head",
]
"""Of these another case has the tower's code, but for a layer or two."""


@pytest.mark.slow
@each([case for case in (*FAMILIES, *PLAIN) if case.name not in VARIANTS])
def test_programs_of_every_family(case: Case) -> None:
    """Of a ViT, and of one family with a position bias and one with windows, with every method; of others with few."""
    backbone = case.build()
    if case.name in ("vit", "beit", "swin"):
        kinds = UNMASKED + (MASKED if case in GLOBAL else [])
    else:
        kinds = [("lora", False), ("lora at the end", False)] + [("memory and lora", True)] * (case in GLOBAL)
    model = memtune.combine(backbone, tune_all(backbone, kinds))
    program = export_program(model, image_size=tuple(case.images(1).shape[2:]))  # Segformer's names none
    assert_same_answers(program, model, case)


@pytest.mark.slow
@each([BY_NAME["vit"], BY_NAME["beit"], BY_NAME["swin"]])
def test_programs_of_unmasked_methods_with_further_keys(case: Case) -> None:
    backbone = case.build()
    kinds = WITH_SOURCES if case.name == "vit" else WITH_SOURCES[1:3]
    model = memtune.combine(backbone, tune_all(backbone, kinds))
    assert_same_answers(export_program(model), model, case)


def test_a_program_for_one_image() -> None:
    backbone = VIT.build()
    model = memtune.combine(backbone, tune_all(backbone, WITH_SOURCES[:2]))
    assert_same_answers(export_program(model, dynamic_batch=False), model, VIT, (1,))


def test_some_tasks_alone() -> None:
    backbone = VIT.build()
    model = memtune.combine(backbone, tune_all(backbone, FEW))
    name = list(model.tasks)[3]
    program = export_program(model, tasks=[name])
    outputs = program.module()(images(3))
    assert list(outputs) == ["base", name]
    torch.testing.assert_close(outputs[name], model(images(3))[name].logits, atol=1e-6, rtol=1e-5)
    assert not any(f"{other}" in str(program.graph_signature) for other in model.tasks if other != name)


@pytest.mark.parametrize(("config", "masked"), [(LoraConfig(r=2), False), ([MemoryConfig(2), LoraConfig(r=2)], True)])
@pytest.mark.slow
def test_a_tuned_model(config: Any, masked: bool) -> None:
    model = tune(BY_NAME["vit"].build(), config, masked=masked)
    outputs = export_program(model).module()(images(3))
    torch.testing.assert_close(outputs["logits"], model(images(3)).logits, atol=1e-4, rtol=1e-4)
    combined = memtune.combine(model.backbone, {"task": model})(images(3))["task"].logits  # computed as the graph does
    torch.testing.assert_close(outputs["logits"], combined, atol=1e-6, rtol=1e-6)
    feature = model.backbone(images(3)).last_hidden_state[:, 0]
    torch.testing.assert_close(outputs["base"], feature, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_program_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tune(VIT.build(), LoraConfig(r=2), masked=True)
    torch.export.save(export_program(model), tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    torch.testing.assert_close(loaded(images(3))["logits"], model(images(3)).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_images_of_another_size() -> None:
    model = tune(VIT.build(), LoraConfig(r=2), masked=True)
    program = export_program(model, image_size=(48, 48))
    expected = model(images(3, 48), interpolate_pos_encoding=True).logits
    torch.testing.assert_close(program.module()(images(3, 48))["logits"], expected, atol=1e-6, rtol=1e-5)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    backbone = VIT.build()
    tuned = tune(backbone, LoraConfig(r=2), masked=False)
    model = memtune.combine(backbone, {"pets": tuned, "base": tuned})
    for other, options, message in [
        (backbone, {}, "expected a MultiTaskModel or a TunedModel"),
        (tuned, {"tasks": ["pets"]}, "a tuned model has one task only"),
        (model, {"tasks": "pets"}, "expected a sequence of the names"),
        (model, {"tasks": ["cars"]}, "unknown tasks"),
        (model, {"tasks": ["pets", "pets"]}, "names a task twice"),
        (model, {}, "the graph itself has something called 'base'"),
        (tuned, {"image_size": 32}, "expected height and width"),
    ]:
        with pytest.raises((ConfigError, InputError), match=message):
            export_program(other, **options)
    no_class_token = tune(BY_NAME["ijepa-head"].build(), LoraConfig(r=2), masked=False)
    with pytest.raises((InputError, ConfigError)):
        export_program(no_class_token, image_size=(0, 32))


def test_onnx_without_its_packages_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtune.models.export.find_spec", lambda name: None)
    with pytest.raises(MemtuneError, match="pip install memtune"):
        export_onnx(tune(VIT.build(), LoraConfig(r=2), masked=False), tmp_path / "model.onnx")


def test_onnx_files_need_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs memtune[onnx]")
    for path in (tmp_path, tmp_path / "missing" / "model.onnx"):
        with pytest.raises(MemtuneError, match="expected the path of a file"):
            export_onnx(tune(VIT.build(), LoraConfig(r=2), masked=False), path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beit", "swin"])  # docs/export.md has a ViT
def test_onnx_runtime_gives_the_same_answers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs memtune[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    case = BY_NAME[name]
    backbone = case.build()
    kinds = [("lora at the end", False)] + [("memory and lora", True)] * (case in GLOBAL)
    model = memtune.combine(backbone, tune_all(backbone, kinds))
    export_onnx(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert_same_by_onnx(onnxruntime, model, tmp_path / "model.onnx", case)


def assert_same_by_onnx(onnxruntime: Any, model: Any, path: Path, case: Case) -> None:
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    assert names == ["base", *model.tasks]
    assert [given.name for given in session.get_inputs()] == ["pixel_values"]
    for number in (1, 3):
        shown = torch.randn(number, *case.images(1).shape[1:])
        outputs = dict(zip(names, session.run(None, {"pixel_values": shown.numpy()}), strict=True))
        for task, answer in model(shown).items():
            torch.testing.assert_close(torch.tensor(outputs[task]), answer.logits, atol=1e-4, rtol=1e-4)
