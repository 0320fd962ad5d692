"""What is trained for one task, as tensors under role keys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, Case, each_mode
from torch import Tensor

from memtune import MemoryConfig
from memtune.backbones.backbone import Backbone
from memtune.errors import CheckpointError
from memtune.tasks.task import Task


def create(case: str | Case = "vit", *, masked: bool = False, **settings: Any) -> Task:
    case = BY_NAME[case] if isinstance(case, str) else case
    return Task([MemoryConfig(tokens=2, **settings)], ["a", "b", "c"], Backbone(case.build()), masked)


@each_mode
def test_tensors_under_role_keys(case: Case, masked: bool) -> None:
    task = create(case, masked=masked)
    expected = {f"blocks.{index}.memory" for index in range(case.depth)} | {"head.weight", "head.bias"}
    expected |= {"class_token"} if masked or case.facts.class_token else set()
    assert set(task.tensors()) == expected
    assert not any(tensor.requires_grad for tensor in task.tensors().values())
    assert sum(tensor.numel() for tensor in task.tensors().values()) == sum(p.numel() for p in task.parameters())


@each_mode
def test_the_class_token_starts_as_the_backbones(case: Case, masked: bool) -> None:
    backbone = Backbone(case.build().to(torch.bfloat16))
    task = Task([MemoryConfig()], ["a", "b"], backbone, masked)
    if case.facts.class_token is None:
        assert (task.class_token is None) == (not masked)
        assert not masked or (task.class_token.shape == (1, 1, case.width) and task.class_token.abs().max() < 0.2)
        return
    assert torch.equal(task.class_token, backbone.class_token.float())
    assert task.class_token.dtype == torch.float32
    assert task.class_token.data_ptr() != backbone.class_token.data_ptr()


def test_the_head_starts_near_zero() -> None:
    head = create().head
    assert head.weight.shape == (3, 16)
    assert 0.01 < head.weight.std() < 0.03
    assert not head.bias.any()


def test_the_head_answers_in_its_own_type() -> None:
    assert create().logits(torch.zeros(2, 16, dtype=torch.bfloat16)).dtype == torch.float32


def test_labels_and_methods() -> None:
    task = create(masked=True)
    assert task.labels == ["a", "b", "c"]
    assert task.masked
    assert task.methods == ["memory"]
    assert task.configs == [MemoryConfig(tokens=2)]


def test_tensors_are_taken_over() -> None:
    source, target = create(), create()
    parameters = dict(target.named_parameters())
    target.load_tensors({key: tensor.double() for key, tensor in source.tensors().items()})
    for key, tensor in source.tensors().items():
        assert torch.equal(target.tensors()[key], tensor)
    assert all(parameters[name] is parameter for name, parameter in target.named_parameters())
    source.head.weight.data.zero_()
    assert target.head.weight.any()


def _wrong() -> dict[str, Tensor]:
    tensors = create().tensors()
    del tensors["blocks.0.memory"]
    tensors["blocks.9.memory"] = torch.zeros(2, 16)
    tensors["head.bias"] = torch.zeros(4)
    tensors["class_token"] = torch.full_like(tensors["class_token"], float("nan"))
    return tensors


def test_every_tensor_that_does_not_fit_is_named_and_nothing_changes() -> None:
    task = create()
    before = copy.deepcopy(task.tensors())
    with pytest.raises(CheckpointError) as raised:
        task.load_tensors(_wrong())
    assert str(raised.value).splitlines()[1:] == [
        "  class_token: has values that are not finite",
        "  head.bias: got the shape (4,), expected (3,)",
        "  missing: blocks.0.memory",
        "  unexpected: blocks.9.memory",
    ]
    assert all(torch.equal(tensor, before[key]) for key, tensor in task.tensors().items())
