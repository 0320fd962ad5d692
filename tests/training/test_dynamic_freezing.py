"""SlimFit against its formulas written out, and what freezing for a step does to parameters and memory."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from backbone_zoo import BY_NAME

import memtune
from memtune import LoraConfig, MemoryConfig
from memtune.errors import CheckpointError, ConfigError
from memtune.training.dynamic_freezing import SlimFit

CASE = BY_NAME["vit"]
CONFIG = [MemoryConfig(2), LoraConfig(2)]


def tuned(config=None, masked=False):
    torch.manual_seed(0)
    return memtune.wrap(CASE.build(), config or CONFIG, num_labels=3, masked=masked).train()


def optimizer_of(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


def step(model, optimizer, slimfit=None, stepped=True):
    """One step; gives the names of the parameters that were frozen in it."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if slimfit:
        slimfit.on_step_begin(model)
    frozen = names - {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model(CASE.images(6), labels=torch.arange(6) % 3).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in names - frozen)
    if stepped:
        optimizer.step()
    optimizer.zero_grad()
    if slimfit:
        slimfit.on_step_end(model)
    return frozen


def tensors(model):
    return {
        name: parameter.detach().numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.75, 0.9])
def test_the_selection_follows_the_formula(rate, masked):
    model = tuned(masked=masked)
    optimizer, slimfit = optimizer_of(model), SlimFit(rate, seed=4)
    units = [name for name, value in tensors(model).items() if value.ndim > 1]
    scores = dict(zip(units, np.random.default_rng([4, 0]).random(len(units)) * 1e7, strict=True))
    for _ in range(12):
        expected = {units[i] for i in np.argsort([scores[name] for name in units])[: math.floor(rate * len(units))]}
        old = tensors(model)
        assert step(model, optimizer, slimfit) == expected
        new = tensors(model)
        for name in old:
            if name in expected:
                assert np.array_equal(old[name], new[name])
            else:
                assert not np.array_equal(old[name], new[name])
        for name in set(units) - expected:
            change = [abs(before - after) / (abs(before) + 1e-6) for before, after in _pairs(old[name], new[name])]
            scores[name] = sum(change) / len(change)
        assert slimfit.scores == pytest.approx(scores, rel=1e-4)


def _pairs(old, new):
    return zip(old.ravel().tolist(), new.ravel().tolist(), strict=True)


def test_the_units_are_matrices():
    model, slimfit = tuned(), SlimFit(0.5)
    step(model, optimizer_of(model), slimfit)
    assert len(slimfit.scores) == 2 * (1 + 2 * 2) + 2  # of two blocks memory, A and B of two roles; class token, head
    assert {name.rpartition(".")[2] for name in slimfit.scores} == {
        "memory",
        "lora_A",
        "lora_B",
        "class_token",
        "weight",
    }


def test_every_unit_is_trained_once_before_scores_decide():
    model, slimfit = tuned(), SlimFit(0.75)
    optimizer, trained = optimizer_of(model), []
    for _ in range(4):  # a quarter of 12 units in each
        trained += slimfit_units(slimfit, model) - step(model, optimizer, slimfit)
    assert sorted(trained) == sorted(slimfit.scores)


def slimfit_units(slimfit, model):
    return {name for name, value in tensors(model).items() if value.ndim > 1}


def test_no_freezing_is_ordinary_training_bit_for_bit():
    one, other = tuned(), tuned()
    optimizers, slimfit = [optimizer_of(one), optimizer_of(other)], SlimFit(0)
    for _ in range(4):
        step(one, optimizers[0])
        assert not step(other, optimizers[1], slimfit)
    assert all(np.array_equal(value, tensors(other)[name]) for name, value in tensors(one).items())


def test_momentum_and_decay_leave_frozen_units_alone():
    """An optimizer counts, for each unit, only the steps in which it was trained."""
    model, slimfit = tuned(), SlimFit(0.5)
    optimizer = optimizer_of(model)
    for _ in range(6):
        step(model, optimizer, slimfit)
    counts = {
        name: optimizer.state[parameter]["step"].item()
        for name, parameter in model.named_parameters()
        if name in slimfit.scores
    }
    assert min(counts.values()) < 6
    assert sum(counts.values()) == 6 * 6


