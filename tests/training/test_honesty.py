"""A run does not lie: about its size, its scores, its data; and what goes wrong is said before anything is lost."""

import logging

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn.functional import cross_entropy
from training_runs import SHAPE, Stop, StopAfter, equal, items, tuned, weights
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import memtune
from memtune import TrainingConfig
from memtune.callbacks import TrainingCallback
from memtune.data import ImageDataset
from memtune.errors import CheckpointError, ConfigError, InputError, MemtuneError
from memtune.storage import sized

QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "disable_tqdm": True}
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


def pictures(count=12, seed=0):
    random = np.random.default_rng(seed)
    images = [Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": images, "label": [n % 2 for n in range(count)]}, features=features)


def named(masked=False):
    torch.manual_seed(0)
    backbone = ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8))
    return memtune.wrap(backbone, memtune.MemoryConfig(2), labels=["a", "b"], masked=masked, processor=PROCESSOR)


@pytest.mark.parametrize(
    "processor",
    [
        BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}),
        CLIPImageProcessorPil(),
        ConvNextImageProcessorPil(),
        PROCESSOR,
    ],
    ids=lambda processor: type(processor).__name__,
)
@pytest.mark.parametrize("pixels", [96, 336])
def test_the_size_that_was_asked_for_is_made(processor, pixels):
    white = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (300, 500), "white")], "label": [0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    found = ImageDataset(white, processor, image_size=pixels)[0]["pixel_values"]
    assert tuple(found.shape) == (3, pixels, pixels)
    assert (found - found.amax(dim=(1, 2), keepdim=True)).abs().max() < 1e-5  # white all over: no padding


def test_a_size_that_a_processor_cannot_make():
    class Stubborn(ViTImageProcessorPil):
        def __call__(self, *args, **options):
            return PROCESSOR(*args, **options)

    with pytest.raises(InputError, match="makes no images of 48 x 48 pixels, but of 32 x 32"):
        sized(Stubborn(), 48)


@pytest.mark.parametrize("masked", [False, True])
def test_the_size_travels_with_the_adapter(masked, tmp_path):
    model = named(masked)
    memtune.fit(model, pictures(), config=TrainingConfig(**QUICK, image_size=48))
    assert model.task.image_size == (48, 48)
    expected = memtune.evaluate(model, pictures())
    model.save_pretrained(tmp_path / "a")
    loaded = memtune.load(tmp_path / "a", backbone=model.backbone)
    assert dict(loaded.processor.size) == {"height": 48, "width": 48}
    assert memtune.evaluate(loaded, pictures()) == expected
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert memtune.pipeline(loaded)(pictures()["image"][0])
    with pytest.raises(InputError, match="got 32 x 32 pixels, but this adapter was trained at 48 x 48"):
        loaded(torch.randn(2, 3, 32, 32))
    loaded(torch.randn(2, 3, 64, 64), interpolate_pos_encoding=True)

    small = named(masked)
    both = memtune.combine(model.backbone, {"large": model, "small": memtune.wrap(
        model.backbone, memtune.MemoryConfig(1), labels=["a", "b"], masked=masked, processor=PROCESSOR)})  # fmt: skip
    assert torch.allclose(both(images, tasks=["large"])["large"].logits, model(images).logits, atol=1e-5)
    with pytest.raises(InputError, match="task 'small' was trained at 32 x 32"):
        both(images)
    with pytest.raises(ConfigError, match="different ones"):
        memtune.pipeline(both)
    memtune.fit(small, pictures(), config=TrainingConfig(**QUICK))
    assert small.task.image_size is None

    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace("48,", "-48,"))
    with pytest.raises(CheckpointError, match="image_size"):
        memtune.load(tmp_path / "a", backbone=model.backbone)


