"""CODA prompts: weights, prompts, prefixes and loss equal to the formulas written out slowly, task by task."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    CASES,
    GLOBAL,
    Case,
    assert_same,
    each,
    family_modes,
    outputs_equal,
    snapshot,
)
from dense_pass import dense_forward
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import memtune
from memtune.backbones.backbone import Backbone
from memtune.errors import ConfigError
from memtune.methods import ApproximatedPromptConfig, CodaPromptConfig, LoraConfig, MemoryConfig
from memtune.methods.coda_prompts import BlockPool, CodaPromptAdapter, _Source
from memtune.streams import Selection, Stack, Trunk

VIT = BY_NAME["vit"]
SMALL: dict[str, Any] = {"pool_size": 6, "prompt_length": 4, "num_tasks": 3, "blocks": (0, 1)}
NAMES = ("prefix", "prefix_key", "prefix_attention")
LABELS = torch.tensor([0, 2])


def slow_prompts(query: Tensor, pool: dict[str, Tensor], last: int) -> Tensor:
    """The prompt of each query (batch, length, width), the first `last` components one after another."""
    prompts = []
    for q in query:
        prompt = torch.zeros(pool["prefix"].shape[1:])
        for component, key, attention in zip(*(pool[name][:last] for name in NAMES), strict=True):
            attended = q * attention
            weight = (attended * key).sum() / (attended.norm() * key.norm())
            prompt = prompt + weight * component
        prompts.append(prompt)
    return torch.stack(prompts)


def prefixed(monkeypatch: pytest.MonkeyPatch, case: Case, model: Any, prompts: dict[int, Tensor], first: Any) -> Any:
    """A copy of a model whose eager attention has the prompts as prefix, for the `first` tokens alone or for all."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    for index, block in enumerate(case.blocks(model)):
        attention = getattr(block, case.facts.attention)
        attention.test_prefix = (prompts.get(index), first)
        monkeypatch.setattr(sys.modules[type(attention).__module__], "eager_attention_forward", _attend)
    return model


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **kw: Any) -> Any:
    prompts, first = getattr(module, "test_prefix", (None, None))
    rows, heads, tokens, width = query.shape
    scores = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
    scores = scores if mask is None else scores + mask
    context = torch.empty_like(query)
    for row in range(rows):
        for head in range(heads):
            for token in range(tokens):
                score, values = scores[row, head, token], value[row, head]
                if prompts is not None and (first is None or token < first):
                    prompt = prompts[row * len(prompts) // rows, :, head * width : (head + 1) * width]
                    half = len(prompt) // 2
                    score = torch.cat([prompt[:half] @ query[row, head, token] * width**-0.5, score])
                    values = torch.cat([prompt[half:], values])
                context[row, head, token] = score.softmax(0) @ values
    return context.transpose(1, 2), None


def tune(case: Case, *, masked: bool = False, backbone: Any = None, **settings: Any) -> tuple[Any, memtune.TunedModel]:
    backbone = backbone or case.build()
    model = memtune.wrap(backbone, CodaPromptConfig(**(SMALL | settings)), num_labels=4, masked=masked).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.task.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + noise) + (0 if "prefix" in name else noise))  # rows not in use stay 0
    return backbone, model


def adapter_of(model: memtune.TunedModel) -> CodaPromptAdapter:
    adapter = model.task.adapters[0]
    assert isinstance(adapter, CodaPromptAdapter)
    return adapter


def pools_of(model: memtune.TunedModel) -> dict[int, dict[str, Tensor]]:
    tensors = adapter_of(model).state_dict()
    indices = {int(key.split(".")[1]) for key in tensors}
    return {index: {name: tensors[f"blocks.{index}.{name}"] for name in NAMES} for index in sorted(indices)}


def query_of(case: Case, backbone: Any, images: Tensor) -> Tensor:
    return case.facts.feature(case.tower(backbone), case.run_tower(backbone, images))


