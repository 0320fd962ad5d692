"""Adapters without a head: `wrap(..., head=None)` gives features for a head of the caller's own."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, FAMILIES, GLOBAL, Case, each, family_modes, outputs_equal
from multitask import CONFIGS, tune
from torch import Tensor, nn
from transformers import ViTImageProcessorPil
from transformers.modeling_outputs import BaseModelOutputWithPooling

import memtune
from memtune import AdapterConfig, CodaPromptConfig, LoraConfig, MemoryConfig
from memtune.cli.parser import main
from memtune.errors import CheckpointError, ConfigError
from memtune.models.arithmetic import merge_adapters
from memtune.models.export import export_program
from memtune.models.multitask import MultiTaskModel

VIT = BY_NAME["vit"]
SEGFORMER = BY_NAME["segformer"]


def features(case: Case = VIT, config: AdapterConfig | None = None, *, masked: bool, backbone: Any = None) -> Any:
    """A model without a head, its trained values random."""
    config = MemoryConfig(tokens=2) if config is None else config
    model = memtune.wrap(case.build() if backbone is None else backbone, config, head=None, masked=masked).eval()
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


both = pytest.mark.parametrize("masked", [False, True])


@family_modes
def test_what_it_gives_is_what_a_head_would_read(case: Case, masked: bool) -> None:
    model = features(case, masked=masked)
    images = case.images()
    output = model(images)
    assert isinstance(output, BaseModelOutputWithPooling)
    assert list(output) == ["pooler_output"]
    with_head = memtune.wrap(case.build(), MemoryConfig(tokens=2), num_labels=3, masked=masked).eval()
    tensors = model.task.tensors() | {f"head.{name}": value for name, value in with_head.task.head.state_dict().items()}
    with_head.task.load_tensors(tensors)
    assert torch.equal(with_head.task.head(output.pooler_output), with_head(images).logits)
    assert torch.equal(model(images, return_dict=False)[0], output.pooler_output)


@both
def test_a_head_of_ones_own_trains_the_adapter(masked: bool) -> None:
    model = features(masked=masked, config=LoraConfig(r=2)).train()
    head = nn.Linear(16, 4)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD(
        [*(each for each in model.parameters() if each.requires_grad), *head.parameters()], lr=0.1
    )
    images, labels = VIT.images(4), torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(head(model(images).pooler_output), labels)
        loss.backward()
        if not losses:
            assert all(each.grad is not None and each.grad.any() for each in model.task.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())


@both
def test_only_the_adapter_is_trained(masked: bool) -> None:
    model = features(masked=masked)
    counts = model.trainable_parameters()
    assert counts["head"] == 0
    assert counts["total"] == sum(each.numel() for each in model.parameters() if each.requires_grad) > 0
    assert not any("head" in key for key in model.state_dict())
    assert model.config.id2label == model.config.label2id == {}
    with model.disable_adapter():
        assert outputs_equal(model(VIT.images()), VIT.build()(VIT.images()))


@both
def test_saved_and_loaded(masked: bool, tmp_path: Path) -> None:
    model = features(masked=masked)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["labels"] == []
    assert not any("head" in key for key in model.task.tensors())
    backbone = VIT.build()
    loaded = memtune.load(tmp_path, backbone=backbone)
    assert torch.equal(loaded(VIT.images()).pooler_output, model(VIT.images()).pooler_output)
    again = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(again(VIT.images()).pooler_output, model(VIT.images()).pooler_output)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"labels": ["cat"]}))
    with pytest.raises(CheckpointError, match=r"missing: head.bias\n  missing: head.weight"):
        memtune.load(tmp_path, backbone=backbone)


def test_the_folder_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    VIT.build().save_pretrained(tmp_path / "vit")
    backbone = type(VIT.build()).from_pretrained(tmp_path / "vit")
    features(masked=True, backbone=backbone).save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in card
    assert "It has no head and no classes" in card
    assert "## Classes" not in card
    assert "one of these classes" not in card
    monkeypatch.chdir(tmp_path / "adapter")
    code = card.split("```python\n")[1].split("```")[0]
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([1, 16])\n"
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert "none: it gives features" in capsys.readouterr().out


@both
def test_what_it_reads_of_a_pass_that_is_there(masked: bool) -> None:
    model = features(masked=masked)
    if masked:
        found = model(trunk=model.trunk_pass(VIT.images())).pooler_output
        torch.testing.assert_close(found, model(VIT.images()).pooler_output)
    torch.testing.assert_close(model.features(VIT.images()), model(VIT.images()).pooler_output)


def test_the_penalty_of_a_method_is_there_for_a_loss_of_ones_own() -> None:
    config = CodaPromptConfig(pool_size=4, prompt_length=2, blocks=[0], ortho_mu=0.5)
    model = features(config=config, masked=False)
    penalty: Tensor = model.task.penalty()
    assert penalty > 0
    assert penalty.requires_grad


def test_merged_it_is_the_backbone_alone() -> None:
    model = features(config=LoraConfig(r=2), masked=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged: Any = model.merge()
    expected = model(VIT.images()).pooler_output
    assert (VIT.build()(VIT.images()).last_hidden_state[:, 0] - expected).abs().max() > 0.01
    torch.testing.assert_close(merged(VIT.images()).last_hidden_state[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_exported_for_peft(tmp_path: Path) -> None:
    import peft

    model = features(config=LoraConfig(r=2), masked=False)
    model.export_peft(tmp_path)
    loaded: Any = peft.PeftModel.from_pretrained(VIT.build(), str(tmp_path)).eval()
    found = loaded(VIT.images()).last_hidden_state[:, 0]
    torch.testing.assert_close(found, model(VIT.images()).pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"head": None, "labels": ["cat"]},
            "head=None: the model gives features; labels, num_labels, extends and problem_type need",
        ),
        ({"head": None, "num_labels": 2}, "head=None"),
        ({"head": "mlp", "num_labels": 2}, "head: got 'mlp', expected 'linear', RandomFeatures"),
        ({}, "num_labels: got None"),
    ],
)
def test_wrong_heads_are_refused(options: dict[str, Any], message: str) -> None:
    backbone = VIT.build()
    with pytest.raises(ConfigError, match=message):
        memtune.wrap(backbone, MemoryConfig(2), **options)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


DATA = [{"pixel_values": VIT.images(1)[0], "labels": 0}]


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(VIT.images(), labels=torch.tensor([0, 1])),
        lambda model: memtune.fit(model, DATA),
        lambda model: memtune.evaluate(model, DATA),
        lambda model: memtune.pipeline(model, image_processor=print),
        lambda model: merge_adapters([model, model], head="mean"),
        export_program,
    ],
    ids=["labels", "fit", "evaluate", "pipeline", "arithmetic", "export"],
)
def test_what_needs_a_head_says_so(use: Any) -> None:
    model = features(config=LoraConfig(r=2), masked=False)
    before = model.state_dict()
    with pytest.raises(ConfigError, match=r"was wrapped with head=None: it gives features"):
        use(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_features_of_a_model_with_a_dense_head() -> None:
    dense = Case("dense", "SegformerForSemanticSegmentation", SEGFORMER.settings | {"num_labels": 3})
    model = features(dense, LoraConfig(r=2), masked=False)
    bare: Any = SEGFORMER.run_tower(model.backbone.segformer, SEGFORMER.images()).last_hidden_state  # (2, 16, 4, 4)
    found = model(SEGFORMER.images()).pooler_output
    assert found.shape == (2, 16)
    assert (found - bare.mean(dim=(2, 3))).abs().max() > 0.01
    with model.disable_adapter():
        assert model(SEGFORMER.images()).logits.shape == (2, 3, 8, 8)


# together with others


def several(case: Case) -> tuple[Any, dict[str, memtune.TunedModel]]:
    """A backbone, and models on it with and without heads, in both modes where it has both."""
    backbone = case.build()
    models = {}
    for masked in (False, True) if case in GLOBAL else (False,):
        mode = "masked " * masked
        for name in ("memory", "more memory", "head", "lora at the end", "coda", "memory and lora"):
            models[f"{mode}{name}"] = features(case, CONFIGS[name], masked=masked, backbone=backbone)
        models[f"{mode}with a head"] = tune(backbone, CONFIGS["lora"], masked=masked)
        models[f"{mode}memory with a head"] = tune(backbone, CONFIGS["memory"], masked=masked, labels=5)
    return backbone, models


def assert_same_answer(answer: Any, alone: Any) -> None:
    assert type(answer) is type(alone)
    assert list(answer) == list(alone)
    torch.testing.assert_close(answer.to_tuple(), alone.to_tuple(), atol=5e-5, rtol=1e-5)  # of features of size 1 to 3


@each(FAMILIES)
@pytest.mark.slow
@pytest.mark.exact
def test_each_answers_beside_others_as_it_does_alone(case: Case) -> None:
    backbone, models = several(case)
    combined = memtune.combine(backbone, models)
    images = case.images()
    with torch.no_grad():
        output = combined(images)
        assert list(output) == list(models)
        for name, model in models.items():
            assert_same_answer(output[name], model(images))
        some = list(models)[::-2]
        output = combined(images, tasks=some)
        assert list(output) == some
        for name in some:
            assert_same_answer(output[name], models[name](images))


@each(FAMILIES)
@pytest.mark.slow
@pytest.mark.exact
def test_a_mixed_batch_of_answers_with_and_without_heads(case: Case) -> None:
    backbone, models = several(case)
    rows = [*models, *list(models)[::-2]]
    images = case.images(len(rows))
    with torch.no_grad():
        output = memtune.combine(backbone, models)(images, rows=rows)
        for image, name, answer in zip(images, rows, output, strict=True):
            assert_same_answer(answer, models[name](image[None]))


def test_a_folder_of_tasks_with_and_without_heads(tmp_path: Path) -> None:
    backbone, models = several(VIT)
    models["masked memory"].save_pretrained(tmp_path / "one")
    combined = memtune.combine(backbone, {"a": tmp_path / "one", "b": models["with a head"]})
    assert combined.tasks == {"a": [], "b": ["LABEL_0", "LABEL_1", "LABEL_2"]}
    combined.save_pretrained(tmp_path / "both")
    assert "| a | [`a`](a) | memory | masked | features |" in (tmp_path / "both" / "README.md").read_text()
    again = MultiTaskModel.from_pretrained(tmp_path / "both", VIT.build())
    images = VIT.images()
    for model in (again, pickle.loads(pickle.dumps(combined))):
        assert_same_answer(model(images)["a"], models["masked memory"](images))
        assert_same_answer(model(images)["b"], models["with a head"](images))
    assert "task stream, sharing 2 of 2 blocks: a" in str(combined.plan())


def test_what_needs_labels_of_every_task_says_so(tmp_path: Path) -> None:
    backbone, models = several(VIT)
    combined = memtune.combine(backbone, {"a": models["memory"], "b": models["with a head"]})
    with pytest.raises(ConfigError, match=r"tasks: got \['a'\], which have no labels"):
        memtune.pipeline(combined, image_processor=print)
    with pytest.raises(ConfigError, match=r"tasks: got \['a'\], which have no labels"):
        memtune.pipeline(combined, image_processor=print, tasks=["b", "a"])
    assert memtune.pipeline(combined, image_processor=print, tasks=["b"]).model is combined
    with pytest.raises(ConfigError, match=r"export of the task 'a': this adapter was wrapped with head=None"):
        export_program(combined)


def test_the_command_line_names_those_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    VIT.build().save_pretrained(tmp_path / "vit")
    backbone = type(VIT.build()).from_pretrained(tmp_path / "vit")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    memtune.wrap(backbone, MemoryConfig(2), head=None, processor=processor).save_pretrained(tmp_path / "adapter")
    assert main(["predict", "image.jpg", "--adapter", f"a={tmp_path / 'adapter'}"]) == 1
    assert "['a'] have no labels to predict" in capsys.readouterr().err


def test_a_later_task_reads_one_without_a_head() -> None:
    backbone, models = several(VIT)
    earlier = memtune.combine(backbone, {"a": models["masked memory"]})
    later = memtune.wrap(backbone, MemoryConfig(2), num_labels=2, masked=True, extends=earlier).eval()
    combined = memtune.combine(backbone, {"a": models["masked memory"], "later": later})
    images = VIT.images()
    assert_same_answer(combined(images)["later"], later(images))
    assert_same_answer(combined(images)["a"], models["masked memory"](images))
