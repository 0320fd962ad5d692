"""TokenTune against its definition written out: ordinary passes with the other tokens' gradients cut by hooks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from backbone_zoo import BY_NAME, CASES, FAMILIES, PLAIN, each
from torch import Tensor

import memtune
from memtune import ApproximatedPromptConfig, CodaPromptConfig, LoraConfig, MemoryConfig
from memtune.errors import CheckpointError, ConfigError, UnsupportedBackboneError
from memtune.training.token_selection import TokenTune, pass_gradient

ALL_ROLES = ("query", "key", "value", "out", "fc1", "fc2")
GLOBAL = [case for case in FAMILIES if not case.facts.staged]


def tuned(case, config=None, **settings):
    torch.manual_seed(0)
    config = config or [MemoryConfig(2), LoraConfig(2, roles=ALL_ROLES)]
    model = memtune.wrap(case.build(**settings), config, num_labels=3)
    with torch.no_grad():
        for parameter in model.task.parameters():  # LoRA's B starts at zero, which hides the gradient of A
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def gradients(model, images, **options) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits, and the gradient of each trained parameter."""
    model.zero_grad()
    output = model(images, labels=torch.arange(len(images)) % 3, **options)
    output.loss.backward()
    return output.logits.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@contextmanager
def selecting(model, tokens: int | float) -> Iterator[TokenTune]:
    token_tune = TokenTune(tokens)
    token_tune.on_step_begin(model)
    yield token_tune
    token_tune.on_step_end(model)


