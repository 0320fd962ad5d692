"""A part of a fused linear layer against an ordinary layer with the same rows."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from memtune.backbones.backbone import Block
from memtune.backbones.fused import LinearPart


def part_and_rows(bias: bool = True) -> tuple[nn.Linear, LinearPart, nn.Linear]:
    """A fused layer, its second third, and an ordinary layer with these rows."""
    whole = nn.Linear(5, 12, bias=bias)
    rows = nn.Linear(5, 4, bias=bias)
    rows.load_state_dict({name: tensor[4:8] for name, tensor in whole.state_dict().items()})
    return whole, LinearPart(whole, 4, 8), rows


@pytest.mark.parametrize("bias", [True, False])
def test_a_part_is_the_layer_of_its_rows(bias: bool) -> None:
    _, part, rows = part_and_rows(bias)
    states = torch.randn(3, 5)
    assert torch.equal(part(states), rows(states))
    assert (part.in_features, part.out_features, repr(part).split("(")[1]) == (5, 4, repr(rows).split("(")[1])
    named, expected = dict(part.named_parameters()), dict(rows.named_parameters())
    assert named.keys() == expected.keys()
    assert all(torch.equal(named[name], expected[name]) for name in named)
    assert dict(part.named_parameters("here")).keys() == {f"here.{name}" for name in expected}
    assert len(list(part.parameters())) == 1 + bias


def test_a_part_has_no_tensors_of_its_own() -> None:
    whole, part, _ = part_and_rows()
    assert not part.state_dict()
    assert list(nn.ModuleDict({"whole": whole, "part": part}).parameters()) == list(whole.parameters())
    assert part.weight.untyped_storage().data_ptr() == whole.weight.untyped_storage().data_ptr()


def test_a_part_follows_the_whole() -> None:
    whole, part, _ = part_and_rows()
    whole.to(torch.bfloat16)
    assert part.weight.dtype == part(torch.ones(1, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    other = nn.Linear(5, 12)
    whole.float().load_state_dict(other.state_dict())
    assert torch.equal(part.weight, other.weight[4:8])
    part.weight.sum().backward()
    assert whole.weight.grad is not None
    assert whole.weight.grad.sum(dim=1).tolist() == [0.0] * 4 + [5.0] * 4 + [0.0] * 4


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_changed_apart_is_written_back(bias: bool) -> None:
    whole, part, rows = part_and_rows(bias)
    attention = nn.ModuleDict({"whole": whole, "query": part, "out": rows})
    block = Block(0, attention, {"query": "query", "out": "out"})
    before = whole.weight.detach().clone()
    with block.changing("query") as apart:
        assert type(apart) is nn.Linear
        assert torch.equal(apart.weight, rows.weight)
        apart.weight.data.fill_(7)
        assert torch.equal(whole.weight, before)
    assert torch.equal(whole.weight, torch.cat([before[:4], torch.full((4, 5), 7.0), before[8:]]))
    with block.changing("out") as own:
        assert own is rows


def test_an_update_of_pefts_goes_around_a_part() -> None:
    _, part, rows = part_and_rows()
    config = peft.LoraConfig(init_lora_weights=False)
    torch.manual_seed(0)
    one = LoraLinear(part, "default", config=config, r=2, lora_alpha=4)
    torch.manual_seed(0)
    other = LoraLinear(rows, "default", config=config, r=2, lora_alpha=4)
    states = torch.randn(3, 5)
    torch.testing.assert_close(one(states), other(states))
    assert (one(states) - part(states)).abs().max() > 0.01
