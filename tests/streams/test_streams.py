"""The trunk and the task stream against one forward pass with the paper's attention mask written out."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, CASES, FAMILIES, GLOBAL, Case, each, family_modes, outputs_equal
from dense_pass import dense_forward, dense_mask
from torch import Tensor, nn

import memtune
from memtune import MemoryConfig
from memtune.backbones.backbone import Backbone
from memtune.errors import UnsupportedBackboneError
from memtune.streams import AdaptedStream, TaskStream, Trunk
from memtune.streams.passes import Pass


def _wrapped(case: Case, attention: str = "sdpa", **settings: Any) -> tuple[Any, memtune.TunedModel]:
    backbone = case.build()
    backbone.set_attn_implementation(attention)
    model = memtune.wrap(backbone, MemoryConfig(tokens=3, init_std=0.5, **settings), num_labels=4, masked=True).eval()
    nn.init.normal_(model.task.head.weight)
    nn.init.normal_(model.task.class_token)
    return backbone, model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@each(GLOBAL)
def test_masked_memory_is_the_dense_mask(case: Case, attention: str) -> None:
    backbone, model = _wrapped(case, attention)
    images, task = case.images(), model.task
    memory = [task.tensors()[f"blocks.{index}.memory"] for index in range(case.depth)]
    with torch.no_grad():
        feature, base = dense_forward(case, backbone, memory, task.class_token, images)
        expected = feature @ task.head.weight.T + task.head.bias
        torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(base, case.run_tower(backbone, images).last_hidden_state, atol=1e-5, rtol=0)
        no_memory, _ = dense_forward(case, backbone, [tokens[:0] for tokens in memory], task.class_token, images)
    assert (no_memory - feature).abs().max() > 0.02  # the oracle does see the memory


@each(FAMILIES[:1])
def test_the_mask_is_table_1(case: Case) -> None:
    seen = dense_mask(base=2, memory=1) == 0  # columns: memory, task token, two base tokens
    assert seen.tolist()[1:] == [[True, True, True, True], [False, False, True, True], [False, False, True, True]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@each(CASES)
def test_the_trunk_answers_bit_for_bit_as_the_backbone(case: Case, attention: str) -> None:
    backbone = case.build()
    backbone.set_attn_implementation(attention)
    images = case.images()
    with torch.no_grad():
        expected = case.run_tower(backbone, images)
        current, output = Trunk(Backbone(backbone)).run(images)
    assert outputs_equal(output, expected)
    assert current.visited == list(range(case.depth)) == list(range(len(current.trunk)))


@each([case for case in GLOBAL if case.facts.class_token is not None])
def test_a_copy_of_the_class_token_reproduces_the_backbones_feature(case: Case) -> None:
    backbone = case.build()
    described = Backbone(backbone)
    images = case.images()
    with torch.no_grad():
        current, output = Trunk(described).run(images)
        current.own_key = False  # the trunk holds the class token's key already
        feature = TaskStream(described).features(current, described.class_token.view(1, 1, -1)).squeeze(1)
        tower = case.tower(backbone)
        expected = case.facts.finish(tower, output.last_hidden_state[:, 0])
    torch.testing.assert_close(feature, expected, atol=1e-6, rtol=1e-6)


@family_modes
def test_checkpointing_gives_the_same_gradients(case: Case, masked: bool) -> None:
    backbone = case.build()
    model = memtune.wrap(backbone, MemoryConfig(tokens=2, init_std=0.5), num_labels=3, masked=masked).train()
    labels = torch.tensor([0, 2])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        model(case.images(), labels=labels).loss.backward()
        return {name: parameter.grad for name, parameter in model.task.named_parameters()}

    expected = gradients()
    model.activation_checkpointing_enable()
    again = gradients()
    model.activation_checkpointing_disable()
    for name, gradient in expected.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(gradients()[name], gradient, atol=1e-6, rtol=1e-5)


def test_checkpointing_does_recompute() -> None:
    model = memtune.wrap(BY_NAME["vit"].build(), MemoryConfig(), num_labels=3).train()
    model.activation_checkpointing_enable()
    visited: list[int] = []
    for site in model.stream.sites:
        site.sources.append(partial(_record, visited, site.sources.pop()))
    model(BY_NAME["vit"].images(), labels=torch.tensor([0, 1])).loss.backward()
    assert visited == [0, 1, 1, 0]


def _record(visited: list[int], source: Any, block: Any, current: Pass) -> Any:
    visited.append(block.index)
    return source(block, current)


@each(FAMILIES)
def test_the_trunk_keeps_no_gradient_and_no_graph(case: Case) -> None:
    current, output = Trunk(Backbone(case.build())).run(case.images())
    assert not output.last_hidden_state.requires_grad
    for block in current.trunk:
        assert not block.key.requires_grad
        assert not block.value.requires_grad
        assert block.bias is None or not block.bias.requires_grad


def test_a_trunk_serves_two_tasks() -> None:
    case = BY_NAME["beit-head"]
    backbone = case.build()
    described = Backbone(backbone)
    first, second = (memtune.wrap(backbone, MemoryConfig(init_std=0.5), num_labels=3, masked=True) for _ in range(2))
    with torch.no_grad():
        current, _ = Trunk(described).run(case.images())
        features = [model.stream.features(current, model.task.token()).squeeze(1) for model in (first, second)]
        assert torch.equal(features[0], first.features(case.images()))
        assert torch.equal(features[1], second.features(case.images()))


def test_a_model_that_ignores_the_attention_function_is_refused() -> None:
    case = BY_NAME["vit"]
    described = Backbone(case.build())
    stream = AdaptedStream(described)
    stream.view.blocks[1]["attention"].config = described.blocks[1]["attention"].config  # sdpa, without memtune
    with pytest.raises(UnsupportedBackboneError, match="ViTModel ran 1 of its 2 blocks"):
        stream.features(case.images())


def test_a_pass_starts_empty() -> None:
    assert Pass() == Pass(visited=[], trunk=[], own_key=True)


@pytest.mark.parametrize("masked", [False, True])
def test_threads_get_the_single_threaded_results(masked: bool) -> None:
    case = BY_NAME["vit"]
    model = memtune.wrap(case.build(), MemoryConfig(init_std=0.5), num_labels=3, masked=masked).eval()
    batches = [torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with torch.no_grad():
        expected = [model(images).logits for images in batches]
    results: dict[int, list[Tensor]] = {}
    start = threading.Barrier(4)

    def run(index: int) -> None:
        start.wait()
        with torch.no_grad():
            results[index] = [model(batches[index]).logits for _ in range(10)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert all(torch.equal(logits, expected[index]) for logits in results[index])
