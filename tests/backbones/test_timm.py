"""timm's vision transformers: the contract of every method, and transformers' own models with the same weights.

Where timm is not installed, `test_timm_and_torchvision.py` runs this file in a process that has it.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbone_zoo import each, outputs_equal
from contract_cases import ROWS, Row, moved
from docs_material import pictures
from torch import Tensor, nn

pytest.importorskip("timm")

import timm
from contract_promises import PROMISES, Promise
from timm_zoo import BY_NAME, CASES, SMALL, TimmCase

import memtune
from memtune import ApproximatedPromptConfig, CodaPromptConfig, LoraConfig, MemoryConfig, SideNetworkConfig
from memtune.backbones.backbone import Backbone, as_pretrained
from memtune.backbones.fingerprints import fingerprint, same_weights
from memtune.backbones.fused import LinearPart
from memtune.errors import BackboneMismatchError, CheckpointError, ConfigError, InputError, UnsupportedBackboneError
from memtune.explaining.explanation import explain
from memtune.models.export import export_program
from memtune.streams import Trunk
from memtune.training.token_selection import TokenTune

VIT = BY_NAME["timm-vit"]
ROLES = ("query", "key", "value", "out", "fc1", "fc2")
CONFIGS: list[memtune.AdapterConfig] = [
    MemoryConfig(tokens=3),
    LoraConfig(r=3, roles=ROLES, init_lora_weights=False),
    LoraConfig(r=2, init_lora_weights=False),  # query and value, or all six
    LoraConfig(r=3, roles=("query", "out", "fc1"), use_dora=True, init_lora_weights=False),
    ApproximatedPromptConfig(n=50, r=2),
    CodaPromptConfig(pool_size=6, prompt_length=4, blocks=(0, 1)),
]

modes = pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
methods = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{CONFIGS.index(config)}")


def wrapped(backbone: Any, config: Any, masked: bool, **options: Any) -> memtune.TunedModel:
    torch.manual_seed(3)
    return moved(memtune.wrap(backbone, config, num_labels=4, masked=masked, **options)).eval()


@pytest.mark.parametrize("case", [VIT, BY_NAME["timm-dinov2-registers"], BY_NAME["timm-siglip"]], ids=lambda c: c.name)
@pytest.mark.parametrize(("row", "masked"), [(row, masked) for row in ROWS for masked in row.modes])
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_every_method_keeps_the_contract(promise: Promise, row: Row, masked: bool, case: TimmCase) -> None:
    mixes = isinstance(row.config, SideNetworkConfig) and row.config.mixing == "conv"
    if mixes and case.name == "timm-siglip":  # whose tokens are all patches
        keys = tuple(key for key in row.keys if key != "own")
        pooled = {key: count for key, count in row.pooled.items() if "first" not in key}
        row = replace(row, keys=keys, count=lambda *given, count=row.count: count(*given) - 8 * 8, pooled=pooled)
    promise(row, case, masked)


@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "eager"])
@each(CASES)
def test_the_trunk_answers_bit_for_bit_as_timm(case: TimmCase, fused: bool) -> None:
    bare, images = case.bare(), case.images()
    for block in bare.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad():
        tokens, expected = bare.forward_features(images), bare(images)
        trunk = Trunk(Backbone(bare))
        current, output = trunk.run(images)
        assert torch.equal(output.last_hidden_state, tokens)
        _, answer = trunk.answer(images)
        wrapper = as_pretrained(bare)
        assert outputs_equal(answer, wrapper(images))
        assert torch.equal(answer.logits if "logits" in answer else answer.pooler_output, expected)
        assert torch.equal(bare(images), expected)
    assert current.query is not None
    assert [block.bias for block in current.trunk] == [None, None]


@each(CASES)
def test_the_feature_is_what_timms_classifier_reads(case: TimmCase) -> None:
    bare = case.bare()
    read: list[Tensor] = []
    bare.head_drop.register_forward_hook(lambda module, args, output: read.append(output))
    with torch.no_grad():
        bare(case.images())
        del read[2:]
        expected = sum(read) / len(read)  # a distilled model means two
        found = Backbone(bare).view().features(case.images())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@each([case for case in CASES if case.facts.class_token])
def test_class_token_and_first_position(case: TimmCase) -> None:
    bare = case.bare()
    backbone = Backbone(bare)
    assert backbone.class_token is bare.cls_token
    entered: list[Tensor] = []
    bare.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        bare(case.images())
        torch.testing.assert_close(backbone.start(bare.cls_token), entered[0][:1, :1])
    assert backbone.reads_class_token == (case.name not in ("timm-mean", "timm-deit-distilled"))


# The same weights in transformers' own models.


def copy_blocks(inner: Any, blocks: Any, names: dict[str, str]) -> None:
    """Copy the blocks of a model of transformers into those of timm's, whose parts have the names given."""
    for mine, theirs in zip(inner.blocks, blocks, strict=True):
        for path, name in names.items():
            mine.get_submodule(path).load_state_dict(theirs.get_submodule(name).state_dict())
        attention = theirs.get_submodule(names["attn"]) if "attn" in names else theirs.attention
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        mine.attn.qkv.weight.data.copy_(torch.cat([part.weight for part in parts]))
        mine.attn.qkv.bias.data.copy_(torch.cat([part.bias for part in parts]))