def test_accumulation_divides_by_the_batches_that_there_are():
    """Three batches with an accumulation of eight are one step of their mean: that of one batch of all three."""
    rows, whole, parts = items(3), tuned(), tuned()
    options = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "momentum": 0.0,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
    }
    options |= {"max_grad_norm": 0, "warmup_ratio": 0.0, "num_train_epochs": 2}
    memtune.fit(whole, rows, config=TrainingConfig(**options, per_device_train_batch_size=3))
    memtune.fit(
        parts, rows, config=TrainingConfig(**options, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    )
    for value, expected in zip(parts.task.tensors().values(), whole.task.tensors().values(), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


def test_the_scores_are_those_of_the_values_that_are_kept():
    model = tuned()
    config = TrainingConfig(
        **QUICK | {"num_train_epochs": 5}, load_best_model_at_end=True, metric_for_best_model="loss"
    )
    result = memtune.fit(model, items(), items(seed=5), config)
    assert result.scores == pytest.approx(memtune.evaluate(model, items(seed=5)), abs=1e-6)
    last = memtune.fit(model, items(), items(seed=5), TrainingConfig(**QUICK))
    assert last.scores == pytest.approx(memtune.evaluate(model, items(seed=5)), abs=1e-6)
    assert memtune.fit(model, items(), config=TrainingConfig(**QUICK)).scores == {}


@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.5}], ids=["", "averaged"])
def test_a_run_that_diverges_stops_and_says_so(more, tmp_path):
    model = tuned()
    with pytest.raises(MemtuneError, match=r"it has diverged.*Lower learning_rate") as raised:
        memtune.fit(model, items(), config=TrainingConfig(**QUICK, learning_rate=1e30, max_grad_norm=0, **more))
    assert not isinstance(raised.value, CheckpointError)
    with torch.no_grad():
        model.task.head.bias.fill_(torch.nan)
    good = tuned()
    good.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"head.bias has values that are not finite"):
        model.save_pretrained(tmp_path)
    assert memtune.load(tmp_path, backbone=good.backbone).task.digest() == good.task.digest()


def test_a_new_run_in_a_used_folder_takes_the_old_one_aside(tmp_path, caplog):
    options = QUICK | {"num_train_epochs": 4, "output_dir": tmp_path, "save_total_limit": 2}
    memtune.fit(tuned(), items(), config=TrainingConfig(**options))
    with caplog.at_level(logging.WARNING), pytest.raises(Stop):
        memtune.fit(tuned(), items(seed=5), config=TrainingConfig(**options), callbacks=[StopAfter(9)])
    assert "previous-1" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    resumed, whole = tuned(), tuned()
    memtune.fit(resumed, items(seed=5), config=TrainingConfig(**options), resume_from_checkpoint=True)
    memtune.fit(whole, items(seed=5), config=TrainingConfig(**QUICK | {"num_train_epochs": 4}))
    assert equal(weights(resumed), weights(whole))
    assert sorted(path.name for path in (tmp_path / "previous-1").iterdir()) == ["checkpoint-12", "checkpoint-16"]


def test_a_run_goes_on_only_with_its_images(tmp_path):
    config = TrainingConfig(**QUICK, output_dir=tmp_path)
    memtune.fit(tuned(), items(seed=0), config=config)
    with pytest.raises(ConfigError, match="train_data"):
        memtune.fit(tuned(), items(seed=9), config=config, resume_from_checkpoint=True)
    memtune.fit(tuned(), items(seed=0), config=config, callbacks=[TrainingCallback()], resume_from_checkpoint=True)


def test_a_run_goes_on_only_with_its_processor(tmp_path):
    pictures = [
        {"image": Image.new("RGB", (32, 32), (80 * (index % 2),) * 3), "label": index % 2} for index in range(8)
    ]
    data = datasets.Dataset.from_list(pictures).cast_column("image", datasets.Image())
    size = {"height": 32, "width": 32}
    processors = [ViTImageProcessorPil(size=size, image_mean=[mean] * 3) for mean in (0.5, 0.4)]
    config = TrainingConfig(**QUICK, output_dir=tmp_path)
    memtune.fit(tuned(processor=processors[0]), data, config=config)
    with pytest.raises(ConfigError, match=r"transform: got .*0\.4"):
        memtune.fit(tuned(processor=processors[1]), data, config=config, resume_from_checkpoint=True)
    memtune.fit(tuned(processor=processors[0]), data, config=config, resume_from_checkpoint=True)


class Steps(TrainingCallback):
    def __init__(self):
        self.number = 0

    def on_step_end(self, model):
        self.number += 1


@pytest.mark.parametrize(
    "wrong",
    [
        [{"pixel_values": torch.randn(3, 32, 32), "labels": 7}],
        [{"pixel_values": torch.randn(3, 32, 32)}],
        [{"pixel_values": torch.randn(3, 24, 24), "labels": 0}],
        [{"pixel_values": torch.randn(1, 32, 32), "labels": 0}],
    ],
    ids=["label", "no label", "size", "channels"],
)
def test_what_is_wrong_with_the_evaluation_is_said_before_the_first_step(wrong):
    steps = Steps()
    with pytest.raises(InputError):
        memtune.fit(tuned(), items(), wrong, TrainingConfig(**QUICK), callbacks=[steps])
    assert steps.number == 0