def assert_equal(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def cut(positions: Tensor, tokens: int, module: Any, args: Any, output: Any) -> Any:
    """A forward hook: no gradient through the tokens outside of `positions`; what has other rows is not of tokens."""
    states = output[0] if isinstance(output, tuple) else output
    if states.ndim != 3 or states.shape[:2] != (len(positions), tokens):
        return output
    selected = torch.zeros(states.shape[:2], dtype=torch.bool).scatter(1, positions, True).unsqueeze(-1)
    states = torch.where(selected, states, states.detach())
    return (states, *output[1:]) if isinstance(output, tuple) else states


def transcription(model, positions: Tensor, tokens: int, images: Tensor, **options) -> dict[str, Tensor | None]:
    """Gradients by the definition: sg() on keys, values and output of each block, for tokens outside G."""
    hook = partial(cut, positions, tokens)
    modules = [module for block in model.stream.view.blocks for module in (block["key"], block["value"], block.module)]
    handles = [module.register_forward_hook(hook) for module in modules]
    found = gradients(model, images, **options)[1]
    for handle in handles:
        handle.remove()
    return found


def number_of_tokens(case, size: int | None = None) -> int:
    size = size or case.image_size
    return case.facts.prefix + (size // 8) ** 2


@each(GLOBAL)
def test_gradients_are_those_of_the_definition(case):
    model, images = tuned(case), case.images(3)
    tokens = number_of_tokens(case)
    ordinary, full = gradients(model, images)
    with selecting(model, 5):
        logits, found = gradients(model, images)
    assert torch.equal(logits, ordinary)
    positions = TokenTune(5).positions(3, tokens, case.facts.class_token is not None)
    assert_equal(found, transcription(model, positions, tokens, images), rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(found[name], full[name], rtol=1e-2) for name in found)


@each(GLOBAL)
def test_all_tokens_are_ordinary_training_bit_for_bit(case):
    model, images = tuned(case), case.images()
    ordinary, full = gradients(model, images)
    for tokens in (1.0, 1000):
        with selecting(model, tokens):
            logits, found = gradients(model, images)
        assert torch.equal(logits, ordinary)
        assert_equal(found, full)


@pytest.mark.parametrize("name", ["vit", "beit", "beit-shared-head", "dinov3"])
def test_images_of_another_size(name):
    case = BY_NAME[name]
    model, images = tuned(case), case.images(2, 48)
    ordinary, _ = gradients(model, images, interpolate_pos_encoding=True)
    with selecting(model, 4):
        logits, found = gradients(model, images, interpolate_pos_encoding=True)
    assert torch.equal(logits, ordinary)
    tokens = number_of_tokens(case, 48)
    expected = transcription(model, TokenTune(4).positions(2, tokens), tokens, images, interpolate_pos_encoding=True)
    assert_equal(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(2),
        MemoryConfig(2, blocks=[1], class_token=False),
        LoraConfig(2),
        LoraConfig(2, use_dora=True),
        ApproximatedPromptConfig(n=5, r=2),
        CodaPromptConfig(pool_size=4, prompt_length=4, blocks=[0]),
    ],
    ids=lambda config: f"{config.method}-{config.blocks}",
)
def test_every_method(config, attention):
    case = BY_NAME["vit"]
    model, images = tuned(case, config), case.images(3)
    model.backbone.set_attn_implementation(attention)
    ordinary, _ = gradients(model, images)
    with selecting(model, 0.3):
        logits, found = gradients(model, images)
    assert torch.equal(logits, ordinary)
    expected = transcription(model, TokenTune(5).positions(3, 17), 17, images)
    assert_equal(found, expected, rtol=1e-4, atol=1e-6)


def test_autocast_casts_parameters_for_both_passes():
    case = BY_NAME["vit"]
    model, images = tuned(case), case.images(3)
    with torch.autocast("cpu", torch.bfloat16), selecting(model, 5):
        logits, found = gradients(model, images)
    with torch.autocast("cpu", torch.bfloat16):  # again, as each keeps the casts of the first pass in it
        ordinary, _ = gradients(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        expected = transcription(model, TokenTune(5).positions(3, 17), 17, images)
    assert torch.equal(logits, ordinary)
    for name, gradient in found.items():
        assert torch.linalg.vector_norm(gradient - expected[name]) < 0.05 * torch.linalg.vector_norm(expected[name])


def test_with_activation_checkpointing():
    case = BY_NAME["vit"]
    model, images = tuned(case), case.images(3)
    with selecting(model, 5):
        logits, kept = gradients(model, images)
    model.activation_checkpointing_enable()
    with selecting(model, 5):
        again, found = gradients(model, images)
    assert torch.equal(again, logits)
    assert_equal(found, kept)


def test_with_dropout_the_gradient_is_that_of_the_values_given_on():
    case = BY_NAME["vit"]
    model, images = tuned(case, LoraConfig(2, roles=("fc2",), blocks=[-1], lora_dropout=0.5)), case.images(3)
    update = model.task.adapters[0].blocks["1"]["fc2"].lora_B
    with selecting(model, 1):  # the feature reads this token alone, to which B adds in proportion
        torch.manual_seed(1)
        features = model.features(images)
        features.square().sum().backward()
        step = 1e-3 * torch.randn_like(update)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                update.add_(step, alpha=sign)
            torch.manual_seed(1)
            values.append(model.features(images).double().square().sum().item())
            with torch.no_grad():
                update.sub_(step, alpha=sign)
    assert (values[0] - values[1]) / 2 == pytest.approx((update.grad * step).sum().item(), rel=0.02)


def test_pass_gradient():
    every, positions = torch.randn(2, 3, 5, 4), torch.tensor([[0, 3], [0, 1]])
    own = torch.randn(2, 3, 2, 4, requires_grad=True)
    weight = torch.randn(2, 3, 5, 4)
    kept, replaced = (pass_gradient(every, own, positions, 2, exact) for exact in (True, False))
    assert torch.equal(kept, every)
    expected = every.clone()
    for row, chosen in enumerate(positions):
        expected[row, :, chosen] = own[row].detach()
    assert torch.equal(replaced, expected)
    for output in (kept, replaced):
        (gradient,) = torch.autograd.grad((output * weight).sum(), own)
        assert torch.equal(gradient, torch.stack([weight[row, :, chosen] for row, chosen in enumerate(positions)]))


def saved_bytes(run) -> int:
    """Bytes of the distinct tensors that a pass keeps for its backward pass, parameters not counted."""
    storages = {}

    def keep(tensor):
        if not tensor.is_leaf or not tensor.requires_grad:
            storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def test_what_is_kept_is_that_of_the_selected_tokens_and_the_keys_and_values_of_all():
    case = BY_NAME["vit"]
    config = LoraConfig(2, roles=("query", "value"))
    model = tuned(case, config, image_size=64, intermediate_size=64)
    images, frozen = case.images(8, 64), sum(each.numel() for each in model.backbone.parameters()) * 4
    ordinary = saved_bytes(lambda: model(images))
    with selecting(model, 3):
        selected = saved_bytes(lambda: model(images))
    with selecting(model, 1.0):
        assert saved_bytes(lambda: model(images)) == ordinary
    a_block = 8 * 65 * 16 * 4  # batch x tokens x width x bytes
    keys_and_values = 2 * 2 * a_block
    last_norm = a_block
    assert ordinary > 2 * 8 * a_block
    # what all tokens leave: keys, values and the last norm's input; of each block 14 widths for 3 tokens, at the most
    assert selected < keys_and_values + 2 * last_norm + 2 * 14 * a_block * 3 / 65 + frozen
    assert selected - frozen < 0.5 * (ordinary - frozen)


def test_positions_are_drawn_uniformly_without_replacement():
    token_tune = TokenTune(4, seed=3)
    draws = token_tune.positions(4000, 11).numpy()
    assert draws.shape == (4000, 4)
    assert (draws[:, 0] == 0).all()
    assert (np.diff(draws) > 0).all()
    counts = np.bincount(draws.ravel(), minlength=11)[1:]
    assert counts.sum() == 3 * 4000
    assert np.abs(counts - 1200).max() < 5 * np.sqrt(4000 * 0.3 * 0.7)
    assert not np.array_equal(token_tune.positions(4000, 11).numpy(), draws)
    without = TokenTune(4).positions(4000, 11, has_class_token=False).numpy()
    assert np.abs(np.bincount(without.ravel()) - 4000 * 4 / 11).max() < 5 * np.sqrt(4000 * 4 / 11)


@pytest.mark.parametrize(("tokens", "number"), [(1, 1), (16, 16), (500, 197), (0.3, 59), (1.0, 197), (1e-6, 1)])
def test_number_of_tokens(tokens, number):
    assert TokenTune(tokens).positions(2, 197).shape == (2, number)


def test_resumed_draws_go_on():
    one, other = TokenTune(3, seed=5), TokenTune(3)
    one.positions(4, 20)
    state = json.loads(json.dumps(one.state_dict()))
    expected = one.positions(4, 20)
    other.load_state_dict(state)
    assert torch.equal(other.positions(4, 20), expected)
    with pytest.raises(CheckpointError, match="seed and passes"):
        other.load_state_dict({"seed": 5})
    assert other.state_dict() == one.state_dict()


def test_each_pass_draws_anew_and_only_in_steps():
    model, images = tuned(BY_NAME["vit"]), BY_NAME["vit"].images(3)
    _, full = gradients(model, images)
    with selecting(model, 5) as token_tune:
        first, second = (gradients(model, images)[1] for _ in range(2))
        passes = token_tune.state_dict()["passes"]
        with torch.no_grad():
            model(images)
        assert token_tune.state_dict()["passes"] == passes == 2
        model.train()  # makes new views
        token_tune.on_step_begin(model)
        gradients(model, images)
        assert token_tune.state_dict()["passes"] == 3
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert_equal(gradients(model, images)[1], full)
    assert all("forward" not in vars(block.module) for block in model.stream.view.blocks)


def test_it_trains():
    case = BY_NAME["vit"]
    model = tuned(case, MemoryConfig(2))
    images = case.images(12)
    labels = torch.arange(12) % 3
    optimizer = torch.optim.AdamW(model.task.parameters(), lr=1e-2)
    token_tune, losses = TokenTune(5), []
    for _ in range(60):
        token_tune.on_step_begin(model)
        loss = model(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        token_tune.on_step_end(model)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("tokens", [0, -1, 0.0, 1.5, float("nan"), True, "16"])
def test_wrong_settings_are_refused(tokens):
    with pytest.raises(ConfigError, match="tokens: got"):
        TokenTune(tokens)


def test_a_wrong_seed_is_refused():
    with pytest.raises(ConfigError, match="seed: got -1"):
        TokenTune(3, seed=-1)


def test_a_masked_model_is_refused():
    model = memtune.wrap(BY_NAME["vit"].build(), MemoryConfig(2), num_labels=3, masked=True)
    with pytest.raises(ConfigError, match="masked=False"):
        TokenTune(3).on_step_begin(model)


@each([case for case in [*CASES, *PLAIN] if case.facts.staged or case in PLAIN])
def test_backbones_without_attention_over_all_tokens_are_refused(case):
    model = memtune.wrap(case.build(), LoraConfig(2), num_labels=3)
    with pytest.raises(UnsupportedBackboneError, match="attention over all tokens"):
        TokenTune(3).on_step_begin(model)


def test_in_fit():
    case = BY_NAME["vit"]
    model, token_tune = tuned(case), TokenTune(5)
    items = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(case.images(12))]
    config = memtune.TrainingConfig(
        max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, disable_tqdm=True
    )
    memtune.fit(model, items, items, config=config, callbacks=[token_tune])
    assert token_tune.state_dict() == {"seed": 0, "passes": 12}
    assert all("forward" not in vars(block.module) for block in model.stream.view.blocks)