def vit_pair() -> tuple[Any, Any, Tensor]:
    """A ViT of transformers, timm's with its weights, and what differs between their class tokens."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    torch.manual_seed(1)
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    shake(theirs)
    mine = VIT.bare()
    with torch.no_grad():
        mine.cls_token.copy_(theirs.embeddings.cls_token)
        mine.pos_embed.copy_(theirs.embeddings.position_embeddings)
    mine.patch_embed.proj.load_state_dict(theirs.embeddings.patch_embeddings.projection.state_dict())
    mine.norm.load_state_dict(theirs.layernorm.state_dict())
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    copy_blocks(mine, theirs.layers, names | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"})
    return theirs, mine, torch.zeros(16)


def registers_pair() -> tuple[Any, Any, Tensor]:
    """The same for DINOv2 with registers: layer scale, and a class token whose position timm has added to it."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 4}
    config = transformers.Dinov2WithRegistersConfig(**small, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    torch.manual_seed(1)
    theirs = transformers.Dinov2WithRegistersModel(config).eval()
    shake(theirs)
    mine = BY_NAME["timm-dinov2-registers"].bare()
    position = theirs.embeddings.position_embeddings.detach()
    with torch.no_grad():
        mine.cls_token.copy_(theirs.embeddings.cls_token + position[:, :1])
        mine.reg_token.copy_(theirs.embeddings.register_tokens)
        mine.pos_embed.copy_(position[:, 1:])
        for block, other in zip(mine.blocks, theirs.encoder.layer, strict=True):
            block.ls1.gamma.copy_(other.layer_scale1.lambda1)
            block.ls2.gamma.copy_(other.layer_scale2.lambda1)
    mine.patch_embed.proj.load_state_dict(theirs.embeddings.patch_embeddings.projection.state_dict())
    mine.norm.load_state_dict(theirs.layernorm.state_dict())
    names = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj"}
    copy_blocks(mine, theirs.encoder.layer, names | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"})
    return theirs, mine, position[0, 0]


def shake(model: nn.Module) -> None:
    """Every parameter random."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


@methods
@modes
@pytest.mark.parametrize("pair", [vit_pair, registers_pair], ids=lambda pair: pair.__name__.removesuffix("_pair"))
def test_adapters_answer_as_on_transformers_own_model(pair: Any, masked: bool, config: Any) -> None:
    theirs, mine, position = pair()
    images = VIT.images()
    with torch.no_grad():
        feature = theirs(images).last_hidden_state[:, 0]
        torch.testing.assert_close(mine.forward_head(mine.forward_features(images), pre_logits=True), feature)
    expected, found = (wrapped(model, config, masked) for model in (theirs, mine))
    tensors = expected.task.tensors()
    if "class_token" in tensors:
        tensors["class_token"] = tensors["class_token"] + position
    found.task.load_tensors(tensors)
    with torch.no_grad():
        torch.testing.assert_close(found(images).logits, expected(images).logits, atol=1e-5, rtol=0)
        bare = memtune.wrap(mine, [], num_labels=4, masked=masked).eval()
        assert (bare.features(images) - found.features(images)).abs().max() > 1e-3  # the adapter does something


# A timm model without a wrapper.


def test_wrapping_a_timm_model_leaves_it_alone() -> None:
    bare = VIT.bare().train()
    bare.set_grad_checkpointing()
    next(bare.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in bare.state_dict().items()}
    modules = {name: (id(module), set(vars(module))) for name, module in bare.named_modules()}
    one = memtune.wrap(bare, LoraConfig(r=2), num_labels=2)
    two = memtune.wrap(bare, MemoryConfig(2), num_labels=2, masked=True)
    assert one.backbone is two.backbone is as_pretrained(bare)
    assert one.backbone.timm_model is bare
    assert not any(parameter.requires_grad for parameter in bare.parameters())
    assert one.detach() is two.backbone
    assert not any(parameter.requires_grad for parameter in bare.parameters())  # the other needs it frozen
    two.detach()
    assert [parameter.requires_grad for parameter in bare.parameters()][:2] == [False, True]
    assert bare.training
    assert bare.grad_checkpointing
    assert modules == {name: (id(module), set(vars(module))) for name, module in bare.named_modules()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in bare.state_dict().items())


def test_memtune_imports_no_timm() -> None:
    code = "import sys, torchvision_operators, memtune.peft_format; print('timm' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "False\n"


def test_the_wrapper_describes_the_model(tmp_path: Path) -> None:
    wrapper = VIT.build()
    assert type(wrapper) is transformers.TimmWrapperForImageClassification
    assert type(BY_NAME["timm-vit-no-head"].build()) is transformers.TimmWrapperModel
    assert wrapper.config.architecture == "vit_tiny_patch16_224"
    assert wrapper.config.num_labels == 3
    assert wrapper.config.pretrained_cfg["input_size"] == [3, 32, 32]
    assert wrapper.name_or_path == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    backbone = Backbone(wrapper)
    assert backbone.describe() == {
        "family": "timm_vit",
        "depth": 2,
        "widths": [16],
        "heads": [2],
        "patch_size": [8, 8],
        "image_size": [32, 32],
        "channels": 3,
        "pooling": "token",
    }
    wrapper.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(VIT.images()).logits, wrapper(VIT.images()).logits)
    assert fingerprint(Backbone(again)) == fingerprint(backbone)


def test_an_adapter_goes_from_the_bare_model_to_the_wrapper(tmp_path: Path) -> None:
    model = wrapped(VIT.bare(), [MemoryConfig(2), LoraConfig(r=2)], True)
    model.save_pretrained(tmp_path / "adapter")
    model.backbone.save_pretrained(tmp_path / "wrapper")
    again = transformers.AutoModel.from_pretrained(tmp_path / "wrapper")
    for backbone in (VIT.bare(), again):
        loaded = memtune.load(tmp_path / "adapter", backbone=backbone)
        assert torch.equal(loaded(VIT.images()).logits, model(VIT.images()).logits)
    with pytest.raises(memtune.MemtuneError, match="the same shape but other weights"):
        memtune.load(tmp_path / "adapter", backbone=VIT.bare(seed=1))


@pytest.mark.parametrize("part", ["blocks.1.attn.qkv.weight", "blocks.0.attn.qkv.bias", "cls_token", "norm.weight"])
def test_the_fingerprint_sees_every_part(part: str) -> None:
    one, other = VIT.bare(), VIT.bare()
    names = [name for name, _ in Backbone(one).parameters_by_role()]
    assert "blocks.1.value.weight" in names
    assert len(names) == len(set(names)) == 2 + 1 + 2 * 16 + 2
    other.get_parameter(part).data.add_(0.1)
    assert same_weights(fingerprint(Backbone(one)), fingerprint(Backbone(VIT.bare())))
    assert not same_weights(fingerprint(Backbone(one)), fingerprint(Backbone(other)))


def test_a_view_follows_its_model_to_another_precision() -> None:
    bare, images = VIT.bare(), VIT.images()
    model = wrapped(bare, LoraConfig(r=2, init_lora_weights=False), False)
    expected = model(images).logits
    bare.to(torch.float64)
    torch.testing.assert_close(model(images.double()).logits.float(), expected, atol=1e-5, rtol=0)
    bare.load_state_dict(VIT.bare(seed=1).state_dict())
    other = wrapped(VIT.bare(seed=1), LoraConfig(r=2, init_lora_weights=False), False)
    other.task.load_tensors(model.task.tensors())
    torch.testing.assert_close(model(images.double()).logits.float(), other(images).logits, atol=1e-5, rtol=0)


# What is made of adapters.


def test_tasks_of_both_modes_answer_together() -> None:
    bare, images = VIT.bare(), VIT.images()
    configs = {"memory": MemoryConfig(2), "lora": LoraConfig(r=2), "prompts": ApproximatedPromptConfig(n=5, r=2)}
    tasks = {
        f"{name}-{masked}": wrapped(bare, config, masked)
        for name, config in configs.items()
        for masked in (False, True)
    }
    both = memtune.combine(bare, tasks)
    with torch.no_grad():
        output = both(images)
        assert torch.equal(output.base.logits, bare(images))
        for name, model in tasks.items():
            torch.testing.assert_close(output[name].logits, model(images).logits, atol=1e-5, rtol=0)
        mixed = both(images, rows=["lora-False", "memory-True"])
        torch.testing.assert_close(mixed[0].logits, output["lora-False"].logits[:1], atol=1e-5, rtol=0)
        torch.testing.assert_close(mixed[1].logits, output["memory-True"].logits[1:], atol=1e-5, rtol=0)
        program = export_program(both).module()(images)
    for name in tasks:
        torch.testing.assert_close(program[name], output[name].logits, atol=1e-5, rtol=0)
    assert torch.allclose(program["base"], output.base.logits, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
@each(CASES)
def test_merged_model_equals_the_tuned_one(case: TimmCase, settings: dict[str, Any], tmp_path: Path) -> None:
    bare, images = case.bare(), case.images()
    before = copy.deepcopy(bare.state_dict())
    tuned = wrapped(bare, LoraConfig(r=3, roles=ROLES, init_lora_weights=False, **settings), False)
    expected = tuned(images).logits
    merged: Any = tuned.merge()
    assert type(merged) is transformers.TimmWrapperForImageClassification
    torch.testing.assert_close(merged(images).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.timm_model(images), expected, atol=1e-5, rtol=1e-5)
    assert merged.config.num_labels == merged.timm_model.num_classes == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in bare.state_dict().items())
    merged.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images).logits, expected, atol=1e-5, rtol=1e-5)


def test_peft_has_no_name_for_a_part(tmp_path: Path) -> None:
    tuned = wrapped(VIT.bare(), LoraConfig(r=2), False)
    with pytest.raises(ConfigError, match=r"query, key and value in one linear layer.*use merge\(\)"):
        tuned.export_peft(tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(CheckpointError):
        memtune.peft_format.import_peft(tmp_path, VIT.bare())


def test_token_tune_and_explanations() -> None:
    bare, images = BY_NAME["timm-dinov2-registers"].bare(), VIT.images()
    model = wrapped(bare, MemoryConfig(3), False)
    shown = explain(model, images[:1])
    assert shown.blocks[0].registers.shape == (4,)
    assert sum(part.item() for part in shown.blocks[1].shares().values()) == pytest.approx(1, abs=1e-5)
    token_tune, expected = TokenTune(5), model.train()(images).logits
    token_tune.on_step_begin(model)
    selected = model(images, labels=torch.tensor([0, 1]))
    token_tune.on_step_end(model)
    assert torch.equal(selected.logits, expected)
    selected.loss.backward()
    assert all(parameter.grad is not None for parameter in model.task.parameters())


@pytest.mark.slow
@modes
def test_compiles_without_a_break_in_the_graph(masked: bool) -> None:
    model, images = wrapped(VIT.bare(), [MemoryConfig(2), LoraConfig(r=2)], masked), VIT.images()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).logits, model(images).logits)


def test_training_with_a_cache_and_a_processor_of_timms(tmp_path: Path) -> None:
    cfg = VIT.build().config.pretrained_cfg
    processor = transformers.TimmWrapperImageProcessor(cfg, "vit_tiny_patch16_224")
    dataset = pictures(["a", "b"], 2, 0)
    model = memtune.wrap(VIT.bare(), MemoryConfig(2), labels=["a", "b"], masked=True, processor=processor)
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "disable_tqdm": True}
    config = memtune.TrainingConfig(output_dir=tmp_path / "run", trunk_cache=tmp_path / "cache", **settings)
    memtune.fit(model, dataset, dataset, config=config)
    with pytest.raises(
        InputError, match="TimmWrapperImageProcessor makes no images of 40 x 40 pixels: it has a size of its own"
    ):
        memtune.fit(
            model, dataset, config=memtune.TrainingConfig(output_dir=tmp_path / "no", image_size=40, **settings)
        )
    model.save_pretrained(tmp_path / "adapter")
    loaded = memtune.load(tmp_path / "adapter", backbone=VIT.bare())
    assert type(loaded.processor) is type(processor)
    shown = [picture.resize((40, 36)) for picture in dataset["image"]]
    images = processor(shown).pixel_values
    assert images.shape == (4, 3, 32, 32)
    assert torch.equal(loaded.processor(shown).pixel_values, images)
    assert torch.equal(loaded(images).logits, model.eval()(images).logits)


# What is refused.


@modes
def test_images_of_another_size(masked: bool) -> None:
    model = wrapped(VIT.bare(), MemoryConfig(2), masked)
    for options in ({}, {"interpolate_pos_encoding": True}):
        with pytest.raises(InputError, match=r"got 40 x 40 pixels, expected 32 x 32.*dynamic_img_size=True"):
            model(VIT.images(size=40), **options)
    bare = VIT.bare(dynamic_img_size=True)
    dynamic = wrapped(bare, LoraConfig(r=2), masked)
    dynamic.task.adapters[0].requires_grad_(False)
    assert dynamic(VIT.images(size=40)).logits.shape == (2, 4)
    with pytest.raises(InputError, match=r"got 36 x 36 pixels, expected multiples of the patch size \[8, 8\]"):
        dynamic(VIT.images(size=36))
    with torch.no_grad():
        _, output = Trunk(Backbone(bare)).run(VIT.images(size=40))
        assert torch.equal(output.last_hidden_state, bare.forward_features(VIT.images(size=40)))
        torch.testing.assert_close(dynamic(VIT.images()).logits, dynamic(VIT.images(size=32)).logits)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet18", None, "got timm's ResNet"),
        ("eva02_tiny_patch14_224", None, "got timm's Eva"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, r"norms of queries and keys \(qk_norm\)"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "global_pool='', which leaves more than one feature"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "blocks of the class Block with DiffAttention"),
        ("vit_small_patch16_18x2_224", {}, "blocks of the class ParallelThingsBlock"),
    ],
)
def test_other_models_are_refused_by_name(name: str, settings: Any, message: str) -> None:
    model = timm.create_model(name, **({"num_classes": 2} if settings is None else SMALL | settings))
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UnsupportedBackboneError, match=message):
        memtune.wrap(model, MemoryConfig(2), num_labels=2)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_parts_are_refused_that_are_not_slices() -> None:
    bare = VIT.bare()
    bare.blocks[1].attn.gate = nn.Linear(16, 16)
    bare.blocks[0].attn.qkv = LinearPart(nn.Linear(16, 60), 0, 48)
    with pytest.raises(UnsupportedBackboneError, match=r"in a LinearPart, expected torch.nn.Linear; a gate on"):
        memtune.wrap(bare, MemoryConfig(2), num_labels=2)


def test_a_model_that_pools_otherwise_is_another_one(tmp_path: Path) -> None:
    model = wrapped(VIT.build(), LoraConfig(r=2), False)
    model.save_pretrained(tmp_path)
    inner = VIT.build().timm_model
    inner.reset_classifier(3, "avg")
    with pytest.raises(BackboneMismatchError, match="pooling: got avg, expected token"):
        memtune.load(tmp_path, backbone=inner)
