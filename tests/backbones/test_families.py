"""The role table against the facts that the zoo states about each tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, CASES, FAMILIES, GLOBAL, Case, each
from torch import Tensor

from memtune.backbones.backbone import Backbone
from memtune.backbones.families import TOWERS

ROLES = {"norm1", "attention", "query", "key", "value", "out", "norm2", "fc1", "fc2"}


def test_the_zoo_has_every_family() -> None:
    assert {type(case.tower(case.build())).__name__ for case in FAMILIES} == set(TOWERS)
    assert len({family.name for family in TOWERS.values()}) == len(TOWERS)


@pytest.mark.parametrize("tower", sorted(TOWERS))
def test_every_row_has_every_role(tower: str) -> None:
    assert set(TOWERS[tower].roles) == ROLES


@each(CASES)
def test_roles_are_used_in_their_order(case: Case) -> None:
    backbone = Backbone(case.build())
    seen: list[tuple[int, str]] = []

    def note(index: int, role: str) -> Any:
        return lambda module, args, output: seen.append((index, role))

    order = ["norm1", "query", "key", "value", "out", "norm2", "fc1", "fc2"]
    for block in backbone.blocks:
        for role in order:
            block[role].register_forward_hook(note(block.index, role))
    with torch.no_grad():
        case.run_tower(backbone.model, case.images())
    projections = {"query", "key", "value"}
    found = [(index, "projection" if role in projections else role) for index, role in seen]
    expected = [(i, "projection" if role in projections else role) for i in range(case.depth) for role in order]
    assert found == expected
    assert set(seen) == {(index, role) for index in range(case.depth) for role in order}


@each(CASES)
def test_the_feature_is_what_the_zoo_says(case: Case) -> None:
    model = case.build()
    with torch.no_grad():
        expected = case.facts.feature(case.tower(model), case.run_tower(model, case.images()))
        torch.testing.assert_close(Backbone(model).view().features(case.images()), expected, atol=1e-6, rtol=1e-6)


@each([case for case in CASES if "-head" in case.name])
def test_the_feature_is_what_the_models_own_classifier_reads(case: Case) -> None:
    """Where the classifier reads one vector; DINOv2's and CLIP's read others (class token and mean; mean alone)."""
    if case.name.startswith(("dinov2", "clip")):
        return
    model = case.build()
    read: list[Tensor] = []
    classifier = model.get_submodule("cls_classifier" if case.name == "deit-teacher" else "classifier")
    classifier.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        model(case.images())
        torch.testing.assert_close(Backbone(model).view().features(case.images()), read[0])


@each(CASES)
def test_class_token_and_first_position(case: Case) -> None:
    """A tower's first token is its class token with the position that the family gives it."""
    backbone = Backbone(case.build())
    tower = case.tower(backbone.model)
    if case.facts.class_token is None:
        assert backbone.class_token is None
        return
    assert backbone.class_token is tower.get_parameter(case.facts.class_token)
    entered: list[Tensor] = []
    case.blocks(backbone.model)[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        case.run_tower(backbone.model, case.images())
        torch.testing.assert_close(backbone.start(backbone.class_token), entered[0][:1, :1])


@each(GLOBAL)
def test_tokens_before_the_patches(case: Case) -> None:
    model = case.build()
    with torch.no_grad():
        tokens = case.run_tower(model, case.images()).last_hidden_state.shape[1]
    assert tokens == case.facts.prefix + (case.image_size // 8) ** 2


@each([BY_NAME["vit_mae"], BY_NAME["vit_mae-pretraining"]])
def test_a_view_of_vit_mae_keeps_every_patch_and_the_original_drops_them(case: Case) -> None:
    model = case.build()
    view = Backbone(model).view()
    with torch.no_grad():
        assert view.run_tower(case.images()).last_hidden_state.shape[1] == 17
        assert case.tower(model)(case.images()).last_hidden_state.shape[1] == 5
    assert model.config.mask_ratio == 0.75
    assert view.tower.embeddings.config is not case.tower(model).embeddings.config
