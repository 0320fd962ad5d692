"""Merging: a plain Hugging Face model that answers as the tuned model does."""

from __future__ import annotations

import pytest
import torch
import transformers
from backbone_zoo import BY_NAME, CASES, FAMILIES, assert_same, each, snapshot
from torch import nn

from memtune import wrap
from memtune.backbones.backbone import Backbone
from memtune.errors import ConfigError
from memtune.methods import LoraConfig, MemoryConfig
from memtune.tasks.merging import as_classifier

ROLES = ("query", "key", "value", "out", "fc1", "fc2")
NO_HEAD = {"vit_mae", "vit_mae-pretraining", "dinov3", "dinov3-gated", "siglip"}
NO_HEAD |= {
    "clip",
    "clip-projection",
    "clip-head",
    "clip-two-towers",
    "altclip",
    "chinese_clip",
    "clipseg",
    "metaclip_2",
}
WITH_HEAD = [case for case in CASES if case.name not in NO_HEAD]
VIT = BY_NAME["vit"]


def tuned_by_lora(case, backbone=None, **settings):
    config = LoraConfig(**({"r": 3, "roles": ROLES, "init_lora_weights": False} | settings))
    return wrap(backbone or case.build(), config, labels=["a", "b", "c", "d"]).eval()


@each(WITH_HEAD)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
@pytest.mark.slow
@pytest.mark.exact
def test_merged_model_equals_the_tuned_one(case, settings, tmp_path):
    backbone = case.build()
    tuned = tuned_by_lora(case, backbone, **settings)
    before, images = snapshot(backbone), case.images()
    expected = tuned(images).logits
    merged = tuned.merge()
    assert type(merged).__name__.endswith("ForImageClassification")
    assert type(merged).__module__.startswith("transformers.")
    torch.testing.assert_close(merged(images).logits, expected, atol=1e-5, rtol=1e-5)
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not {id(parameter) for parameter in merged.parameters()} & {id(p) for p in tuned.backbone.parameters()}
    # The tuned model and its backbone are as they were, and a second merge is the same.
    assert torch.equal(tuned(images).logits, expected)
    assert_same(backbone, before)
    again = tuned.merge().state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in merged.state_dict().items())
    # What is saved opens without memtune, every weight found.
    merged.save_pretrained(tmp_path)
    loaded, report = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(loaded(images).logits, expected, atol=1e-5, rtol=1e-5)
    assert loaded(images, labels=torch.tensor([0, 3])).loss > 0


@each([case for case in CASES if case.name in NO_HEAD])
def test_without_a_fitting_class_the_backbone_is_merged_and_a_warning_says_so(case):
    tuned = tuned_by_lora(case)
    with pytest.warns(UserWarning, match="head is left out"):
        merged = tuned.merge()
    if "ImageClassification" in type(tuned.backbone).__name__:  # whose own labels would answer
        assert type(merged) is type(case.tower(tuned.backbone))
        feature = Backbone(merged).features(case.images())
    else:
        assert type(merged) is type(tuned.backbone)
        feature = case.facts.feature(case.tower(merged), case.run_tower(merged, case.images()))
    torch.testing.assert_close(feature, tuned.features(case.images()), atol=1e-5, rtol=1e-5)


@each(FAMILIES)
def test_a_view_as_a_classifier_shares_the_weights(case):
    backbone = case.build()
    before = snapshot(backbone)
    view = as_classifier(backbone)
    assert (view is None) == (case.name in NO_HEAD)
    if view is not None:
        assert {id(parameter) for parameter in view.parameters()} <= {id(p) for p in backbone.parameters()}
    assert_same(backbone, before)


def test_merged_weights_are_those_of_the_formula():
    tuned = tuned_by_lora(VIT, lora_alpha=6)
    tensors, merged = tuned.task.tensors(), Backbone(tuned.merge())
    for block, own in zip(merged.blocks, Backbone(tuned.backbone).blocks, strict=True):
        for role in ROLES:
            down, up = (tensors[f"blocks.{block.index}.{role}.lora_{part}"] for part in "AB")
            torch.testing.assert_close(block[role].weight, own[role].weight + 2 * up @ down)
            assert torch.equal(block[role].bias, own[role].bias)


def test_half_precision_stays():
    tuned = tuned_by_lora(VIT, VIT.build().bfloat16(), r=2)
    merged = tuned.merge()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    images = VIT.images().bfloat16()
    expected = tuned(images).logits
    assert (merged(images).logits - expected).norm() < 0.1 * expected.norm()


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(ConfigError, match="masked adapter cannot be merged"):
        wrap(VIT.build(), LoraConfig(), num_labels=2, masked=True).merge()
    with pytest.raises(ConfigError, match="'memory' cannot be merged"):
        wrap(VIT.build(), [LoraConfig(), MemoryConfig(2)], num_labels=2).merge()


def test_quantised_weights_are_refused():
    tuned = tuned_by_lora(VIT)
    linear = Backbone(tuned.backbone).blocks[1]["value"]
    tuned.task.adapters[0].merge_into(Backbone(VIT.build()))
    quantised = VIT.build()
    weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    Backbone(quantised).blocks[1]["value"].weight = weight
    with pytest.raises(ConfigError, match=r"blocks\.1\.value is quantised"):
        tuned.task.adapters[0].merge_into(Backbone(quantised))