@pytest.mark.parametrize("settings", [{}, {"task": 1}, {"blocks": [-1], "num_tasks": 1}], ids=str)
@each(CASES)
def test_unmasked_logits_are_the_formula(case: Case, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, model = tune(case, **settings)
    last = {"task": 4, "blocks": 6}.get(next(iter(settings), ""), 2)
    pools = pools_of(model)
    assert sorted(pools) == ([case.depth - 1] if "blocks" in settings else [0, 1])
    with torch.no_grad():
        logits = model(case.images()).logits
        query = query_of(case, backbone, case.images())
        prompts = {index: slow_prompts(query, pool, last) for index, pool in pools.items()}
        changed = prefixed(monkeypatch, case, backbone, prompts, None)
        expected = model.task.head(query_of(case, changed, case.images()))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (logits - model.task.head(query)).abs().max() > 1e-3  # the oracle does see the prompts


@each(GLOBAL)
def test_masked_the_task_token_alone_sees_the_prefix(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, model = tune(case, masked=True)
    images, token = case.images(), model.task.class_token
    nothing = [torch.zeros(0, case.width)] * case.depth
    with torch.no_grad():
        feature = model.features(images)
        _, output = model._trunk.run(images)
        assert torch.equal(output.last_hidden_state, case.run_tower(backbone, images).last_hidden_state)
        query = query_of(case, backbone, images)
        prompts = {index: slow_prompts(query, pool, 2) for index, pool in pools_of(model).items()}
        expected, _ = dense_forward(case, prefixed(monkeypatch, case, backbone, prompts, 1), nothing, token, images)
        bare, _ = dense_forward(case, backbone, nothing, token, images)
    torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-5)
    assert (feature - bare).abs().max() > 1e-3


@each(GLOBAL)
def test_the_trunk_gives_the_query_in_masked_mode(case: Case) -> None:
    backbone = case.build()
    with torch.no_grad():
        current, _ = Trunk(Backbone(backbone)).run(case.images())
        torch.testing.assert_close(current.query, query_of(case, backbone, case.images()))


@pytest.mark.parametrize("masked", [False, True])
def test_masked_mode_takes_one_pass_over_the_image_in_place_of_two(masked: bool) -> None:
    backbone = VIT.build()
    passes: list[None] = []
    backbone.embeddings.register_forward_hook(lambda module, args, output: passes.append(None))
    model = memtune.wrap(backbone, CodaPromptConfig(**SMALL), num_labels=2, masked=masked)
    model(VIT.images())
    assert len(passes) == (1 if masked else 2)


def test_each_image_has_its_own_prompt() -> None:
    _, model = tune(VIT)
    images = VIT.images(3)
    with torch.no_grad():
        together = model(images).logits
        torch.testing.assert_close(together, torch.cat([model(image[None]).logits for image in images]))


@pytest.mark.parametrize("task", [0, 1, 2])
def test_weights_and_prompts_task_by_task(task: int) -> None:
    _, model = tune(VIT, pool_size=7, task=task)  # 7 over 3 tasks: 2 for each, 1 is never used
    query = torch.randn(5, 16)
    for index, pool in pools_of(model).items():
        expected = slow_prompts(query, pool, 2 * (task + 1))
        composed = _Source(Stack([adapter_of(model)._pools()[index]], Selection())).compose(query).squeeze(1)
        torch.testing.assert_close(composed, expected, atol=1e-6, rtol=1e-5)
        assert not pool["prefix"][2 * (task + 1) :].any()


def test_new_rows_are_orthogonal_unit_vectors_and_later_ones_zero() -> None:
    adapter = CodaPromptAdapter(CodaPromptConfig(**SMALL), Backbone(VIT.build()))
    for task in range(3):
        adapter.start_task(task)
        for pool in adapter._pools().values():
            for parameter in pool.parameters():
                rows = parameter.flatten(1)
                used = torch.zeros(6)
                used[: 2 * (task + 1)] = 1
                torch.testing.assert_close(rows @ rows.T, torch.diag(used), atol=1e-5, rtol=0)


def test_new_rows_lose_their_projections_on_trained_ones() -> None:
    pool = BlockPool(CodaPromptConfig(**SMALL), 16, 16)
    with torch.no_grad():
        pool.prefix_key[:2] = torch.randn(2, 16)
        before = pool.prefix_key[:2].clone()
        torch.manual_seed(9)
        pool.start(slice(2, 4))
        torch.manual_seed(9)
        _, _, drawn = torch.randn(4 * 16), torch.randn(4 * 16), torch.randn(16)  # the rows of the prefix come first
        left = drawn - sum((drawn * row).sum() / (row * row).sum() * row for row in before)
    torch.testing.assert_close(pool.prefix_key[2], left / left.norm(), atol=1e-5, rtol=1e-5)
    assert torch.equal(pool.prefix_key[:2], before)


@family_modes
def test_frozen_rows_stay_bit_for_bit(case: Case, masked: bool) -> None:
    model = memtune.wrap(case.build(), CodaPromptConfig(**SMALL), num_labels=3, masked=masked).train()
    adapter = adapter_of(model)
    for task in range(3):
        adapter.start_task(task)
        before = copy.deepcopy(adapter.state_dict())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, 0.01)  # new for each task, without weight decay
        for _ in range(3):
            optimizer.zero_grad()
            model(case.images(), labels=LABELS).loss.backward()
            optimizer.step()
        for name, tensor in adapter.state_dict().items():
            assert torch.equal(tensor[: 2 * task], before[name][: 2 * task]), name
            assert torch.equal(tensor[2 * (task + 1) :], before[name][2 * (task + 1) :]), name
            assert (tensor != before[name])[2 * task : 2 * (task + 1)].flatten(1).any(1).all(), name
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_tasks_begin_one_after_another() -> None:
    adapter = CodaPromptAdapter(CodaPromptConfig(**SMALL), Backbone(VIT.build()))
    for wrong in (2, -1, 0.5):
        with pytest.raises(ConfigError, match="task: got"):
            adapter.start_task(wrong)
    before = copy.deepcopy(adapter.state_dict())
    adapter.start_task(0)  # the present one
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    adapter.start_task(1)
    adapter.start_task(2)
    with pytest.raises(ConfigError, match="task: got 3, expected a number below num_tasks=3"):
        adapter.start_task(3)
    assert adapter.config.task == 2


