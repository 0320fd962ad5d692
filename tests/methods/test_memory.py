"""Memory tokens: their number, their start, and that unmasked they equal VPT-deep written out slowly."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, CASES, FAMILIES, Case, each
from segformer import SlowSegformer
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import ViTConfig, ViTModel

import memtune
from memtune import MemoryConfig
from memtune.errors import ConfigError


def vpt_deep(
    case: Case, model: nn.Module, prompts: dict[int, Tensor], class_token: Tensor | None, images: Tensor, **options: Any
) -> Tensor:
    """What a head reads, (batch, width), when every block gets prompts before its first norm and drops their outputs.

    The Hugging Face blocks run as they are; the prompts become tokens, so they are queries too and pass the MLP. They
    stand before the other tokens, where DINOv3 rotates none. A Segformer is written out whole.
    """
    if case.facts.staged and not case.facts.windowed:
        return SlowSegformer(case.tower(model), prompts).maps(images)[-1].mean(dim=(2, 3))
    model = copy.deepcopy(model)
    tower = case.tower(model)
    if class_token is not None:
        tower.get_parameter(case.facts.class_token).data.copy_(class_token)
    for name, module in tower.named_modules():
        if name.endswith(("relative_position_bias", "shared_position_bias")):
            number = next(iter(prompts.values())).shape[0]
            module.register_forward_hook(partial(_pad_bias, number))
    for index, prompt in prompts.items():
        block = case.blocks(model)[index]
        if case.facts.windowed:  # each window gets the prompts, after the norm that is computed token by token
            block.attention.register_forward_pre_hook(partial(_into_windows, block.layernorm_before(prompt)))
            block.attention.register_forward_hook(partial(_drop, len(prompt)))
        else:
            block.register_forward_pre_hook(partial(_prepend, prompt), with_kwargs=True)
            block.register_forward_hook(partial(_drop, len(prompt)))
    return case.facts.feature(tower, case.run_tower(model, images, **options))


def _pad_bias(number: int, module: nn.Module, args: Any, bias: Tensor) -> Tensor:
    return pad(bias, (number, 0, number, 0))


def _into_windows(prompt: Tensor, module: nn.Module, args: Any) -> Any:
    windows, mask = args
    number = len(prompt)
    windows = torch.cat([prompt.expand(len(windows), -1, -1), windows], dim=1)
    return windows, None if mask is None else pad(mask, (number, 0, number, 0))


def _prepend(prompt: Tensor, module: nn.Module, args: Any, kwargs: Any) -> Any:
    tokens, *rest = args
    return (torch.cat([prompt.expand(len(tokens), -1, -1), tokens], dim=1), *rest), kwargs


def _drop(number: int, module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0][:, number:], *output[1:])
    return output[:, number:]


def _prompts(model: memtune.TunedModel) -> dict[int, Tensor]:
    tensors = model.task.tensors()
    return {int(key.split(".")[1]): tensor for key, tensor in tensors.items() if key.endswith(".memory")}


def _wrapped(case: Case, **settings: Any) -> tuple[Any, memtune.TunedModel]:
    backbone = case.build()
    model = memtune.wrap(backbone, MemoryConfig(tokens=3, init_std=0.5, **settings), num_labels=4).eval()
    nn.init.normal_(model.task.head.weight)
    if model.task.class_token is not None:
        nn.init.normal_(model.task.class_token)
    return backbone, model


def _oracle(case: Case, backbone: Any, model: memtune.TunedModel, images: Tensor, **options: Any) -> Tensor:
    feature = vpt_deep(case, backbone, _prompts(model), model.task.class_token, images, **options)
    head = model.task.head
    return feature @ head.weight.T + head.bias


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@each(CASES)
def test_unmasked_memory_is_vpt_deep(case: Case, attention: str) -> None:
    backbone, model = _wrapped(case)
    backbone.set_attn_implementation(attention)
    images = case.images()
    with torch.no_grad():
        expected = _oracle(case, backbone, model, images)
        logits = model(images).logits
        bare = model.task.head(case.facts.feature(case.tower(backbone), case.run_tower(backbone, images)))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (bare - expected).abs().max() > 0.02  # the oracle does see the memory


@each(FAMILIES)
def test_gradients_are_those_of_vpt_deep(case: Case) -> None:
    backbone, model = _wrapped(case)
    images = case.images()
    prompts = {index: prompt.clone().requires_grad_() for index, prompt in _prompts(model).items()}
    feature = vpt_deep(case, backbone, prompts, model.task.class_token, images)
    (model.task.head(feature) ** 2).sum().backward()
    (model(images).logits ** 2).sum().backward()
    for index, prompt in prompts.items():
        own = model.task.adapters[0].get_parameter(f"blocks.{index}.memory").grad
        torch.testing.assert_close(own, prompt.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("blocks", [[0], [-1], (1,)], ids=str)
@each([BY_NAME["vit"], BY_NAME["dinov3"], BY_NAME["clip"]])
def test_memory_in_chosen_blocks(case: Case, blocks: Any) -> None:
    backbone, model = _wrapped(case, blocks=blocks, class_token=False)
    assert sorted(_prompts(model)) == [blocks[0] % case.depth]
    with torch.no_grad():
        expected = _oracle(case, backbone, model, case.images())
        torch.testing.assert_close(model(case.images()).logits, expected, atol=1e-5, rtol=0)


def test_images_of_another_size_are_interpolated() -> None:
    for name in (
        "vit",
        "beit",
        "beit-shared",
        "dinov2",
        "dinov3",
        "clip",
        "siglip",
        "swin",
        "segformer",
        "ijepa",
        "vit_mae",
    ):
        case = BY_NAME[name]
        backbone, model = _wrapped(case)
        images = case.images(size=case.image_size + 16)
        options = {} if case.facts.any_size else {"interpolate_pos_encoding": True}
        with torch.no_grad():
            expected = _oracle(case, backbone, model, images, **options)
            logits = model(images, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0, msg=name)


def test_each_part_of_a_segformer_sees_its_memory() -> None:
    """Memory of one block alone changes the answer as the slow forward says; also blocks of a reduced map have it."""
    case = BY_NAME["segformer"]
    for index in range(case.depth):
        backbone, model = _wrapped(case, blocks=[index])
        with torch.no_grad():
            expected = _oracle(case, backbone, model, case.images())
            bare = model.task.head(case.facts.feature(None, case.run_tower(backbone, case.images())))
            torch.testing.assert_close(model(case.images()).logits, expected, atol=1e-5, rtol=0)
        assert (bare - expected).abs().max() > 1e-3


def test_kept_keys_follow_the_norm_of_the_reduced_map() -> None:
    case = BY_NAME["segformer"]
    backbone, model = _wrapped(case)
    with torch.no_grad():
        model(case.images())
        backbone.stages[0].blocks[0].attention.sequence_reduction.layer_norm.weight.mul_(2)
        expected = _oracle(case, backbone, model, case.images())
        torch.testing.assert_close(model(case.images()).logits, expected, atol=1e-5, rtol=0)


def test_without_a_class_token_only_memory_and_head_train() -> None:
    backbone = BY_NAME["vit"].build()
    model = memtune.wrap(backbone, MemoryConfig(tokens=2, class_token=False), num_labels=3)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 2 * 2 * 16 + 16 * 3 + 3
    masked = memtune.wrap(backbone, MemoryConfig(tokens=2, class_token=False), num_labels=3, masked=True)
    assert masked.trainable_parameters()["class_token"] == 16  # a task stream needs a token


def test_memory_starts_as_in_the_paper() -> None:
    model = memtune.wrap(BY_NAME["vit"].build(), MemoryConfig(tokens=400), num_labels=3)
    for memory in _prompts(model).values():
        assert memory.shape == (400, 16)
        assert abs(memory.mean()) < 1e-3
        assert 0.019 < memory.std() < 0.021
    assert not torch.equal(*_prompts(model).values())


@pytest.mark.parametrize("masked", [False, True])
def test_no_tokens_leave_the_class_token_and_the_head(masked: bool) -> None:
    case = BY_NAME["vit"]
    backbone = case.build()
    model = memtune.wrap(backbone, MemoryConfig(tokens=0), num_labels=3, masked=masked)
    assert sorted(model.task.tensors()) == ["class_token", "head.bias", "head.weight"]
    if not masked:
        with torch.no_grad():
            feature = case.run_tower(backbone, case.images()).last_hidden_state[:, 0]
            torch.testing.assert_close(model.features(case.images()), feature)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": -1},
        {"tokens": 1.0},
        {"tokens": True},
        {"tokens": "4"},
        {"tokens": None},
        {"init_std": -0.1},
        {"init_std": float("nan")},
        {"init_std": float("inf")},
        {"init_std": "0.02"},
        {"blocks": "01"},
        {"blocks": [0.0]},
        {"blocks": [True]},
        {"blocks": 3},
        {"class_token": "yes"},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        MemoryConfig(**settings)


@pytest.mark.parametrize("blocks", [[2], [-3], [0, 0], [1, -1]], ids=str)
def test_blocks_that_the_backbone_has_not_are_refused(blocks: list[int]) -> None:
    backbone = BY_NAME["vit"].build()
    with pytest.raises(ConfigError, match="blocks"):
        memtune.wrap(backbone, MemoryConfig(blocks=blocks), num_labels=2)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_settings_can_be_pickled_copied_and_written_as_json_values() -> None:
    config = MemoryConfig(tokens=2, init_std=0.1, class_token=False, blocks=[1, 0])
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert MemoryConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["blocks"] == [1, 0]


def test_kept_keys_and_values_follow_every_change():
    """In evaluation they are computed once; whatever changes behind them, the answer is that of a fresh computation."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    backbone = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
    model = memtune.wrap(backbone, memtune.MemoryConfig(2), num_labels=3).eval()
    images = torch.randn(2, 3, 32, 32)
    memory = model.task.adapters[0].blocks["0"]

    def changes():
        yield lambda: memory.memory.normal_()
        yield lambda: setattr(memory.memory, "data", torch.randn_like(memory.memory))
        yield lambda: backbone.layers[0].attention.v_proj.weight.mul_(1.5)
        yield lambda: backbone.layers[0].layernorm_before.bias.add_(0.5)
        yield lambda: model.bfloat16()

    with torch.no_grad():
        before = model(images).logits
        assert torch.equal(model(images).logits, before)
        for change in changes():
            change()
            pixels = images.to(model.dtype)
            after = model(pixels).logits
            assert not torch.equal(after.float(), before.float())
            memory._kept = None
            assert torch.equal(model(pixels).logits, after)
            before = after
