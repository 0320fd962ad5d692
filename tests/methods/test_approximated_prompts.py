"""Approximated prompts: equal to their formula written out token by token, on every family and in both modes."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, CASES, GLOBAL, PLAIN, SIZE, Case, assert_same, each, snapshot
from dense_pass import dense_forward
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViltConfig, ViltForQuestionAnswering, ViTConfig, ViTModel

import memtune
from memtune.backbones.backbone import Backbone
from memtune.backbones.families import PLAIN_TOWERS, TOWERS
from memtune.errors import ConfigError, UnsupportedBackboneError
from memtune.methods import ApproximatedPromptConfig, LoraConfig, MemoryConfig
from memtune.methods.approximated_prompts import ApproximatedPromptAdapter, BlockPrompts, _Terms
from memtune.streams import AdaptedStream, Selection, Stack

VIT = BY_NAME["vit"]
SMALL = {"n": 5, "r": 2}
NAMES = ("prompts", "prompt_A", "prompt_B", "prompt_scale")


def linears(model: nn.Module) -> list[list[nn.Module]]:
    """For each block the linear layer that the attention's input enters, and the one that its output leaves."""
    ends = ("q_proj", "attn.o_proj", "attention.o_proj", "self_attn.out_proj", ".query", "attention.output.dense")
    others = ("text_model", "decoder", "vision_model.head")
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if path.endswith(ends) and not any(other in path for other in others):
            block = path.split(".attention")[0].split(".self_attn")[0]
            found.setdefault(block, []).append(module)
    assert all(len(modules) == 2 for modules in found.values())
    return list(found.values())


def slow_term(x: Tensor, tensors: dict[str, Tensor], activation: str) -> Tensor:
    """w E for one token x (width,), the prompts one after another."""
    prompts = tensors["prompts"]
    moved = [p + sum((p @ tensors["prompt_A"])[k] * tensors["prompt_B"][k] for k in range(2)) for p in prompts]
    scores = [(x * p).sum() for p in moved]
    if activation == "relu":
        scores = [score if score > 0 else torch.zeros(()) for score in scores]
    else:
        total = sum(score.exp() for score in scores)
        scores = [score.exp() / total for score in scores]
    return max(scores) * sum(score * p for score, p in zip(scores, prompts, strict=True))


def slow(model: nn.Module, blocks: dict[int, dict[str, Tensor]], activation: str, first: int | None = None) -> Any:
    """A copy of a model with the formula after its output projections; `first` of the tokens only, if given."""
    model = copy.deepcopy(model)
    for index, (entry, out) in enumerate(linears(model)):
        if index in blocks:
            seen: list[Tensor] = []
            entry.register_forward_pre_hook(partial(_note, seen))
            out.register_forward_hook(partial(_change, seen, blocks[index], activation, first))
    return model


def _note(seen: list[Tensor], module: nn.Module, args: Any) -> None:
    seen[:] = [args[0]]


def _change(
    seen: list[Tensor], tensors: Any, activation: str, first: int | None, module: Any, args: Any, o: Any
) -> Any:
    o = o.clone()
    gate = tensors.get("prompt_gate", torch.ones(1))
    for row, states in enumerate(seen[0]):
        for token, x in enumerate(states[:first]):
            term = slow_term(x, tensors, activation)
            o[row, token] = tensors["prompt_scale"].exp() * (o[row, token] + gate * term)
    return o


