import copy
import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from training_runs import QUICK, SHAPE, Stop, equal, items, train, tuned, weights
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune import TrainingConfig
from memtune.errors import ConfigError, InputError
from memtune.training.optimization import make_optimizer


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [{"learning_rate": 1e-2}, {"optim": "sgd", "learning_rate": 0.03}])
def test_it_learns_and_the_backbone_stays(masked, settings):
    model = tuned(masked)
    before = copy.deepcopy(model.backbone.state_dict())
    result = memtune.fit(
        model, items(), items(16, seed=1), TrainingConfig(**QUICK | {"num_train_epochs": 8} | settings)
    )
    assert result.history[-1]["eval_accuracy"] == 1.0
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 2
    assert result.steps == 8 * 4
    assert equal(before, model.backbone.state_dict())
    assert not model.training


@pytest.mark.parametrize("masked", [False, True])
def test_a_seed_reproduces_a_run_bit_for_bit(masked):
    one, other, third = tuned(masked), tuned(masked), tuned(masked)
    histories = [train(model, seed=seed).history for model, seed in ((one, 1), (other, 1), (third, 2))]
    assert equal(weights(one), weights(other))
    assert not equal(weights(one), weights(third))
    assert [entry["loss"] for entry in histories[0]] == [entry["loss"] for entry in histories[1]]


def test_accumulated_batches_are_one_larger_batch():
    one, other = tuned(), tuned()
    settings = {"optim": "sgd", "momentum": 0.0, "num_train_epochs": 1, "max_grad_norm": 0}
    train(one, **settings, per_device_train_batch_size=8)
    train(other, **settings, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for key, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[key], rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped():
    model = tuned()
    before = weights(model)
    train(model, optim="sgd", momentum=0.0, weight_decay=0.0, learning_rate=1.0, max_steps=1, warmup_ratio=0,
          lr_scheduler_type="constant", max_grad_norm=1e-3)  # fmt: skip
    moved = sum(float((tensor - before[key]).square().sum()) for key, tensor in weights(model).items()) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_rises_and_falls():
    rates = [entry["learning_rate"] for entry in train(tuned(), num_train_epochs=10, warmup_ratio=0.5).history]
    falling = [(1 + math.cos(math.pi * share)) / 2 for share in (0.2, 0.4, 0.6, 0.8, 1)]
    assert rates == pytest.approx([5e-3 * share for share in (0.2, 0.4, 0.6, 0.8, 1, *falling)])


def test_what_has_one_dimension_does_not_decay():
    model = memtune.wrap(tuned().detach(), memtune.SideNetworkConfig(width=4), num_labels=2, masked=True)
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.1).for_mode(masked=False))
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert decays.keys() == trained
    assert decays[id(model.task.head.bias)] == 0
    side = model.task.adapters[0].blocks["0"]
    assert decays[id(side.norm)] == decays[id(side.own_bias)] == 0
    assert decays[id(side.down)] == 0.1
    assert decays[id(model.task.head.weight)] == 0.1


def test_steps_and_fractions_of_epochs():
    assert train(tuned(), max_steps=3).steps == 3
    assert train(tuned(), num_train_epochs=0.5).steps == 2


def test_no_epoch_is_no_step():
    model = tuned()
    before = weights(model)
    result = train(model, num_train_epochs=0)
    assert (result.steps, result.history, result.log_history) == (0, [], [])
    assert equal(weights(model), before)


def test_mixed_precision_and_back():
    assert train(tuned(), mixed_precision="bf16").history[-1]["loss"] < 2
    assert train(tuned()).history[-1]["loss"] < 2


def test_mixed_precision_again():
    """A second run on the same model, and an evaluation after it, compute in the precision that they were asked for."""
    types = []
    model = tuned()
    model.backbone.vit.layers[0].attention.q_proj.register_forward_hook(lambda *given: types.append(given[2].dtype))
    for _ in range(2):
        train(model, mixed_precision="bf16", max_steps=1)
    memtune.evaluate(model, items(), TrainingConfig(mixed_precision="bf16", disable_tqdm=True))
    assert set(types) == {torch.bfloat16}
    assert "forward" not in model.__dict__


