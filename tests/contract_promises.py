"""What every method promises, in every mode that it has: functions of a row of the table and a place to run it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, Case, assert_same, frozen, outputs_equal, snapshot
from contract_cases import FEW, LABELS, Row, gradients, logits, moved, wrapped
from safetensors.torch import load_file

import memtune
from memtune import MemtuneError

Promise = Callable[[Row, Case, bool], None]

PROMISES: list[Promise] = []


def promise(test: Promise) -> Promise:
    """Note a promise; what has methods to test runs `PROMISES`."""
    PROMISES.append(test)
    return test


def _reaches(gradient: Any) -> bool:
    return gradient is not None and bool(gradient.any())


def _is_finite(gradient: Any) -> bool:
    return gradient is not None and bool(gradient.isfinite().all())


@promise
def all_that_the_task_owns_trains_and_nothing_else(row: Row, case: Case, masked: bool) -> None:
    backbone = case.build()
    before = snapshot(backbone)
    model = wrapped(row, case, masked, backbone)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], 0.01)
    reached: set[str] = set()
    for _ in range(row.steps):
        reached |= {f"task.{name}" for name, value in gradients(model, case.images()).items() if _reaches(value)}
        optimizer.step()
    assert reached == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert reached == {f"task.{name}" for name, _ in model.task.named_parameters()}
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert_same(backbone, before, ignore=("requires_grad",))


@promise
def a_new_adapter_changes_the_features_only_if_the_table_says_so(row: Row, case: Case, masked: bool) -> None:
    model = wrapped(row, case, masked).eval()
    if row.pooled:  # features of its own
        return
    bare = memtune.wrap(model.backbone, [], num_labels=3, masked=masked).eval()
    if bare.task.class_token is not None:
        bare.task.class_token.data.copy_(model.task.token().view_as(bare.task.class_token))
    with torch.no_grad():
        difference = (model.features(case.images()) - bare.features(case.images())).abs().max()
    assert difference < 5e-6 if row.unchanged else difference > 5e-5


@promise
def the_number_of_trained_values_is_the_formula(row: Row, case: Case, masked: bool) -> None:
    backbone = case.build()
    counts = wrapped(row, case, masked, backbone).trainable_parameters()
    width = case.widths(backbone)[-1]
    in_blocks = sum(row.count(block, own_width, width) for _, block, own_width in row.changed(case, backbone))
    assert counts[row.config.method] == in_blocks + sum(row.pooled.values())
    if row.pooled:
        assert counts["class_token"] == 0
        return
    has_token = masked or (row.config.trains_class_token() and case.facts.class_token is not None)
    assert counts["class_token"] == width * has_token
    assert counts["head"] == 3 * width + 3
    assert counts["total"] == sum(counts[part] for part in (row.config.method, "class_token", "head"))


@promise
def what_is_loaded_is_what_was_saved_under_keys_of_roles(row: Row, case: Case, masked: bool) -> None:
    backbone = case.build()
    model = moved(wrapped(row, case, masked, backbone))
    with TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        model.save_pretrained(one)
        loaded = memtune.load(one, backbone=case.build())
        assert torch.equal(logits(loaded, case.images()), logits(model, case.images()))
        loaded.save_pretrained(two)
        assert {path.name: path.read_bytes() for path in one.iterdir()} == {
            path.name: path.read_bytes() for path in two.iterdir()
        }
        keys = set(load_file(one / "adapter_model.safetensors"))
    assert loaded.task.methods == [row.config.method]
    own = {f"blocks.{index}.{key}" for index, _, _ in row.changed(case, backbone) for key in row.keys}
    assert keys - {"class_token"} == own | row.pooled.keys() | {"head.weight", "head.bias"}


@promise
def detaching_gives_the_backbone_back(row: Row, case: Case, masked: bool) -> None:
    backbone, images = case.build().train(), case.images()
    next(backbone.parameters()).requires_grad_(False)
    before = snapshot(backbone)
    with frozen(backbone):
        expected = case.run_tower(backbone.eval(), images)
        backbone.train()
    with torch.no_grad():
        model = moved(wrapped(row, case, masked, backbone))
        assert outputs_equal(case.run_tower(backbone, images), expected)
        with model.disable_adapter():
            torch.manual_seed(0)  # ViT-MAE shuffles patches
            disabled = model(images)
        torch.manual_seed(0)
        assert outputs_equal(disabled, backbone(pixel_values=images))
    gradients(model, images)
    assert model.detach() is backbone
    assert_same(backbone, before)
    with frozen(backbone):
        assert outputs_equal(case.run_tower(backbone.eval(), images), expected)


@promise
def a_copy_answers_equally_and_is_independent(row: Row, case: Case, masked: bool) -> None:
    backbone, images = case.build(), case.images()
    before = snapshot(backbone)
    model = moved(wrapped(row, case, masked, backbone))
    expected = logits(model, images)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, images), expected)
    originals = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in originals for parameter in copied.parameters())
    with torch.no_grad():
        for parameter in copied.task.adapters.parameters():
            parameter.add_(torch.randn_like(parameter))  # a factor alone may be undone by a norm
    assert not torch.equal(logits(copied, images), expected)
    assert torch.equal(logits(model, images), expected)
    assert_same(copied.detach(), before, ignore=("identity", "modules"))
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@promise
def half_precision_is_near_full_precision(row: Row, case: Case, masked: bool) -> None:
    images = case.images()
    full = moved(wrapped(row, case, masked))
    half = wrapped(row, case, masked, case.build().to(torch.bfloat16))
    half.task.load_tensors(full.task.tensors())
    expected = full(images).logits
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = full(images, labels=LABELS)
    low = half(images.to(torch.bfloat16), labels=LABELS)
    for model, output in ((full, cast), (half, low)):
        assert (output.logits.float() - expected).norm() < 0.1 * expected.norm()
        output.loss.backward()
        assert all(parameter.dtype == torch.float32 for parameter in model.task.parameters())
        assert all(_is_finite(parameter.grad) for parameter in model.task.parameters())


@promise
def checkpointing_gives_the_same_gradients(row: Row, case: Case, masked: bool) -> None:
    model = moved(wrapped(row, case, masked))
    expected = gradients(model, case.images())
    if not model.backbone.supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="does not support activation checkpointing"):
            model.gradient_checkpointing_enable()
        return
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model, case.images()), expected, atol=1e-6, rtol=1e-5)
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(gradients(model, case.images()), expected, atol=1e-6, rtol=1e-5)


def other_backbones(case: Case) -> dict[str, Any]:
    """For each fact of a backbone one that differs in it; depth and width on a few families alone."""
    others = {"family": BY_NAME["deit" if case.name == "vit" else "vit"].build()}
    if case.name not in FEW:
        return others
    if case.facts.windowed:
        return others | {"depth": case.build(depths=[2, 2]), "widths": case.build(embed_dim=16)}
    return others | {"depth": case.build(num_hidden_layers=3), "widths": case.build(hidden_size=32)}


@promise
def a_wrong_backbone_is_refused_before_anything_changes(row: Row, case: Case, masked: bool) -> None:
    with TemporaryDirectory() as folder:
        wrapped(row, case, masked).save_pretrained(folder)
        for fact, other in other_backbones(case).items():
            before = snapshot(other.train())
            with pytest.raises(MemtuneError, match=rf"another shape(?s:.*)\b{fact}: got .*, expected "):
                memtune.load(folder, backbone=other)
            assert_same(other, before)
    backbone = case.build()
    before = snapshot(backbone)
    with pytest.raises(MemtuneError, match=r"blocks: got \[9\], expected indices below"):
        memtune.wrap(backbone, replace(row.config, blocks=[9]), num_labels=2, masked=masked)
    assert_same(backbone, before)