def slow_distance(rows: list[Tensor]) -> Tensor:
    products = [((a * b).sum() - float(i == j)) ** 2 for i, a in enumerate(rows) for j, b in enumerate(rows)]
    return torch.stack(products).mean()


@pytest.mark.parametrize("task", [0, 2])
def test_orthogonality_loss(task: int) -> None:
    _, model = tune(VIT, ortho_mu=0.3, task=task)
    rows = 2 * (task + 1)
    expected = 0.3 * sum(
        slow_distance([*t[:rows].flatten(1)]) for pool in pools_of(model).values() for t in pool.values()
    )
    torch.testing.assert_close(adapter_of(model).penalty(), expected)
    logits = model(VIT.images()).logits
    plain = nn.functional.cross_entropy(logits, LABELS)
    torch.testing.assert_close(model(VIT.images(), labels=LABELS).loss, plain)  # not in evaluation
    model.train()
    loss = model(VIT.images(), labels=LABELS).loss
    torch.testing.assert_close(loss, plain + expected)
    loss.backward()
    first = adapter_of(model).get_parameter("blocks.0.prefix_key").grad
    assert not first[: 2 * task].any()
    assert first[2 * task : rows].abs().max() > 0
    assert tune(VIT)[1].task.penalty() is None


def test_keys_and_count() -> None:
    torch.set_num_threads(1)  # as in the zoo
    config = ViTConfig(num_hidden_layers=5, intermediate_size=8)
    backbone = Backbone(ViTModel(config, add_pooling_layer=False))
    adapter = CodaPromptAdapter(CodaPromptConfig(), backbone)
    assert set(adapter.state_dict()) == {f"blocks.{index}.{name}" for index in range(5) for name in NAMES}
    assert (
        sum(parameter.numel() for parameter in adapter.parameters()) == 5 * (100 * 8 * 768 + 2 * 100 * 768) == 3_840_000
    )
    _, model = tune(VIT)
    counts = model.trainable_parameters()
    assert counts["coda_prompts"] == 2 * (6 * 4 * 16 + 2 * 6 * 16)
    assert counts["class_token"] == 0


@pytest.mark.parametrize("masked", [False, True])
def test_the_task_is_saved_with_the_adapter(masked: bool, tmp_path: Any) -> None:
    backbone = VIT.build()
    before = snapshot(backbone)
    _, model = tune(VIT, backbone=backbone, masked=masked)
    adapter_of(model).start_task(1)
    model.save_pretrained(tmp_path)
    again = memtune.load(tmp_path, backbone=VIT.build())
    with torch.no_grad():
        assert torch.equal(again(VIT.images()).logits, model(VIT.images()).logits)
    again.train()
    again(VIT.images(), labels=LABELS).loss.backward()
    gradient = adapter_of(again).get_parameter("blocks.0.prefix").grad
    assert not gradient[:2].any()
    assert gradient[2:4].any()
    adapter_of(again).start_task(2)
    with torch.no_grad(), model.disable_adapter():
        assert outputs_equal(model(VIT.images()), backbone(VIT.images()))
    assert_same(model.detach(), before)