def test_evaluation_counts_each_image_once_and_leaves_the_mode():
    model, data = tuned(), items(11)
    model.train()
    scores = memtune.evaluate(model, data, TrainingConfig(per_device_eval_batch_size=4))
    assert model.training
    images, labels = (
        torch.stack([item["pixel_values"] for item in data]),
        torch.tensor([item["labels"] for item in data]),
    )
    output = model.eval()(images, labels=labels)
    assert scores["accuracy"] == pytest.approx((output.logits.argmax(-1) == labels).float().mean().item())
    assert scores["loss"] == pytest.approx(output.loss.item(), rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_loss_of_the_users_own(masked):
    one, other, third = tuned(masked), tuned(masked), tuned(masked)
    settings = TrainingConfig(**QUICK | {"label_smoothing_factor": 0.2})
    memtune.fit(one, items(), config=settings)
    memtune.fit(
        other,
        items(),
        config=settings,
        compute_loss_func=lambda outputs, labels: cross_entropy(outputs.logits, labels, label_smoothing=0.2),
    )
    assert equal(weights(one), weights(other))
    result = memtune.fit(
        third, items(), config=settings, compute_loss_func=lambda outputs, labels: 0 * outputs.logits.sum() + 3
    )
    assert result.history[-1]["loss"] == 3
    assert torch.equal(third.task.head.bias, torch.zeros(2))  # no gradient, and biases do not decay


def test_a_loss_gets_single_precision():
    types = []

    def loss(outputs, labels):
        types.append(outputs.logits.dtype)
        return cross_entropy(outputs.logits, labels)

    settings = TrainingConfig(**QUICK | {"mixed_precision": "bf16", "max_steps": 1})
    memtune.fit(tuned(), items(), config=settings, compute_loss_func=loss)
    assert types == [torch.float32]


def test_evaluation_among_some_classes():
    torch.manual_seed(0)
    backbone = ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8))
    model = memtune.wrap(backbone, memtune.MemoryConfig(2), num_labels=5).eval()
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": label} for label in [3, 1, 1, 3, 3, 1, 1, 3, 3]]
    with torch.no_grad():
        logits = model(torch.stack([item["pixel_values"] for item in data])).logits[:, [3, 1]]
    labels = torch.tensor([0 if item["labels"] == 3 else 1 for item in data])
    scores = memtune.evaluate(model, data, TrainingConfig(per_device_eval_batch_size=4), classes=[3, 1])
    assert scores["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert scores["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert memtune.evaluate(model, data, classes=range(5)) == memtune.evaluate(model, data)


def test_images_go_through_the_processor():
    pictures = [Image.fromarray(np.full((20, 30, 3), 250 * (index % 2), dtype=np.uint8)) for index in range(8)]
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 4}, features=columns)
    model = tuned(processor=ViTImageProcessorPil(size={"height": 32, "width": 32}))
    result = memtune.fit(model, data, data, TrainingConfig(**QUICK | {"num_train_epochs": 10, "image_size": 64}))
    assert result.history[-1]["eval_accuracy"] == 1.0


def test_an_interrupted_run_leaves_a_usable_model():
    class Failing(list):
        def __getitem__(self, index):
            raise Stop

    model = tuned()
    with pytest.raises(Stop):
        train(model, Failing(items()))
    assert not model.training
    assert "forward" not in model.__dict__
    model.save_pretrained  # noqa: B018 - it is still whole
    assert train(model).steps == 8


def test_a_label_outside_the_range_is_refused():
    data = items()
    data[3]["labels"] = 5
    with pytest.raises(InputError, match=r"got \[5\], expected class indices from 0 to 1"):
        train(tuned(), data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_train_epochs": -1},
        {"max_steps": 0},
        {"per_device_train_batch_size": 0},
        {"per_device_train_batch_size": 2.5},
        {"gradient_accumulation_steps": "2"},
        {"optim": "adam"},
        {"learning_rate": float("nan")},
        {"warmup_ratio": 1.5},
        {"lr_scheduler_type": "step"},
        {"mixed_precision": "fp8"},
        {"image_size": 0},
        {"on_error": "ignore"},
        {"weight_decay": -0.1},
    ],
)
def test_a_wrong_setting_is_named(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{name}: got {value!r}, expected"):
        TrainingConfig(**wrong)
