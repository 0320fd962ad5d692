"""Views share parameters and nothing that can be changed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, CASES, Case, assert_same, each, outputs_equal, snapshot
from torch import nn

import memtune
from memtune.backbones.views import shadow, shadow_config, structure
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


def _hook_dictionaries(model: nn.Module) -> list[dict[Any, Any]]:
    return [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if "_hooks" in name and isinstance(value, dict)
    ]


REGISTER: dict[str, Any] = {
    "forward": lambda module: module.register_forward_hook(_fail, with_kwargs=True, always_call=True),
    "forward pre": lambda module: module.register_forward_pre_hook(_fail, with_kwargs=True),
    "backward": lambda module: module.register_full_backward_hook(_fail),
    "backward pre": lambda module: module.register_full_backward_pre_hook(_fail),
    "state": lambda module: module.register_state_dict_post_hook(_fail),
    "state pre": lambda module: module.register_state_dict_pre_hook(_fail),
    "load": lambda module: module.register_load_state_dict_post_hook(_fail),
    "load pre": lambda module: module.register_load_state_dict_pre_hook(_fail),
}


@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)
def test_a_hook_of_either_leaves_no_trace_in_the_other(register: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    view: Any = shadow(model)
    before = [dict(each) for each in _hook_dictionaries(model)]
    register(view[0])
    assert [dict(each) for each in _hook_dictionaries(model)] == before
    before = [dict(each) for each in _hook_dictionaries(view)]
    register(model[0])
    assert [dict(each) for each in _hook_dictionaries(view)] == before


def test_a_part_compiled_in_place_is_not_compiled_in_the_view() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].compile(backend="eager")
    view: Any = shadow(model)
    view[0].register_forward_hook(lambda module, args, output: output + 1)
    states = torch.ones(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(view(states), model(states) + 1)


def test_a_method_that_a_module_keeps_is_the_views_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 2.0
            self.chosen = self.scale

        def scale(self, states: torch.Tensor) -> torch.Tensor:
            return states * self.factor

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.chosen(states)

    model = Scaled()
    view: Any = shadow(model)
    view.factor = 3.0
    assert view(torch.ones(1)).item() == 3
    assert model(torch.ones(1)).item() == 2


def test_a_view_of_a_replica_has_the_replicas_tensors() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    replica: Any = model._replicate_for_data_parallel()
    layer: Any = model[0]._replicate_for_data_parallel()
    layer.weight, layer.bias = torch.zeros(2, 2), torch.ones(2)
    replica._modules["0"] = layer
    assert shadow(replica)(torch.ones(1, 2)).tolist() == [[1, 1]]


STRUCTURES: dict[str, Any] = {
    "another child": lambda model: setattr(model, "0", nn.Linear(2, 2)),
    "a child more": lambda model: model.append(nn.ReLU()),
    "another class": lambda model: setattr(model[0], "__class__", type("Other", (nn.Linear,), {})),
    "a hook": lambda model: model[0].register_forward_hook(_fail),
    "a hook before": lambda model: model[0].register_forward_pre_hook(_fail),
    "another forward": lambda model: setattr(model[0], "forward", _fail),
}


@pytest.mark.parametrize("change", STRUCTURES.values(), ids=STRUCTURES)
def test_the_structure_tells_when_a_view_would_be_another(change: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = structure(model)
    model[0].weight.data.fill_(1)
    model.load_state_dict(nn.Sequential(nn.Linear(2, 2)).state_dict(), assign=True)
    model.to(torch.bfloat16).train().requires_grad_(False)
    assert structure(model) == before
    change(model)
    assert structure(model) != before


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("place", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_placed_after_wrap_count_at_once_and_no_longer_than_they_stay(place: str, masked: bool) -> None:
    """As tools for Grad-CAM place them."""
    backbone, calls = BY_NAME["vit"].build().eval(), []
    model = memtune.wrap(backbone, memtune.MemoryConfig(2), num_labels=2, masked=masked).eval()
    both, images = memtune.combine(backbone, {"a": model}), BY_NAME["vit"].images()
    for ask in (model, both):
        ask(images)
        handle = getattr(backbone.layers[-1], place)(lambda *given: calls.append(1))
        ask(images)
        assert calls
        handle.remove()
        calls.clear()
        ask(images)
        assert not calls


def test_a_layer_that_packs_its_weight_for_inference_does_not_in_a_view() -> None:
    """bitsandbytes' 4-bit layers do on some CPUs; what is packed gives no gradient."""
    layer = nn.Linear(2, 2)
    layer.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    assert shadow(layer).support_avx512bf16_for_cpu is False
    assert layer.support_avx512bf16_for_cpu is True
