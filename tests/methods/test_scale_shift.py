"""Scaling and shifting: the formula written out, merged, and beside other tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME
from contract_cases import moved
from torch import nn

import memtune
from memtune import LoraConfig, ScaleShiftConfig
from memtune.errors import ConfigError

VIT = BY_NAME["vit-head"]
ROLES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj", "fc1": "fc1", "fc2": "fc2"}


def tuned(backbone: Any, config: Any, seed: int = 0, **options: Any) -> memtune.TunedModel:
    return moved(memtune.wrap(backbone, config, labels=["cat", "dog", "fox"], **options), seed).eval()


def layer_of(model: nn.Module, block: int, role: str) -> Any:
    found = [module for name, module in model.named_modules() if name.endswith(f"layers.{block}.{_inner(role)}")]
    assert len(found) == 1
    return found[0]


def _inner(role: str) -> str:
    return f"mlp.{ROLES[role]}" if role.startswith("fc") else f"attention.{ROLES[role]}"


@torch.no_grad()
def test_unmasked_it_is_a_scale_and_a_shift_of_each_layers_output() -> None:
    backbone, images = VIT.build(), VIT.images()
    model = tuned(backbone, ScaleShiftConfig())
    own = model.task.tensors()
    answer = model(images).logits
    copy = VIT.build()
    for block in range(2):
        for role in ROLES:
            layer = layer_of(copy, block, role)
            scale, shift = (own[f"blocks.{block}.{role}.{part}"] for part in ("scale", "shift"))
            layer.register_forward_hook(lambda _, args, out, scale=scale, shift=shift: out * scale + shift)
    feature = copy.vit(images).last_hidden_state[:, 0]
    torch.testing.assert_close(answer, feature @ own["head.weight"].T + own["head.bias"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", [ScaleShiftConfig(), [LoraConfig(r=2), ScaleShiftConfig(roles=["value", "fc1"])]])
def test_merged_it_answers_the_same(config: Any) -> None:
    model, images = tuned(VIT.build(), config), VIT.images()
    torch.testing.assert_close(model.merge()(images).logits, model(images).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_beside_other_tasks_each_answers_as_alone(masked: bool) -> None:
    backbone, images = VIT.build(), VIT.images()
    alone = {
        "all": tuned(backbone, ScaleShiftConfig(), masked=masked, seed=1),
        "some": tuned(backbone, ScaleShiftConfig(roles=["out"], blocks=[1]), masked=masked, seed=2),
        "lora": tuned(backbone, LoraConfig(r=2), masked=masked, seed=3),
        "both": tuned(backbone, [LoraConfig(r=2), ScaleShiftConfig(roles=["out", "fc2"])], masked=masked, seed=4),
    }
    both = memtune.combine(backbone, alone)
    together, mixed = both(images), both(images, rows=["both", "some"])
    for name, model in alone.items():
        torch.testing.assert_close(together[name].logits, model(images).logits, atol=1e-5, rtol=1e-5)
    for row, name in enumerate(["both", "some"]):
        torch.testing.assert_close(mixed[row].logits, alone[name](images[row : row + 1]).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_the_order_in_which_methods_are_named_does_not_matter(masked: bool) -> None:
    configs = [LoraConfig(r=2, roles=["out", "fc1"]), ScaleShiftConfig(roles=["out", "fc1"])]
    backbone, images = VIT.build(), VIT.images()
    one = tuned(backbone, configs, masked=masked)
    other = memtune.wrap(backbone, configs[::-1], labels=["cat", "dog", "fox"], masked=masked).eval()
    other.task.load_tensors(one.task.tensors())
    assert torch.equal(one(images).logits, other(images).logits)
    if not masked:
        torch.testing.assert_close(other.merge()(images).logits, one(images).logits, atol=1e-5, rtol=1e-5)


def test_roles_that_are_the_trunks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"roles: got \['key'\] with masked=True"):
        memtune.wrap(VIT.build(), ScaleShiftConfig(roles=["key", "out"]), labels=["a", "b"], masked=True)
    with pytest.raises(ConfigError, match="expected some of"):
        ScaleShiftConfig(roles=["nothing"])


def test_a_layer_without_a_bias_cannot_hold_a_shift() -> None:
    backbone = VIT.build(qkv_bias=False)
    with pytest.raises(ConfigError, match=r"blocks\.0\.query has no bias"):
        tuned(backbone, ScaleShiftConfig()).merge()
