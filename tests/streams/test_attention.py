"""The attention functions, with attention written out beside them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, CASES, Case, each
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from memtune.backbones.backbone import Backbone
from memtune.errors import UnsupportedBackboneError
from memtune.streams.attention import (
    adapted_attention,
    check_visited,
    install,
    stream_attention,
    trunk_attention,
    widen,
)
from memtune.streams.passes import KeysValues, Pass, TrunkBlock

HEADS, WIDTH = 2, 8


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention, (batch, tokens, heads, head width)."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * WIDTH**-0.5
    scores = scores if bias is None else scores + bias
    return torch.einsum("bhqk,bhkd->bqhd", scores.exp() / scores.exp().sum(-1, keepdim=True), value)


def tensors(*tokens: int) -> list[Tensor]:
    return [torch.randn(3, HEADS, number, WIDTH) for number in tokens]


def constant(key: Tensor, value: Tensor, block: Any, current: Pass) -> KeysValues:
    return KeysValues(key.unsqueeze(1), value.unsqueeze(1))


@pytest.fixture(params=["eager", "sdpa"])
def module(request: pytest.FixtureRequest) -> Any:
    """An attention module of a view with an installed site."""
    model = BY_NAME["vit"].build()
    model.set_attn_implementation(request.param)
    view = Backbone(model).view()
    return install(view, "memtune_adapted") and view.blocks[1]["attention"]


@pytest.mark.parametrize("bias", [False, True])
def test_adapted_attention(module: Any, bias: bool) -> None:
    query, key, value = tensors(5, 5, 5)
    further = [torch.randn(1, HEADS, 2, WIDTH), torch.randn(1, HEADS, 2, WIDTH)]
    own = [torch.randn(3, HEADS, 1, WIDTH), torch.randn(3, HEADS, 1, WIDTH)]
    module.memtune_site.sources += [partial(constant, *further), partial(constant, *own)]
    mask = torch.randn(1, HEADS, 5, 5) if bias else None
    current = Pass()
    output, _ = adapted_attention(module, query, key, value, mask, memtune_pass=current, scaling=WIDTH**-0.5)
    keys = torch.cat([key, further[0].expand(3, -1, -1, -1), own[0]], dim=2)
    values = torch.cat([value, further[1].expand(3, -1, -1, -1), own[1]], dim=2)
    full = torch.cat([mask, torch.zeros(1, HEADS, 5, 3)], dim=-1) if bias else None
    torch.testing.assert_close(output, attend(query, keys, values, full), atol=1e-6, rtol=1e-5)
    assert current.visited == [1]
    assert not current.trunk


@pytest.mark.parametrize("bias", [False, True])
def test_trunk_attention(module: Any, bias: bool) -> None:
    query, key, value = tensors(5, 5, 5)
    mask = torch.randn(1, HEADS, 5, 5) if bias else None
    current = Pass()
    output, _ = trunk_attention(module, query, key, value, mask, memtune_pass=current, scaling=WIDTH**-0.5)
    torch.testing.assert_close(output, attend(query, key, value, mask), atol=1e-6, rtol=1e-5)
    (kept,) = current.trunk
    assert kept.key is key
    assert kept.value is value
    assert (kept.bias is None) if mask is None else torch.equal(kept.bias, mask[:, :, :1])


@pytest.mark.parametrize("own_key", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_stream_attention(module: Any, bias: bool, own_key: bool) -> None:
    query, key, value, trunk_key, trunk_value = tensors(1, 1, 1, 5, 5)
    memory = [torch.randn(1, HEADS, 2, WIDTH), torch.randn(1, HEADS, 2, WIDTH)]
    module.memtune_site.sources.append(partial(constant, *memory))
    row = torch.randn(1, HEADS, 1, 5) if bias else None
    current = Pass(trunk=[TrunkBlock(key[:0], value[:0], None), TrunkBlock(trunk_key, trunk_value, row)])
    current.own_key = own_key
    output, _ = stream_attention(module, query, key, value, None, memtune_pass=current, scaling=WIDTH**-0.5)
    own = 1 if own_key else 0
    keys = torch.cat([trunk_key, key[:, :, :own], memory[0].expand(3, -1, -1, -1)], dim=2)
    values = torch.cat([trunk_value, value[:, :, :own], memory[1].expand(3, -1, -1, -1)], dim=2)
    full = torch.cat([row, row[..., :own], torch.zeros(1, HEADS, 1, 2)], dim=-1) if bias else None
    torch.testing.assert_close(output, attend(query, keys, values, full), atol=1e-6, rtol=1e-5)


class Mixed:
    """A reader to which each head's keys and values are its own and those of the head before it."""

    def queries(self, query: Tensor) -> Tensor:
        return query.unflatten(3, (HEADS, WIDTH)).roll(-1, dims=3).flatten(3)

    def context(self, context: Tensor) -> Tensor:
        return context.unflatten(3, (HEADS, WIDTH)).roll(1, dims=3).flatten(3)


