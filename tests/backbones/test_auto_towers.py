"""AutoBackbones that are towers themselves, in depth models: their maps are those of the tower as a plain model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, Case, assert_same, each, outputs_equal, snapshot
from multitask import tune
from torch import Tensor
from transformers.modeling_outputs import BackboneOutput

import memtune
from memtune import AdapterConfig, ApproximatedPromptConfig, CodaPromptConfig, LoraConfig, MemoryConfig
from memtune.backbones.backbone import Backbone
from memtune.backbones.families import AUTO_TOWERS, PLAIN_TOWERS, TOWERS
from memtune.errors import UnsupportedBackboneError

STAGES: dict[str, Any] = {"out_features": ["stem", "stage1", "stage2"]}
PLAIN_MODEL = {"Dinov2Backbone": BY_NAME["dinov2"], "Dinov2WithRegistersBackbone": BY_NAME["dinov2_with_registers"]}
MAPS = [
    Case(name, name, model.settings | STAGES, config_class=f"{name.removesuffix('Backbone')}Config")
    for name, model in PLAIN_MODEL.items()
]
TOKENS = BY_NAME["dinov2"].settings | {"model_type": "dinov2", "num_hidden_layers": 3, "reshape_hidden_states": False}
TOKENS["out_features"] = ["stem", "stage1", "stage2", "stage3"]
DEPTH: dict[str, Any] = {"backbone_config": TOKENS, "fusion_hidden_size": 16}
DEPTH |= {"neck_hidden_sizes": [8, 8, 16, 16], "reassemble_factors": [4, 2, 1, 0.5]}
DEPTH_MODELS = [
    Case("dpt", "DPTForDepthEstimation", DEPTH, tower_path="backbone"),
    Case(
        "depth-anything",
        "DepthAnythingForDepthEstimation",
        DEPTH | {"head_hidden_size": 8, "reassemble_hidden_size": 16, "patch_size": 8},
        tower_path="backbone",
    ),
]
CONFIGS: list[AdapterConfig] = [
    MemoryConfig(2),
    LoraConfig(r=2, init_lora_weights=False),
    ApproximatedPromptConfig(n=30, r=2),
    CodaPromptConfig(6, 4, blocks=(0, 1)),
]


def each_config(configs: list[AdapterConfig]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", configs, ids=lambda config: config.method)


def plain(tower: Any) -> Any:
    """The plain model of the same tower, with the same weights."""
    case = PLAIN_MODEL[type(tower).__name__]
    model = case.build(num_hidden_layers=tower.config.num_hidden_layers)
    model.load_state_dict(tower.state_dict())
    return model


def adapted(backbone: Any, config: AdapterConfig) -> Any:
    torch.manual_seed(4)
    model = memtune.wrap(backbone, config, head="backbone").eval()
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def maps_of_plain(tower: Any, config: AdapterConfig, images: Tensor) -> tuple[Tensor, ...]:
    """The maps of an adapted tower, made of what the plain model gives when it is adapted in the same way."""
    states = adapted(plain(tower), config)(images, output_hidden_states=True).hidden_states
    maps = [states[tower.stage_names.index(name)] for name in tower.out_features]
    if tower.config.apply_layernorm:
        maps = [tower.layernorm(tokens) for tokens in maps]
    if tower.config.reshape_hidden_states:
        maps = [tokens[:, -16:].mT.unflatten(2, (4, 4)) for tokens in maps]
    return tuple(maps)


def test_the_tables_of_towers_are_apart() -> None:
    assert set(AUTO_TOWERS) == set(PLAIN_MODEL)
    assert not AUTO_TOWERS.keys() & (TOWERS | PLAIN_TOWERS).keys()
    assert not {family.name for family in AUTO_TOWERS.values()} & {family.name for family in TOWERS.values()}


@each_config(CONFIGS[:3])  # CODA prompts have another query: a map has no class token
@each(MAPS)
def test_maps_are_made_of_the_adapted_plain_model(case: Case, config: AdapterConfig) -> None:
    backbone, images = case.build(), case.images()
    with torch.no_grad():
        maps = adapted(backbone, config)(images).feature_maps
        torch.testing.assert_close(maps, maps_of_plain(backbone, config, images), atol=1e-5, rtol=1e-5)
        own = backbone(images).feature_maps
        features = adapted(backbone, config).features(images)
    assert maps[-1].shape == (2, 16, 4, 4)
    assert (maps[-1] - own[-1]).abs().max() > 0.01
    torch.testing.assert_close(features, maps[-1].mean(dim=(2, 3)))


@each_config(CONFIGS)
@each(DEPTH_MODELS)
def test_depth_models_read_the_adapted_maps(case: Case, config: AdapterConfig) -> None:
    backbone, images = case.build(), case.images()
    before = snapshot(backbone)
    model = adapted(backbone, config)
    output = model(images)
    own, decoder = backbone(images), copy.deepcopy(backbone)
    made = BackboneOutput(feature_maps=maps_of_plain(backbone.backbone, config, images))  # type: ignore[arg-type]
    decoder.backbone.forward = lambda *args, **kwargs: made
    expected = decoder(images).predicted_depth
    size = expected.abs().max().item()
    assert list(output) == list(own)
    assert (expected - own.predicted_depth).abs().max() > 1e-3 * size
    torch.testing.assert_close(output.predicted_depth, expected, atol=1e-5 * size, rtol=0)
    output.predicted_depth.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.task.parameters())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    model.detach()
    assert_same(backbone, before)


@each_config(CONFIGS[:2])
@each([*MAPS, *DEPTH_MODELS])
def test_masked_a_task_answers_as_on_the_plain_model(case: Case, config: AdapterConfig) -> None:
    backbone, images = case.build(), case.images()
    model = tune(backbone, config, masked=True)
    other = memtune.wrap(plain(case.tower(backbone)), config, labels=model.task.labels, masked=True).eval()
    other.task.load_tensors(model.task.tensors())
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, other(images).logits, atol=1e-5, rtol=1e-5)


@each(DEPTH_MODELS)
def test_tasks_with_labels_beside_the_depth(case: Case) -> None:
    backbone, images = case.build().requires_grad_(False), case.images()
    tasks = {
        f"{config.method}-{masked}": tune(backbone, config, masked=masked)
        for config in CONFIGS
        for masked in (False, True)
    }
    output = memtune.combine(backbone, tasks)(images)
    assert outputs_equal(output.base, backbone(images))
    for name, task in tasks.items():
        torch.testing.assert_close(output[name].logits, task(images).logits, atol=1e-5, rtol=1e-5)


@each(MAPS)
def test_a_last_map_of_an_earlier_block(case: Case) -> None:
    """A task that changes later blocks alone answers as if it changed nothing; no stream starts after the map."""
    backbone, images = case.build(num_hidden_layers=3), case.images()
    tasks = {str(block): tune(backbone, LoraConfig(r=2, blocks=[block]), masked=False) for block in range(3)}
    answers = memtune.combine(backbone, tasks)(images)
    for name, task in tasks.items():
        torch.testing.assert_close(answers[name].logits, task(images).logits, atol=1e-5, rtol=1e-5)
    bare = tasks["2"].task.logits(Backbone(backbone).features(images))
    torch.testing.assert_close(answers["2"].logits, bare, atol=1e-5, rtol=1e-5)
    assert (tasks["1"].task.logits(Backbone(backbone).features(images)) - answers["1"].logits).abs().max() > 1e-3


def test_the_feature_of_tokens_is_the_class_token() -> None:
    case = DEPTH_MODELS[0]
    backbone = case.build()
    tower = case.tower(backbone)
    with torch.no_grad():
        states = plain(tower)(case.images(), output_hidden_states=True).hidden_states[-1]
        expected = tower.layernorm(states)[:, 0] if tower.config.apply_layernorm else states[:, 0]
        torch.testing.assert_close(Backbone(backbone).features(case.images()), expected)
    assert memtune.explain(tune(backbone, MemoryConfig(2), masked=False), case.images(1)).heads
    with pytest.raises(UnsupportedBackboneError, match="masked=True"):
        memtune.explain(tune(MAPS[0].build(), MemoryConfig(2), masked=False), case.images(1))


def test_a_folder_is_for_the_same_kind_of_tower(tmp_path: Any) -> None:
    case = MAPS[0]
    backbone = case.build()
    model = tune(backbone, MemoryConfig(2), masked=False)
    model.save_pretrained(tmp_path)
    loaded = memtune.load(tmp_path, backbone=case.build())
    assert torch.equal(loaded(case.images()).logits, model(case.images()).logits)
    with pytest.raises(memtune.MemtuneError, match=r"family: got .*dinov2"):  # its feature is another
        memtune.load(tmp_path, backbone=plain(backbone))
