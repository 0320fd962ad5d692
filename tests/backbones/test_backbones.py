"""A Hugging Face model as blocks and roles, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from backbone_zoo import BY_NAME, CASES, FAMILIES, Case, each
from torch import nn

import memtune
from memtune import MemoryConfig
from memtune.backbones.backbone import Backbone
from memtune.backbones.families import TOWERS
from memtune.errors import UnsupportedBackboneError

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@each(CASES)
def test_shapes(case: Case) -> None:
    model = case.build()
    backbone = Backbone(model)
    assert backbone.model is model
    assert backbone.tower is case.tower(model)
    assert [block.module for block in backbone.blocks] == case.blocks(model)
    assert [block.width for block in backbone.blocks] == case.widths(model)
    assert backbone.depth == case.depth == len(backbone.blocks)
    assert backbone.width == case.width
    assert backbone.image_size == 2 * (case.facts.trained_size or case.image_size,)
    assert backbone.patch_size == 2 * (case.facts.patch_size,)
    assert backbone.channels == 3
    for block in backbone.blocks:
        assert block.heads * block.head_width == block.width
        assert block["query"].in_features == block["key"].in_features == block["value"].in_features == block.width


def test_description() -> None:
    assert Backbone(BY_NAME["vit"].build()).describe() == {
        "family": "vit",
        "depth": 2,
        "widths": [16],
        "heads": [2],
        "patch_size": [8, 8],
        "image_size": [32, 32],
        "channels": 3,
    }
    assert Backbone(BY_NAME["swin"].build()).describe()["widths"] == [8, 16]


@each(CASES)
@pytest.mark.slow
def test_a_head_changes_no_description(case: Case) -> None:
    plain = next(each for each in FAMILIES if type(each.tower(each.build())) is type(case.tower(case.build())))
    assert Backbone(case.build()).describe() == Backbone(plain.build()).describe()


@each(CASES)
def test_parameters_by_role_are_the_towers(case: Case) -> None:
    backbone = Backbone(case.build())
    parameters = dict(backbone.parameters_by_role())
    own = {id(parameter) for parameter in backbone.tower.parameters()}
    assert len(parameters) == len({id(parameter) for parameter in parameters.values()})
    assert all(id(parameter) in own for parameter in parameters.values())
    for index in range(case.depth):
        for role in ("norm1", "query", "key", "value", "out", "norm2", "fc1", "fc2"):
            assert f"blocks.{index}.{role}.weight" in parameters
    assert "patches.weight" in parameters
    assert "norm.weight" in parameters


@each(FAMILIES)
def test_a_role_replaced_in_a_view_leaves_the_original(case: Case) -> None:
    backbone = Backbone(case.build())
    view = backbone.view()
    for role in ("query", "key", "value", "out", "fc1", "fc2"):
        original, doubled = backbone.blocks[0][role], _Doubled(view.blocks[0][role])
        view.blocks[0].replace(role, doubled)
        assert view.blocks[0][role] is doubled
        assert backbone.blocks[0][role] is original
    with torch.no_grad():
        changed = view.run_tower(case.images()).last_hidden_state
        assert not torch.allclose(changed, case.run_tower(backbone.model, case.images()).last_hidden_state)


class _Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(tokens)


def test_an_unknown_role_is_refused() -> None:
    block = Backbone(BY_NAME["vit"].build()).blocks[0]
    with pytest.raises(UnsupportedBackboneError, match=r"'gate'.*roles of a block are"):
        block["gate"]
    with pytest.raises(UnsupportedBackboneError, match="'gate'"):
        block.replace("gate", nn.Identity())


def test_a_role_that_the_block_lacks_is_refused() -> None:
    block = Backbone(BY_NAME["dinov2"].build()).blocks[0]
    del block.module.mlp._modules["fc1"]
    with pytest.raises(UnsupportedBackboneError, match="Dinov2Layer has no module for the role 'fc1'"):
        block["fc1"]


def _swinv2() -> nn.Module:
    return transformers.Swinv2Model(
        transformers.Swinv2Config(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=4)
    )


def _hiera() -> nn.Module:
    return transformers.HieraModel(
        transformers.HieraConfig(
            embed_dim=8, image_size=[32, 32], depths=[1, 1], num_heads=[1, 2], query_stride=[2, 2], num_query_pool=1
        )
    )


def _pvt() -> nn.Module:
    config = transformers.PvtConfig(
        image_size=32,
        num_encoder_blocks=1,
        depths=[1],
        hidden_sizes=[8],
        num_attention_heads=[1],
        sequence_reduction_ratios=[1],
        patch_sizes=[4],
        strides=[4],
        mlp_ratios=[2],
    )
    return transformers.PvtModel(config)


def _bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=20))


def _resnet() -> nn.Module:
    return transformers.ResNetModel(transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))


class _TimmWrapperModel(transformers.PreTrainedModel):
    """Stands for transformers' own where timm is not installed."""

    config_class = transformers.PreTrainedConfig


def _timm() -> nn.Module:
    return _TimmWrapperModel(transformers.PreTrainedConfig())


def _linear() -> nn.Module:
    return nn.Linear(2, 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("build", [_swinv2, _hiera, _pvt, _bert, _resnet, _timm, _linear])
def test_unsupported_models_are_refused_with_the_supported_ones_named(build: Any, masked: bool) -> None:
    model = build()
    with pytest.raises(UnsupportedBackboneError) as raised:
        memtune.wrap(model, MemoryConfig(), num_labels=2, masked=masked)
    assert all(tower in str(raised.value) for tower in TOWERS)
    assert type(model).__name__ in str(raised.value)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("value", [None, "google/vit-base-patch16-224", 3, {}], ids=repr)
def test_what_is_no_model_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedBackboneError, match=f"got {type(value).__name__}"):
        memtune.wrap(value, MemoryConfig(), num_labels=2)


@each([case for case in CASES if case.facts.staged])
def test_masked_mode_on_a_backbone_in_stages_is_refused(case: Case) -> None:
    model = case.build()
    how = "within windows" if case.facts.windowed else "to reduced maps"
    with pytest.raises(
        UnsupportedBackboneError, match=rf"masked=True: got {case.model_class}, whose .* {how}, in stages.*masked=False"
    ):
        memtune.wrap(model, MemoryConfig(), num_labels=2, masked=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_class_token_of_a_view_can_be_replaced() -> None:
    case = BY_NAME["clip"]
    backbone = Backbone(case.build())
    view = backbone.view()
    view.set_class_token(partial(torch.zeros, 1, 1, 16))
    with torch.no_grad():
        changed = view.features(case.images())
        assert not torch.allclose(changed, backbone.features(case.images()))
        backbone.class_token.zero_()
        torch.testing.assert_close(changed, backbone.features(case.images()))


def test_a_dispatched_model_is_refused_before_anything_changes() -> None:
    model = BY_NAME["vit"].build()
    model.layers[0].forward = model.layers[0].forward  # bound to the instance, as accelerate.dispatch_model leaves it
    with pytest.raises(UnsupportedBackboneError, match="without device_map"):
        memtune.wrap(model, MemoryConfig(), num_labels=2)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_subclass_of_a_tower_is_known() -> None:
    class OwnViT(transformers.ViTModel):
        pass

    model = OwnViT(BY_NAME["vit"].config())
    assert Backbone(model).family.name == "vit"
