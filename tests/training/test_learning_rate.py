"""The search for a learning rate by a run in which it grows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbone_zoo import BY_NAME

import memtune
from memtune import MemoryConfig, TrainingConfig
from memtune.errors import ConfigError
from memtune.training import LearningRateResult


def items(count: int = 16) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return [{"pixel_values": image + index % 2, "labels": index % 2} for index, image in enumerate(images)]


def wrapped(**options: object) -> memtune.TunedModel:
    torch.manual_seed(0)
    return memtune.wrap(BY_NAME["vit"].build(), MemoryConfig(2), num_labels=2, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_the_model_stays_as_it_was(masked: bool) -> None:
    model = wrapped(masked=masked)
    before = {name: tensor.clone() for name, tensor in model.task.tensors().items()}
    model.train()
    result = memtune.find_learning_rate(model, items(), num_steps=8, start=1e-5, end=1e-2)
    assert model.training
    after = model.task.tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.learning_rates[0] == pytest.approx(1e-5)
    ratios = [two / one for one, two in zip(result.learning_rates, result.learning_rates[1:], strict=False)]
    assert ratios == pytest.approx([1000 ** (1 / 7)] * 7)
    assert len(result.losses) == 8


def test_losses_are_those_of_a_loop_written_out() -> None:
    """Full batches, so that the order does not matter; plain AdamW by hand, and the smoothed mean by its formula."""
    data, steps = items(), 6
    config = TrainingConfig(per_device_train_batch_size=len(data), weight_decay=0.1, max_grad_norm=0, disable_tqdm=True)
    result = memtune.find_learning_rate(wrapped(), data, config, num_steps=steps, start=1e-4, end=1e-1)

    model = wrapped()
    model.train()
    groups = [[p for p in model.parameters() if p.requires_grad and (p.ndim <= 1) == flat] for flat in (False, True)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    )
    images = torch.stack([each["pixel_values"] for each in data])  # type: ignore[misc]
    labels = torch.tensor([each["labels"] for each in data])
    losses: list[float] = []
    for rate in torch.logspace(-4, -1, steps, dtype=torch.float64).tolist():
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = torch.nn.functional.cross_entropy(model(images).logits, labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [0.9**age for age in range(steps)]
    smoothed = [
        sum(weight * loss for weight, loss in zip(weights, reversed(losses[: step + 1]), strict=False))
        / sum(weights[: step + 1])
        for step in range(steps)
    ]
    assert result.losses == pytest.approx(smoothed, rel=1e-4)


def test_it_ends_where_the_loss_grows(tmp_path: Path) -> None:
    result = memtune.find_learning_rate(wrapped(), items(), num_steps=40, start=1e-3, end=1e6)
    assert len(result.losses) < 40
    result.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 5000


def test_the_suggestion_is_where_the_loss_falls_most() -> None:
    rates = [10.0**power for power in range(-6, 2)]
    result = LearningRateResult(rates, [1.0, 1.0, 0.98, 0.9, 0.5, 0.3, 0.29, 2.0])
    assert result.suggestion == 1e-2  # central differences: -0.04 at 1e-3 is less steep than -0.3 at 1e-2
    assert "0.01" in str(result)
    flat = LearningRateResult(rates, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7])
    assert flat.suggestion is None
    assert "no learning rate" in str(flat)
    assert LearningRateResult([], []).suggestion is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.0, "end": 1e-3}, "start, end"),
        ({"start": 0.0}, "start, end"),
        ({"num_steps": 2}, "num_steps"),
        ({"num_steps": 10.0}, "num_steps"),
    ],
)
def test_wrong_settings(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        memtune.find_learning_rate(wrapped(), items(), **options)  # type: ignore[arg-type]