def scramble(parameters: Any) -> None:
    """Other values for everything trained, of a size at which the term is about as large as the attention's output."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.5))


def tensors_of(adapter: nn.Module) -> dict[int, dict[str, Tensor]]:
    blocks: dict[int, dict[str, Tensor]] = {}
    for key, tensor in adapter.state_dict().items():
        _, index, name = key.split(".")
        blocks.setdefault(int(index), {})[name] = tensor
    return blocks


def tune(case: Case, *, masked: bool = False, backbone: Any = None, **settings: Any) -> tuple[Any, memtune.TunedModel]:
    backbone = backbone or case.build()
    model = memtune.wrap(backbone, ApproximatedPromptConfig(**(SMALL | settings)), num_labels=4, masked=masked).eval()
    scramble(model.task.parameters())
    return backbone, model


@pytest.mark.parametrize("settings", [{}, {"activation": "softmax", "gate": True}, {"blocks": [-1]}], ids=str)
@each(CASES + PLAIN)
def test_unmasked_logits_are_the_formula(case: Case, settings: dict) -> None:
    backbone, model = tune(case, **settings)
    blocks = tensors_of(model.task.adapters[0])
    assert sorted(blocks) == ([case.depth - 1] if "blocks" in settings else list(range(case.depth)))
    with torch.no_grad():
        changed = slow(backbone, blocks, settings.get("activation", "relu"))
        feature = case.facts.feature(case.tower(changed), case.run_tower(changed, case.images()))
        bare = case.facts.feature(case.tower(backbone), case.run_tower(backbone, case.images()))
        logits = model(case.images()).logits
        torch.testing.assert_close(logits, model.task.head(feature), atol=1e-5, rtol=1e-5)
        assert (logits - model.task.head(bare)).abs().max() > 1e-3  # the oracle does see the prompts


@pytest.mark.parametrize("activation", ["relu", "softmax"])
@each(GLOBAL)
def test_masked_the_task_token_alone_gets_the_term(case: Case, activation: str) -> None:
    backbone, model = tune(case, masked=True, activation=activation)
    images = case.images()
    token = model.task.class_token
    with torch.no_grad():
        changed = slow(backbone, tensors_of(model.task.adapters[0]), activation, first=1)
        feature, _ = dense_forward(case, changed, [torch.zeros(0, case.width)] * case.depth, token, images)
        bare, _ = dense_forward(case, backbone, [torch.zeros(0, case.width)] * case.depth, token, images)
        torch.testing.assert_close(model.features(images), feature, atol=1e-5, rtol=1e-5)
        assert (feature - bare).abs().max() > 0.01
        _, output = model._trunk.run(images)
        assert torch.equal(output.last_hidden_state, case.run_tower(backbone, images).last_hidden_state)


def test_vilt_runs_on_a_view_with_text_and_image() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViltConfig(**sizes, vocab_size=30, image_size=SIZE, patch_size=8, max_position_embeddings=12, num_labels=3)
    vilt = ViltForQuestionAnswering(config).eval()
    inputs = {"input_ids": torch.tensor([[1, 7, 3, 2], [1, 9, 2, 0]]), "pixel_values": VIT.images()}
    inputs |= {"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    backbone = Backbone(vilt)
    adapter = ApproximatedPromptAdapter(ApproximatedPromptConfig(**SMALL), backbone).eval()
    scramble(adapter.parameters())
    stream = AdaptedStream(backbone)
    adapter.attach(stream, [adapter])

    def logits(model: Any) -> Tensor:
        torch.manual_seed(0)  # ViLT puts the patches in a random order
        return model(**inputs).logits

    with torch.no_grad():
        before = logits(vilt)
        expected = logits(slow(vilt, tensors_of(adapter), "relu"))
        torch.testing.assert_close(logits(stream.view.model), expected, atol=1e-5, rtol=1e-5)
        assert (expected - before).abs().max() > 1e-3
        assert torch.equal(logits(vilt), before)
    with pytest.raises(UnsupportedBackboneError, match=r"ViltForQuestionAnswering, which takes text.*head='backbone'"):
        memtune.wrap(vilt, ApproximatedPromptConfig(), num_labels=2)


@each(PLAIN)
def test_without_attention_interface_other_methods_and_masked_mode_are_refused(case: Case) -> None:
    model = case.build()
    before = snapshot(model)
    for config, masked in [(MemoryConfig(), False), (ApproximatedPromptConfig(), True), (MemoryConfig(), True)]:
        with pytest.raises(UnsupportedBackboneError, match="AttentionInterface") as raised:
            memtune.wrap(model, [config, ApproximatedPromptConfig()], num_labels=2, masked=masked)
        assert case.model_class in str(raised.value)
        assert all(tower in str(raised.value) for tower in TOWERS)
        assert ("masked=True" in str(raised.value).split(":")[0]) == masked
    assert_same(model, before)


@each([case for case in PLAIN if not case.tower_path])
def test_rows_without_attention_interface_name_each_part(case: Case) -> None:
    backbone = Backbone(case.build())
    assert type(backbone.tower).__name__ in PLAIN_TOWERS
    seen: list[tuple[int, str]] = []
    roles = set(backbone.family.roles) - {"attention"}
    for block in backbone.blocks:
        assert block.heads * block.head_width == block.width
        for role in roles:
            block[role].register_forward_hook(partial(_count, seen, block.index, role))
    with torch.no_grad():
        feature = backbone.features(case.images())
        expected = case.facts.feature(backbone.tower, case.run_tower(backbone.model, case.images()))
    torch.testing.assert_close(feature, expected)
    assert sorted(seen) == sorted(2 * [(index, role) for index in range(case.depth) for role in roles])
    assert backbone.patch_size == (4, 4)


def _count(seen: list, index: int, role: str, *arguments: Any) -> None:
    seen.append((index, role))


@each(PLAIN)
def test_lora_runs_without_attention_interface_too(case: Case) -> None:
    config = LoraConfig(r=2, init_lora_weights=False, roles=("query", "key", "value", "out", "fc1", "fc2"))
    model = memtune.wrap(case.build(), config, num_labels=3).eval()
    with torch.no_grad():
        logits = model(case.images()).logits
        torch.testing.assert_close(model.merge()(case.images()).logits, logits, atol=1e-5, rtol=1e-5)
        bare = model.task.head(case.facts.feature(None, case.run_tower(model.backbone, case.images())))
    assert (logits - bare).abs().max() > 1e-3


def test_the_two_tables_of_towers_are_apart() -> None:
    assert not TOWERS.keys() & PLAIN_TOWERS.keys()
    assert all(family.attention_function for family in TOWERS.values())
    assert not any(family.attention_function for family in PLAIN_TOWERS.values())


@pytest.mark.parametrize("gate", [False, True])
def test_keys_and_counts(gate: bool) -> None:
    config = ViTConfig(num_hidden_layers=2, intermediate_size=8)
    with torch.device("meta"):
        backbone = Backbone(ViTModel(config, add_pooling_layer=False))
        adapter = ApproximatedPromptAdapter(ApproximatedPromptConfig(gate=gate), backbone)
    names = (*NAMES, "prompt_gate") if gate else NAMES
    assert set(adapter.state_dict()) == {f"blocks.{index}.{name}" for index in range(2) for name in names}
    count = 200 * 768 + 2 * 4 * 768 + 1
    assert count == 159_745
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 2 * (count + gate)


@pytest.mark.parametrize("masked", [False, True])
def test_multiply_adds_are_the_formula(masked: bool) -> None:
    n, r, batch = 7, 3, 2
    backbone, model = tune(VIT, masked=masked, n=n, r=r)
    plain = memtune.wrap(backbone, MemoryConfig(tokens=0), num_labels=4, masked=masked).eval()

    def multiply_adds(run: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(VIT.images(batch))
        return counter.get_total_flops() // 2

    tokens, width, blocks = 1 if masked else 17, VIT.width, VIT.depth
    transform = 2 * n * r * width
    assert multiply_adds(model) - multiply_adds(plain) == blocks * (batch * 2 * tokens * n * width + transform)


def terms(prompts: BlockPrompts) -> Any:
    return _Terms(Stack([prompts], Selection()), softmax=False)


def test_prompts_start_as_released() -> None:
    prompts = BlockPrompts(64, ApproximatedPromptConfig(n=400, r=40))
    assert 0.019 < prompts.prompts.std() < 0.021
    assert 0.95 < prompts.prompt_A.std() < 1.05
    assert not prompts.prompt_B.any()
    assert prompts.prompt_scale.tolist() == [0]
    states = nn.functional.layer_norm(torch.randn(1, 50, 768), (768,))
    term = terms(BlockPrompts(768, ApproximatedPromptConfig()))(states, torch.zeros_like(states))
    assert 0.17 < term.square().mean().sqrt() < 0.21  # as the file's head says


def test_the_weight_is_held_constant() -> None:
    prompts = BlockPrompts(4, ApproximatedPromptConfig(n=3, r=1))
    scramble(prompts.parameters())
    states = torch.randn(1, 2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(terms(prompts)(states, torch.zeros(1, 2, 4)).sum(), states)
    with torch.no_grad():
        moved = prompts.prompts + prompts.prompts @ prompts.prompt_A @ prompts.prompt_B
        scores = (states @ moved.T).relu()
        weight = prompts.prompt_scale.exp() * scores.amax(-1, keepdim=True)
        expected = weight * ((scores > 0) * prompts.prompts.sum(-1)) @ moved
    torch.testing.assert_close(gradient, expected)


@each([VIT, PLAIN[0]])
def test_checkpointing_gives_the_same_gradients_with_dropout(case: Case) -> None:
    _, model = tune(case, dropout=0.4)
    model.train()

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad(set_to_none=True)
        model(case.images(), labels=torch.tensor([0, 2])).loss.backward()
        return [parameter.grad for parameter in model.task.parameters()]

    expected = gradients()
    model.activation_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected, atol=1e-6, rtol=1e-5)


def test_dropout_works_in_training_alone() -> None:
    _, model = tune(VIT, dropout=0.5)
    with torch.no_grad():
        assert torch.equal(model(VIT.images()).logits, model(VIT.images()).logits)
        model.train()
        assert not torch.equal(model(VIT.images()).logits, model(VIT.images()).logits)


def test_together_with_memory_and_lora() -> None:
    configs = [ApproximatedPromptConfig(**SMALL), MemoryConfig(2), LoraConfig(r=2)]
    tuned = [memtune.wrap(VIT.build(), order, num_labels=3).eval() for order in (configs, configs[::-1])]
    assert tuned[0].task.tensors().keys() == tuned[1].task.tensors().keys()
    scramble(tuned[0].task.parameters())
    tuned[1].task.load_tensors(tuned[0].task.tensors())
    with torch.no_grad():
        torch.testing.assert_close(tuned[0](VIT.images()).logits, tuned[1](VIT.images()).logits)


@pytest.mark.parametrize(
    "settings",
    [
        *({"n": value} for value in (0, -1, 1.0, True, "200", None)),
        *({"r": value} for value in (0, 2.0, False, None)),
        *({"activation": value} for value in ("gelu", None, ["relu"], 1)),
        *({"gate": value} for value in (1, None, "yes")),
        *({"dropout": value} for value in (1.0, -0.1, float("nan"), True, "0.1", None)),
        {"blocks": "0"},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(settings))}: got "):
        ApproximatedPromptConfig(**settings)


def test_settings_can_be_pickled_copied_and_written_as_json_values() -> None:
    config = ApproximatedPromptConfig(n=3, r=1, activation="softmax", gate=True, dropout=0.1, blocks=[1])
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert ApproximatedPromptConfig.from_dict(config.to_dict()) == config