def test_accumulated_batches_are_one_step():
    model, slimfit = tuned(), SlimFit(0.5)
    optimizer = optimizer_of(model)
    slimfit.on_step_begin(model)
    frozen = {name for name, parameter in model.task.named_parameters() if not parameter.requires_grad}
    for _ in range(2):
        model(CASE.images(6), labels=torch.arange(6) % 3).loss.backward()
    assert {name for name, parameter in model.task.named_parameters() if parameter.grad is None} == frozen
    optimizer.step()
    slimfit.on_step_end(model)
    assert all(parameter.requires_grad for parameter in model.task.parameters())


def test_a_resumed_run_goes_on_bit_for_bit():
    runs = []
    for resumed in (False, True):
        model, slimfit = tuned(), SlimFit(0.5, seed=1)
        optimizer, frozen = optimizer_of(model), []
        for index in range(8):
            if resumed and index == 3:
                state = json.loads(json.dumps(slimfit.state_dict()))
                slimfit = SlimFit(0.5, seed=2)
                slimfit.load_state_dict(state)
            frozen.append(step(model, optimizer, slimfit))
        runs.append((frozen, tensors(model)))
    assert runs[0][0] == runs[1][0]
    assert all(np.array_equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_a_damaged_state_is_refused():
    slimfit = SlimFit()
    for state in ({}, {"scores": [1.0]}, {"scores": {"a": "1"}}):
        with pytest.raises(CheckpointError, match="scores"):
            slimfit.load_state_dict(state)
    assert slimfit.scores == {}


def test_a_skipped_step_leaves_the_scores():
    model, slimfit = tuned(), SlimFit(0.5)
    optimizer = optimizer_of(model)
    first = step(model, optimizer, slimfit, stepped=False)
    before = dict(slimfit.scores)
    assert step(model, optimizer, slimfit) == first
    assert slimfit.scores != before


def test_a_step_that_was_broken_off_leaves_nothing_frozen_for_ever():
    model, slimfit = tuned(), SlimFit(0.5)
    slimfit.on_step_begin(model)
    slimfit.on_step_begin(model)
    slimfit.on_train_end(model)
    assert all(parameter.requires_grad for parameter in model.task.parameters())
    assert len(slimfit.scores) == 12


def test_a_whole_model_in_full_fine_tuning():
    model, slimfit = BY_NAME["vit-head"].build(), SlimFit(0.9)
    optimizer = optimizer_of(model)
    frozen = step(model, optimizer, slimfit)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert slimfit.scores.keys() == matrices
    assert len(frozen) == math.floor(0.9 * len(matrices))


def saved_bytes(model):
    """Bytes of the distinct tensors that a pass keeps for its backward pass, parameters not counted."""
    kept = {}

    def keep(tensor):
        if not tensor.is_leaf or not tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(CASE.images(8))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_blocks_before_the_first_trained_unit_keep_nothing():
    model, slimfit = tuned(LoraConfig(2)), SlimFit(0.5)
    ordinary = saved_bytes(model)
    names = [name for name, value in tensors(model).items() if value.ndim > 1]
    for block, expected in (("blocks.0", 0.6), ("blocks.1", 1.0)):  # which of the two is frozen
        slimfit.load_state_dict({"scores": {name: float(block not in name) for name in names}})
        slimfit.freezing_rate = sum(block in name for name in names) / len(names)
        slimfit.on_step_begin(model)
        share = saved_bytes(model) / ordinary
        slimfit.on_train_end(model)
        assert expected - 0.2 < share < expected


@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, float("nan"), True, "0.5"])
def test_wrong_settings_are_refused(rate):
    with pytest.raises(ConfigError, match="freezing_rate: got"):
        SlimFit(rate)


def test_a_wrong_seed_is_refused():
    with pytest.raises(ConfigError, match=r"seed: got 0\.5"):
        SlimFit(0.5, seed=0.5)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = tuned()
    with pytest.raises(ConfigError, match="2 processes"):
        SlimFit().on_step_begin(model)
    assert all(parameter.requires_grad for parameter in model.task.parameters())


def test_in_fit_the_run_ends_with_all_units_trainable():
    model, slimfit = tuned(), SlimFit(0.5)
    before = tensors(model)
    items = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(CASE.images(12))]
    config = memtune.TrainingConfig(max_steps=6, per_device_train_batch_size=4, disable_tqdm=True)
    memtune.fit(model, items, config=config, callbacks=[slimfit])
    assert all(parameter.requires_grad for parameter in model.task.parameters())
    assert len(slimfit.scores) == 12
    changed = {name for name, value in tensors(model).items() if not np.array_equal(value, before[name])}
    # of the first step, whose learning rate is 0, and of the five after it
    assert changed >= {name for name, score in slimfit.scores.items() if score < 1e4}
