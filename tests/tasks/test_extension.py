"""Extension: a later task reads earlier tasks' tokens and memory, against table 1 of the paper written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, GLOBAL, Case, each
from multitask import CONFIGS, tune, tune_all
from torch import Tensor

import memtune
from memtune import LoraConfig, MemoryConfig
from memtune.errors import CheckpointError, ConfigError

VIT = BY_NAME["vit"]


@torch.no_grad()
def slow_features(model: Any, tasks: list[dict[str, Tensor]], images: Tensor) -> list[Tensor]:
    """Features (batch, width) of tasks with memory, in loops over images, blocks, tokens and heads.

    Task i sees the base tokens, and the tokens and memory of all tasks up to itself.
    """
    features: list[list[Tensor]] = [[] for _ in tasks]
    position = model.embeddings.position_embeddings[0, 0]
    for hidden in model.embeddings(images):  # (tokens, width)
        tokens = [task["class_token"].flatten() + position for task in tasks]
        for index, layer in enumerate(model.layers):
            attention, norm = layer.attention, layer.layernorm_before
            after = []
            for number, token in enumerate(tokens):
                seen = [norm(hidden)]
                for earlier in range(number + 1):
                    seen += [norm(tokens[earlier])[None], norm(tasks[earlier][f"blocks.{index}.memory"])]
                stacked = torch.cat(seen)
                query, key, value = attention.q_proj(norm(token)), attention.k_proj(stacked), attention.v_proj(stacked)
                heads = []
                for columns in (slice(0, 8), slice(8, 16)):
                    weights = (key[:, columns] @ query[columns] / 8**0.5).softmax(dim=0)
                    heads.append(weights @ value[:, columns])
                token = token + attention.o_proj(torch.cat(heads))
                after.append(token + layer.mlp(layer.layernorm_after(token)))
            tokens, hidden = after, layer(hidden[None])[0]
        for number, token in enumerate(tokens):
            features[number].append(model.layernorm(token))
    return [torch.stack(each) for each in features]


def extend(backbone: Any, config: Any, model: memtune.MultiTaskModel, seed: int = 9) -> memtune.TunedModel:
    tuned = memtune.wrap(backbone, config, num_labels=4, masked=True, extends=model).eval()
    other = tune(backbone, config, masked=True, labels=4, seed=seed)
    tuned.task.load_tensors(other.task.tensors())
    return tuned


def test_three_tasks_in_a_row_see_what_table_1_says() -> None:
    backbone, images = VIT.build(), VIT.images(2)
    first = tune(backbone, MemoryConfig(3), masked=True, seed=1)
    one = memtune.combine(backbone, {"first": first})
    second = extend(backbone, MemoryConfig(2), one, seed=2)
    two = memtune.combine(backbone, {"first": first, "second": second})
    third = extend(backbone, MemoryConfig(1), two, seed=3)
    models = [first, second, third]
    expected = slow_features(backbone, [model.task.tensors() for model in models], images)
    for model, feature in zip(models, expected, strict=True):
        torch.testing.assert_close(model.features(images), feature, atol=1e-5, rtol=1e-5)
    alone = tune(backbone, MemoryConfig(2), masked=True, labels=4, seed=2)
    assert (alone.features(images) - expected[1]).abs().max() > 1e-3  # so the oracle does see the earlier task


@each(GLOBAL)
@pytest.mark.slow
@pytest.mark.exact
def test_combined_with_what_it_extends(case: Case) -> None:
    backbone, images = case.build(), case.images(3)
    kinds = [(name, True) for name in ("memory", "more memory", "all", "lora")] + [("memory", False)]
    tasks = tune_all(backbone, kinds)
    model = memtune.combine(backbone, tasks)
    before = {name: answer.logits for name, answer in model(images).items()}
    later = extend(backbone, CONFIGS["memory and lora"], model)
    model.add_task("later", later)
    after = model(images)
    for name, logits in before.items():
        assert torch.equal(after[name].logits, logits)
    expected = later(images).logits
    torch.testing.assert_close(after["later"].logits, expected, atol=1e-5, rtol=1e-5)
    mixed = model(images, rows=["later", next(iter(tasks)), "later"])
    torch.testing.assert_close(mixed[2].logits, expected[2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[0].logits, expected[:1], atol=1e-5, rtol=1e-5)


def test_only_the_later_task_trains() -> None:
    backbone = VIT.build()
    model = memtune.combine(backbone, tune_all(backbone, [("memory", True), ("lora", True)]))
    tuned = memtune.wrap(backbone, MemoryConfig(2), num_labels=3, masked=True, extends=model).train()
    before = {name: task.digest() for name, task in tuned.task.extends.items()}
    tuned(VIT.images(2), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters() if parameter.requires_grad)
    assert (
        sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
        == (tuned.trainable_parameters()["total"])
    )
    torch.optim.SGD([each for each in tuned.parameters() if each.requires_grad], lr=1.0).step()
    assert {name: task.digest() for name, task in tuned.task.extends.items()} == before


def test_saved_and_loaded_beside_what_it_extends(tmp_path: Path) -> None:
    backbone, images = VIT.build(), VIT.images(2)
    tasks = tune_all(backbone, [("memory", True), ("lora", True)])
    first, second = tasks
    later = extend(backbone, MemoryConfig(2), memtune.combine(backbone, tasks))
    later.save_pretrained(tmp_path / "later")
    tasks[first].save_pretrained(tmp_path / "first")
    model = memtune.combine(
        backbone, {"renamed": tmp_path / "first", second: tasks[second], "later": tmp_path / "later"}
    )
    torch.testing.assert_close(model(images)["later"].logits, later(images).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match=rf"task 'later': .* extends the tasks \['{second}'\]"):
        memtune.combine(backbone, {first: tasks[first], "later": tmp_path / "later"})
    with pytest.raises(CheckpointError, match="combine it with them"):
        memtune.load(tmp_path / "later", backbone=backbone)


def test_what_cannot_be_extended() -> None:
    backbone, other = VIT.build(), VIT.build()
    model = memtune.combine(backbone, {"a": tune(backbone, LoraConfig(r=2), masked=False)})
    with pytest.raises(ConfigError, match="pass masked=True"):
        memtune.wrap(backbone, MemoryConfig(2), num_labels=2, extends=model)
    with pytest.raises(ConfigError, match="another backbone object"):
        memtune.wrap(other, MemoryConfig(2), num_labels=2, masked=True, extends=model)
    with pytest.raises(ConfigError, match=r"tasks \['a'\] have no task tokens"):
        memtune.wrap(backbone, MemoryConfig(2), num_labels=2, masked=True, extends=model)