@pytest.mark.parametrize("tasks", [1, 3])
def test_updates_change_what_tasks_see_of_the_trunk(module: Any, tasks: int) -> None:
    query, key, value, trunk_key, trunk_value = tensors(tasks, tasks, tasks, 5, 5)
    module.memtune_site.updates += [Mixed(), Mixed()]
    current = Pass(trunk=[TrunkBlock(key, value, None), TrunkBlock(trunk_key, trunk_value, None)])
    output, _ = stream_attention(module, query, key, value, None, memtune_pass=current, scaling=WIDTH**-0.5)
    mixed_key, mixed_value = (each + 2 * each.roll(1, dims=1) for each in (trunk_key, trunk_value))
    for task in range(tasks):
        one = slice(task, task + 1)
        keys, values = torch.cat([mixed_key, key[:, :, one]], dim=2), torch.cat([mixed_value, value[:, :, one]], dim=2)
        torch.testing.assert_close(output[:, one], attend(query[:, :, one], keys, values), atol=1e-6, rtol=1e-5)


def test_each_of_several_task_tokens_sees_itself_and_what_is_its_own(module: Any) -> None:
    query, key, value, trunk_key, trunk_value = tensors(3, 3, 3, 5, 5)
    further = KeysValues(*(torch.randn(1, 3, HEADS, 2, WIDTH) for _ in range(2)))
    present = torch.tensor([[[True, True], [True, False], [False, False]]])
    module.memtune_site.sources.append(lambda block, current: further._replace(present=present))
    current = Pass(trunk=[TrunkBlock(key, value, None), TrunkBlock(trunk_key, trunk_value, None)])
    output, _ = stream_attention(module, query, key, value, None, memtune_pass=current, scaling=WIDTH**-0.5)
    for task, number in enumerate((2, 1, 0)):
        one = slice(task, task + 1)
        memory = [part[:, task, :, :number].expand(3, -1, -1, -1) for part in further[:2]]
        keys = torch.cat([trunk_key, key[:, :, one], memory[0]], dim=2)
        values = torch.cat([trunk_value, value[:, :, one], memory[1]], dim=2)
        expected = attend(query[:, :, one], keys, values)
        torch.testing.assert_close(output[:, one], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_images_of_one_batch_may_have_fewer_keys_than_others(module: Any, bias: bool) -> None:
    query, key, value = tensors(5, 5, 5)
    further = KeysValues(*(torch.randn(3, 1, HEADS, 2, WIDTH) for _ in range(2)))
    present = torch.tensor([[[True, True]], [[True, False]], [[False, False]]])
    module.memtune_site.sources.append(lambda block, current: further._replace(present=present))
    mask = torch.randn(1, HEADS, 5, 5) if bias else None
    output, _ = adapted_attention(module, query, key, value, mask, memtune_pass=Pass(), scaling=WIDTH**-0.5)
    for row, number in enumerate((2, 1, 0)):
        keys, values = (
            torch.cat([own[row], more[row, 0, :, :number]], dim=1)[None]
            for own, more in ((key, further.key), (value, further.value))
        )
        full = None if mask is None else torch.cat([mask, torch.zeros(1, HEADS, 5, number)], dim=-1)
        expected = attend(query[row : row + 1], keys, values, full)
        torch.testing.assert_close(output[row : row + 1], expected, atol=1e-6, rtol=1e-5)


def test_sources_are_cast_to_the_keys(module: Any) -> None:
    query, key, value = (tensor.bfloat16() for tensor in tensors(5, 5, 5))
    module.memtune_site.sources.append(partial(constant, *tensors(2, 2)))
    output, _ = adapted_attention(module, query, key, value, None, memtune_pass=Pass(), scaling=1.0)
    assert output.dtype == torch.bfloat16


def test_widen() -> None:
    additive, boolean = torch.full((1, 1, 2, 3), -1.0), torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    key = torch.zeros(2, 1, 3, 4)
    two = KeysValues(torch.zeros(1, 1, 1, 2, 4), torch.zeros(1, 1, 1, 2, 4))
    assert widen(None, two, key) is None
    assert widen(additive, two, key)[0, 0].tolist() == [[-1.0, -1.0, -1.0, 0.0, 0.0]] * 2
    assert widen(boolean, two, key)[0, 0].tolist() == [[False, False, False, True, True]] * 2
    first = two._replace(present=torch.tensor([[[True, True]], [[True, False]]]))
    lowest = torch.finfo(torch.float32).min
    assert widen(None, first, key)[:, 0, 0].tolist() == [[0.0] * 5, [0.0] * 4 + [lowest]]
    assert widen(additive, first, key)[1, 0].tolist() == [[-1.0, -1.0, -1.0, 0.0, lowest]] * 2
    assert widen(boolean, first, key)[1, 0].tolist() == [[False, False, False, True, False]] * 2


@pytest.mark.parametrize("name", ["memtune_adapted", "memtune_trunk", "memtune_stream"])
def test_names_are_registered(name: str) -> None:
    assert name in AttentionInterface().valid_keys()


@pytest.mark.parametrize("mode", ["memtune_adapted", "memtune_trunk", "memtune_stream"])
@each(CASES)
def test_installing_changes_a_view_alone(case: Case, mode: str) -> None:
    backbone = Backbone(case.build())
    view = backbone.view()
    sites = install(view, mode)
    assert [site.block.index for site in sites] == list(range(case.depth))
    for block, original, site in zip(view.blocks, backbone.blocks, sites, strict=True):
        assert block["attention"].config._attn_implementation == mode
        assert block["attention"].memtune_site is site
        assert original["attention"].config._attn_implementation == "sdpa"
        assert not hasattr(original["attention"], "memtune_site")


def test_no_mask_is_made_for_the_modes() -> None:
    """Towers make their masks for the kernel that the backbone is set to, not for memtune's name."""
    view = Backbone(BY_NAME["clip-two-towers"].build()).view()
    install(view, "memtune_adapted")
    assert view.tower.config._attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    assert view.model.text_model.config._attn_implementation == "sdpa"


def test_a_block_that_was_not_visited_is_an_error() -> None:
    view = Backbone(BY_NAME["vit"].build()).view()
    check_visited(view, Pass(visited=[0, 1]))
    with pytest.raises(UnsupportedBackboneError, match="ViTModel ran 1 of its 2 blocks"):
        check_visited(view, Pass(visited=[0]))


def test_a_kernel_chosen_later_is_the_one_that_runs(module: Any) -> None:
    seen: list[str] = []
    AttentionInterface.register("memtune_test_kernel", partial(_note, seen))
    module.memtune_site.config._attn_implementation_internal = "memtune_test_kernel"
    query, key, value = tensors(5, 5, 5)
    assert adapted_attention(module, query, key, value, None, memtune_pass=Pass())[0] is query
    assert seen == ["called"]


def _note(seen: list[str], module: Any, query: Tensor, *arguments: Any, **kwargs: Any) -> tuple[Tensor, None]:
    seen.append("called")
    return query, None
