import copy

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import ViTConfig, ViTModel

from memtune.backbones.backbone import Backbone
from memtune.backbones.fingerprints import fingerprint, same_weights, stored_parts
from memtune.errors import CheckpointError
from memtune.trunk_cache.store import describe_trunk

PRECISIONS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def model():
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
    model = ViTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model


def of(model, dtype=torch.float32):
    return fingerprint(Backbone(copy.deepcopy(model).to(dtype)))


@pytest.mark.parametrize("saved", PRECISIONS)
@pytest.mark.parametrize("loaded", PRECISIONS)
def test_same_weights_in_any_two_precisions_agree(model, saved, loaded):
    assert same_weights(of(model, saved), of(model, loaded))


def test_weights_rounded_once_and_read_in_full_precision_agree(model):
    rounded = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)
    assert same_weights(of(model, torch.bfloat16), of(rounded))


@pytest.mark.parametrize("name", ["layers.1.mlp.fc2.weight", "layers.0.attention.q_proj.bias", "layernorm.weight"])
def test_a_small_change_of_one_tensor_is_seen(model, name):
    before = of(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(1 + 1e-5)
    assert not same_weights(before, of(model))


def test_other_weights_are_refused_in_half_precision_too(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    assert not same_weights(of(model, torch.bfloat16), of(other, torch.float16))


def test_another_depth_is_other_weights(model):
    shallow = copy.deepcopy(model)
    shallow.layers = shallow.layers[:1]
    assert not same_weights(of(model), of(shallow))


@pytest.mark.parametrize(
    "damaged", [{}, {"dtype": "float32"}, {"dtype": "int4", "values": ""}, {"values": 3, "dtype": ""}]
)
def test_a_damaged_fingerprint_is_named(model, damaged):
    with pytest.raises(CheckpointError, match="fingerprint is damaged"):
        same_weights(damaged, of(model))


def test_a_weight_that_is_stored_as_several_tensors(model):
    """As those that torchao has quantised are: it agrees with everything, but its trunk cache is its own."""
    before = of(model)
    layer = model.layers[0].mlp.fc1
    parts = layer.weight.detach().clone(), layer.weight.detach().clone()
    layer.weight = torch.nn.Parameter(TwoTensor(*parts), requires_grad=False)
    assert [torch.equal(one, other) for one, other in zip(stored_parts(layer.weight), parts, strict=True)] == [True] * 2
    assert stored_parts(layer.bias) == [layer.bias]
    own = fingerprint(Backbone(model))
    assert same_weights(own, before)
    with torch.no_grad():
        model.layers[0].mlp.fc2.weight.mul_(2)
    assert not same_weights(fingerprint(Backbone(model)), before)
    digests = {describe_trunk(Backbone(model), {}, "no")["weights"]}
    for part in parts:
        part[0, 0] += 1
        digests.add(describe_trunk(Backbone(model), {}, "no")["weights"])
    assert len(digests) == 3