@pytest.mark.parametrize("masked", [False, True])
def test_every_row_in_use_gets_a_gradient(masked: bool) -> None:
    config = CodaPromptConfig(**(SMALL | {"num_tasks": 1}))
    model = memtune.wrap(VIT.build(), config, num_labels=3, masked=masked).train()
    model(VIT.images(), labels=LABELS).loss.backward()
    for name, parameter in adapter_of(model).named_parameters():
        assert parameter.grad.flatten(1).abs().amax(1).min() > 0, name


@pytest.mark.parametrize("masked", [False, True])
def test_copies_are_independent(masked: bool) -> None:
    _, model = tune(VIT, masked=masked)
    with torch.no_grad():
        before = model(VIT.images()).logits
        again = copy.deepcopy(model)
        assert torch.equal(again(VIT.images()).logits, before)
        adapter_of(again).start_task(1)
        assert not torch.equal(again(VIT.images()).logits, before)
        assert torch.equal(model(VIT.images()).logits, before)
    assert adapter_of(model).config.task == 0


@pytest.mark.parametrize("masked", [False, True])
def test_images_of_another_size_are_interpolated(masked: bool) -> None:
    backbone, model = tune(VIT, masked=masked)
    images = VIT.images(size=48)
    with torch.no_grad():
        model(images, interpolate_pos_encoding=True)
        current, _ = Trunk(Backbone(backbone)).run(images, interpolate_pos_encoding=True)
        expected = backbone(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    torch.testing.assert_close(current.query, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_together_with_other_methods(masked: bool) -> None:
    configs = [CodaPromptConfig(**SMALL), MemoryConfig(2), ApproximatedPromptConfig(n=5), LoraConfig(r=2)]
    models = [
        memtune.wrap(VIT.build(), order, num_labels=3, masked=masked).eval() for order in (configs, configs[::-1])
    ]
    models[1].task.load_tensors(models[0].task.tensors())
    with torch.no_grad():
        torch.testing.assert_close(models[0](VIT.images()).logits, models[1](VIT.images()).logits)


@pytest.mark.parametrize(
    "settings",
    [
        *({"pool_size": value} for value in (0, -1, 1.0, True, "100", None)),
        *({"prompt_length": value} for value in (0, 1, 3, 8.0, True, None)),
        *({"num_tasks": value} for value in (0, 101, 2.0, True, None)),
        *({"ortho_mu": value} for value in (-0.1, float("nan"), float("inf"), True, "0", None)),
        *({"task": value} for value in (-1, 1, 0.0, True, None)),
        {"blocks": "0"},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(settings))}: got "):
        CodaPromptConfig(**settings)


def test_what_does_not_fit_the_backbone_is_refused_before_anything_changes() -> None:
    backbone = VIT.build()
    before = snapshot(backbone)
    for settings, words in [({}, r"blocks: got \[2, 3, 4\]"), ({"blocks": [0]}, "pool_size: got 100.*at most 16")]:
        with pytest.raises(ConfigError, match=words):
            memtune.wrap(backbone, CodaPromptConfig(**settings), num_labels=2)
    assert_same(backbone, before)


def test_settings_can_be_pickled_copied_and_written_as_json_values() -> None:
    config = CodaPromptConfig(pool_size=12, prompt_length=2, num_tasks=4, ortho_mu=1e-6, task=3, blocks=[1, 0])
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert CodaPromptConfig.from_dict(config.to_dict()) == config
    assert CodaPromptConfig.from_dict(CodaPromptConfig().to_dict()) == CodaPromptConfig()


@torch.no_grad()
def test_the_query_is_that_of_the_kernel_the_backbone_is_set_to():
    backbone = BY_NAME["siglip"].build()
    images = BY_NAME["siglip"].images()
    answers = []
    for kernel in ("sdpa", "eager"):
        backbone.set_attn_implementation(kernel)
        torch.manual_seed(0)
        model = memtune.wrap(backbone, CodaPromptConfig(pool_size=4, blocks=[0]), num_labels=2).eval()
        answers.append(model(images).logits)
        model.detach()
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)
