"""Frozen linear layers under autocast: what autocast itself computes, with weights that are cast once."""

import copy
import gc
import weakref

import pytest
import torch
from backbone_zoo import BY_NAME
from torch import nn

import memtune
from memtune.backbones.views import shadow
from memtune.streams import casting
from memtune.streams.casting import FrozenLinear, keep_casts


@pytest.fixture
def layers():
    """A frozen layer and its view, which keeps casts."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6).requires_grad_(False)
    view = shadow(layer)
    keep_casts(view)
    return layer, view


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


def assert_same(layer, view, dtype=torch.bfloat16):
    states = torch.randn(3, 2, 8)
    with autocast(dtype):
        expected, output = layer(states), view(states)
    assert output.dtype == dtype
    assert torch.equal(output, expected)


def test_the_result_is_that_of_autocast_and_the_layer_stays_as_it_was(layers):
    layer, view = layers
    assert_same(layer, view)
    kept = view._casts["weight"]
    assert_same(layer, view)
    assert view._casts["weight"] is kept
    assert type(layer) is nn.Linear
    assert view.weight is layer.weight
    assert "_casts" not in layer.__dict__


def test_gradients_are_those_of_autocast(layers):
    gradients = []
    for layer in layers:
        states = torch.ones(2, 8, requires_grad=True)
        with autocast():
            layer(states).float().square().sum().backward()
        gradients.append(states.grad)
    assert torch.equal(*gradients)


CHANGES = {
    "in place": lambda layer: layer.weight.add_(1),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(6, 8), requires_grad=False)),
    "other values": lambda layer: layer.load_state_dict({"weight": torch.zeros(6, 8), "bias": torch.ones(6)}),
    "other tensors": lambda layer: layer.load_state_dict(
        {"weight": torch.zeros(6, 8), "bias": torch.ones(6)}, assign=True
    ),
    "another type": lambda layer: layer.half(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_cast_again(layers, change):
    layer, view = layers
    assert_same(layer, view)
    with torch.no_grad():
        CHANGES[change](layer)
    layer.requires_grad_(False)
    assert_same(layer, view)


def test_another_precision_is_cast_anew(layers):
    assert_same(*layers)
    assert_same(*layers, dtype=torch.float16)


def test_nothing_is_kept_without_autocast_of_what_trains_or_of_inference_mode(layers):
    layer, view = layers
    states = torch.randn(2, 8)
    assert torch.equal(view(states), layer(states))
    with torch.inference_mode(), autocast():  # whose tensors no gradient could be recorded with later
        assert torch.equal(view(states), layer(states))
    layer.requires_grad_(True)
    with autocast():
        assert torch.equal(view(states), layer(states))
    assert view._casts == {}


def test_only_plain_linear_layers_keep_casts():
    class Other(nn.Linear):
        pass

    view = shadow(nn.Sequential(Other(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)))
    keep_casts(view)
    assert [type(layer) for layer in view] == [Other, nn.LayerNorm, FrozenLinear]


def test_a_task_stream_trains_as_before(monkeypatch):
    case = BY_NAME["vit"]
    gradients = []
    for keep in (True, False):
        if not keep:
            monkeypatch.setattr("memtune.streams.task_stream.keep_casts", lambda module: None)
        torch.manual_seed(0)
        methods = [memtune.MemoryConfig(2), memtune.LoraConfig(r=2)]
        tuned = copy.deepcopy(memtune.wrap(case.build(), methods, num_labels=3, masked=True)).train()
        for _ in range(2):
            with autocast():
                loss = tuned(case.images(), labels=torch.tensor([0, 2])).loss
            loss.backward()
        gradients.append([parameter.grad for parameter in tuned.parameters() if parameter.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert len(gradients[0]) > 4


def test_casts_are_shared_by_views_and_go_with_the_backbone() -> None:
    backbone = BY_NAME["vit"].build().eval()
    models = [memtune.wrap(backbone, memtune.MemoryConfig(2), num_labels=2, masked=True).eval() for _ in range(2)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for model in models:
            model(BY_NAME["vit"].images())
    kept = len(casting._OF_LAYERS)
    weight = weakref.ref(backbone.layers[0].mlp.fc1.weight)
    del backbone, models, model
    gc.collect()
    assert weight() is None
    assert len(casting._OF_LAYERS) < kept
