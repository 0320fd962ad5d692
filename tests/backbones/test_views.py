"""Views share parameters and nothing that can be changed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, CASES, Case, assert_same, each, outputs_equal, snapshot
from torch import nn

from memtune.backbones.views import shadow, shadow_config
from memtune.errors import UnsupportedBackboneError


@each(CASES)
def test_a_view_computes_the_same_from_the_same_parameters(case: Case) -> None:
    model = case.build()
    view = shadow(model)
    originals = dict(model.named_parameters())
    for name, parameter in view.named_parameters():
        assert parameter is originals.pop(name)
    assert not originals
    assert not {id(module) for module in view.modules()} & {id(module) for module in model.modules()}
    with torch.no_grad():
        assert outputs_equal(case.run_tower(view, case.images()), case.run_tower(model, case.images()))


def test_changes_of_a_view_are_unknown_to_the_original() -> None:
    model = BY_NAME["clip-two-towers"].build()
    before = snapshot(model)
    view: Any = shadow(model)
    layer = view.vision_model.encoder.layers[0]
    layer.mlp.fc1 = nn.Identity()
    layer.self_attn.extra = 1
    layer.register_forward_hook(partial(_fail))
    layer.register_full_backward_hook(partial(_fail))
    layer.train()
    view.vision_model.config = shadow_config(view.vision_model.config)
    view.vision_model.config.hidden_size = 1
    assert_same(model, before)


def _fail(*arguments: Any) -> None:
    raise AssertionError("a hook of the view ran in the original")


def test_hooks_of_the_original_run_in_the_view_and_later_ones_do_not() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    seen: list[str] = []
    model[0].register_forward_hook(lambda *arguments: seen.append("before"))
    view = shadow(model)
    model[0].register_forward_hook(_fail)
    view(torch.zeros(1, 2))
    assert seen == ["before"]


def test_a_view_is_in_evaluation_mode_and_the_original_keeps_its_own() -> None:
    model = BY_NAME["vit"].build().train()
    view = shadow(model)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in view.modules())


def test_a_module_used_twice_stays_one_module() -> None:
    shared = nn.Linear(2, 2)
    view = shadow(nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)}))
    assert view["first"] is view["second"][0]
    assert view["first"] is not shared


def test_casting_the_original_casts_the_view() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    view = shadow(model)
    model.double()
    assert view(torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64
    assert {tensor.dtype for name, tensor in view.state_dict().items() if "num" not in name} == {torch.float64}


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    model = BY_NAME["vit"].build()
    block = model.layers[1]
    block.forward = partial(type(block).forward, block)  # as accelerate.dispatch_model does
    with pytest.raises(UnsupportedBackboneError, match="ViTLayer has had its forward method replaced"):
        shadow(model)


def test_a_shadowed_configuration_is_its_own() -> None:
    config = BY_NAME["vit"].config()
    config._attn_implementation = "eager"
    copied = shadow_config(config)
    assert type(copied) is type(config)
    assert copied.to_dict() == config.to_dict()
    copied.hidden_size = 1
    copied._attn_implementation_internal = "sdpa"
    assert (config.hidden_size, config._attn_implementation) == (16, "eager")