@pytest.mark.parametrize("name", ["output_dir", "trunk_cache"])
def test_folders_are_tried_before_the_first_step(name, tmp_path):
    steps, path = Steps(), tmp_path / "file"
    path.write_text("x")
    for folder in (path, path / "within"):
        with pytest.raises(ConfigError, match=f"{name}: .*nothing can be written"):
            memtune.fit(
                tuned(masked=True), items(), config=TrainingConfig(**QUICK, **{name: folder}), callbacks=[steps]
            )
    assert steps.number == 0


def test_an_evaluation_within_a_run_leaves_it_as_it_is():
    class Evaluates(TrainingCallback):
        def on_step_end(self, model):
            memtune.evaluate(model, items(6), TrainingConfig(mixed_precision="bf16", disable_tqdm=True))

    def run(*callbacks):
        model, seen = tuned(), []

        def loss(outputs, labels):
            seen.append(type(outputs.logits.grad_fn).__name__)
            return cross_entropy(outputs.logits, labels)

        config = TrainingConfig(**QUICK | {"per_device_train_batch_size": 2}, gradient_accumulation_steps=4)
        memtune.fit(model, items(), config=config, callbacks=callbacks, compute_loss_func=loss)
        return weights(model), seen

    (plain, seen), (measured, seen_too) = run(), run(Evaluates())
    assert seen == seen_too
    assert equal(plain, measured)


def test_an_accelerator_of_the_callers_keeps_its_precision():
    AcceleratorState._reset_state()
    mine = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3)
    memtune.evaluate(tuned(), items())
    memtune.fit(tuned(), items(), config=TrainingConfig(**QUICK))
    assert mine.mixed_precision == "bf16"
    assert mine.gradient_accumulation_steps == 3
    AcceleratorState._reset_state()
    memtune.evaluate(tuned(), items())
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"  # which another first one would not allow


def test_images_that_are_skipped_count_nowhere():
    class Gaps(list):
        def __getitem__(self, index):
            return None if index in (1, 7) else super().__getitem__(index)

    rows = items(8)
    whole = [row for index, row in enumerate(rows) if index not in (1, 7)]
    model = tuned()
    config = TrainingConfig(on_error="skip", per_device_eval_batch_size=7, disable_tqdm=True)
    assert memtune.evaluate(model, Gaps(rows), config) == pytest.approx(memtune.evaluate(model, whole))
    memtune.fit(model, Gaps(rows), config=TrainingConfig(**QUICK | {"per_device_train_batch_size": 1}, on_error="skip"))
    with pytest.raises(InputError, match="item 1 is None"):
        memtune.evaluate(model, Gaps(rows))
    with pytest.raises(InputError, match="none of the 3 images"):
        memtune.evaluate(model, [None] * 3, config)


def test_the_first_epoch_is_not_charged_for_the_cache(tmp_path, monkeypatch):
    def slowly(*arguments, original=memtune.TunedModel.trunk_pass, **options):
        import time

        time.sleep(0.05)
        return original(*arguments, **options)

    monkeypatch.setattr(memtune.TunedModel, "trunk_pass", slowly)
    config = TrainingConfig(**QUICK | {"per_device_train_batch_size": 1}, trunk_cache=tmp_path)
    result = memtune.fit(tuned(masked=True), items(32), config=config)
    assert result.seconds > 1.5
    assert result.history[0]["seconds"] < result.seconds - 1.5


def test_a_run_without_a_single_label_says_so(tmp_path):
    unlabelled = [{"pixel_values": torch.zeros(3, 32, 32), "labels": -100}] * 8
    model = named()
    with pytest.raises(InputError, match="no image of the epoch has a label to learn"):
        memtune.fit(model, unlabelled, config=TrainingConfig(**QUICK, output_dir=tmp_path))
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_a_run_within_a_context_without_gradients_is_the_same(mode):
    expected, model = named(), named()
    memtune.fit(expected, pictures(), config=TrainingConfig(**QUICK))
    with mode():
        memtune.fit(model, pictures(), config=TrainingConfig(**QUICK))
    assert equal(weights(model), weights(expected))
    tried = named()
    with mode():
        assert len(memtune.find_learning_rate(tried, pictures(), TrainingConfig(**QUICK), num_steps=6).losses)


@pytest.mark.parametrize("processor", ["google/vit-base-patch16-224", ViTImageProcessorPil, 3])
def test_what_is_no_processor_is_refused(processor):
    backbone = ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8))
    with pytest.raises(ConfigError, match=r"expected an image processor, such as AutoImageProcessor"):
        memtune.wrap(backbone, memtune.MemoryConfig(2), labels=["a", "b"], processor=processor)
