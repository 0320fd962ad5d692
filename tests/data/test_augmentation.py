"""Random augmentation: RandAugment, MixUp and CutMix by torchvision, and what a data set of one's own can do.

Where torchvision is not installed, `test_timm_and_torchvision.py` runs this file in a process that has it.
"""

from __future__ import annotations

import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from docs_material import pictures
from PIL import Image
from torch import Tensor
from training_runs import QUICK, Stop, StopAfter, equal, items, tuned, weights
from transformers import ViTImageProcessorPil

import memtune
from memtune import TrainingConfig
from memtune.data.augmentation import Augmentation, Changes
from memtune.data.images import ImageDataset
from memtune.errors import ConfigError, InputError
from memtune.preparation import make_mixing
from memtune.preparation.loaders import make_accelerator, make_loader

STRONG: dict[str, Any] = {"randaugment_ops": 2, "randaugment_magnitude": 15}
MIXED: dict[str, Any] = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
STEPS = 6
"""Of three epochs."""

torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")


STRONGLY = Changes(operations=2, magnitude=15)


def workers(test: Any) -> Any:
    """A test of torchvision's in several processes."""
    for warning in ("This DataLoader will create:UserWarning", "This process .* is multi-threaded:DeprecationWarning"):
        test = pytest.mark.filterwarnings(f"ignore:{warning}")(test)  # on one core; from Python 3.12 on
    return torchvision(test)


def model(*, masked: bool = False) -> memtune.TunedModel:
    return tuned(masked=masked, processor=PROCESSOR)


def images(number: int = 8, seed: int = 0) -> datasets.Dataset:
    """Images of two classes."""
    return pictures(["cat", "dog"], number, seed)


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 48, 3), dtype=np.uint8))


def fit(data: Any, *, stop: int | None = None, resume: bool = False, **settings: Any) -> Any:
    """The weights that a run of three epochs ends with, and its result; None if it was stopped after a step."""
    trained = model(masked=settings.pop("masked", False))
    config = TrainingConfig(**QUICK | {"num_train_epochs": 3} | settings)
    callbacks = [] if stop is None else [StopAfter(stop)]
    try:
        result = memtune.fit(trained, data, images(4, 90), config, callbacks=callbacks, resume_from_checkpoint=resume)
    except Stop:
        return None
    return weights(trained), result


def check_resumed(data: Any, folder: Path, **settings: Any) -> None:
    """A run that was stopped at any step ends as one that was not."""
    settings |= {"save_strategy": "steps", "save_steps": 1}
    expected, whole = fit(data, **settings, output_dir=folder / "whole")
    assert whole.steps == STEPS
    for stop in range(2, STEPS):
        fit(data, stop=stop, **settings, output_dir=folder / str(stop))
        values, result = fit(data, resume=True, **settings, output_dir=folder / str(stop))
        assert equal(values, expected)
        assert [entry["loss"] for entry in result.history] == [entry["loss"] for entry in whole.history]


# RandAugment


@torchvision
def test_an_image_is_a_function_of_seed_version_and_place() -> None:
    def versions(seed: int, version: int, places: range) -> list[bytes]:
        return [Augmentation(STRONGLY, seed)(noise(), place, version).tobytes() for place in places]

    one = versions(3, 1, range(40))
    torch.manual_seed(7)  # whatever is drawn elsewhere
    assert versions(3, 1, range(40)) == one
    assert versions(3, 1, range(39, -1, -1)) == one[::-1]
    for others in (versions(4, 1, range(40)), versions(3, 2, range(40)), versions(3, 1, range(40, 80))):
        assert sum(a != b for a, b in zip(one, others, strict=True)) > 30
    assert len({*one}) > 25  # among two operations of 14 some are the same
    assert {*versions(3, 0, range(40))} == {noise().tobytes()}


@torchvision
def test_an_image_is_what_torchvision_makes_of_it() -> None:
    from torchvision.transforms import v2

    made = [Augmentation(STRONGLY, 0)(noise(), place, 4) for place in range(30)]
    assert {each.mode for each in made} == {"RGB"}
    assert {each.size for each in made} == {(48, 40)}
    transform = v2.RandAugment(2, 15)
    for place, each in enumerate(made):
        torch.manual_seed(int(np.random.SeedSequence([0, 4, place]).generate_state(1, np.uint64)[0]))
        assert transform(noise()).tobytes() == each.tobytes()


@torchvision
def test_the_random_states_of_training_are_left_alone() -> None:
    augment, before = Augmentation(STRONGLY, 0), torch.get_rng_state()
    for place in range(5):
        augment(noise(), place, 1)
    assert torch.equal(torch.get_rng_state(), before)


@torchvision
def test_it_travels_to_processes_that_start_anew() -> None:
    augment = Augmentation(STRONGLY, 0)
    again = pickle.loads(pickle.dumps(augment))
    assert [again(noise(), place, 4).tobytes() for place in range(9)] == [
        augment(noise(), place, 4).tobytes() for place in range(9)
    ]


def read(loader: Any) -> dict[int, Tensor]:
    """The images of an epoch by their class."""
    return {
        int(label): pixels
        for batch in loader
        for label, pixels in zip(batch["labels"], batch["pixel_values"], strict=True)
    }


def same(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@workers
def test_workers_and_processes_read_the_same_images() -> None:
    trained = memtune.wrap(tuned().detach(), memtune.MemoryConfig(2), num_labels=10, processor=PROCESSOR)

    def loader(workers: int = 0) -> Any:
        config = TrainingConfig(per_device_train_batch_size=3, dataloader_num_workers=workers)
        draws = {
            "order": torch.Generator().manual_seed(5),
            "augment": Augmentation(STRONGLY, 0),
        }
        data = pictures([str(place) for place in range(10)], 1, 0)  # each image has its place as its class
        return make_loader(trained, data, config, make_accelerator(config), **draws)

    expected = []
    for workers in (0, 2):
        each = prepare_data_loader(loader(workers), put_on_device=False)
        expected.append([read(each), read(each)])  # two epochs
    assert all(same(*epochs) for epochs in zip(*expected, strict=True))
    assert len(expected[0][0]) == 10
    assert not same(expected[0][0], expected[0][1])
    shares = [
        prepare_data_loader(loader(), num_processes=2, process_index=index, put_on_device=False, even_batches=False)
        for index in range(2)
    ]
    for epoch in range(2):
        parts = [read(share) for share in shares]
        assert not parts[0].keys() & parts[1].keys()
        assert same(parts[0] | parts[1], expected[0][epoch])


@workers
def test_workers_train_the_same() -> None:
    expected, _ = fit(images(), **STRONG)
    assert equal(fit(images(), **STRONG, dataloader_num_workers=2)[0], expected)
    assert not equal(fit(images())[0], expected)


@torchvision
@pytest.mark.parametrize("settings", [STRONG, MIXED, STRONG | MIXED], ids=["augmented", "mixed", "both"])
def test_a_run_that_was_interrupted_sees_the_same_images(settings: dict[str, Any], tmp_path: Path) -> None:
    check_resumed(images(), tmp_path, **settings)


@torchvision
def test_evaluation_sees_the_images_as_they_are() -> None:
    trained = model()
    settings = QUICK | STRONG | {"max_steps": 1}
    result = memtune.fit(trained, images(), images(4, 90), TrainingConfig(**settings))
    plain = memtune.evaluate(trained, images(4, 90))
    assert memtune.evaluate(trained, images(4, 90), TrainingConfig(**settings)) == plain
    assert {name: result.history[-1][f"eval_{name}"] for name in plain} == pytest.approx(plain, abs=1e-6)


# RandAugment and the trunk cache


class Versions(list):
    """A data set of one's own, whose epochs go through versions of images in turn."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(self.epoch % 3)[index]

    def __len__(self) -> int:
        return len(super().__getitem__(0))


def masked_run(data: Any, *, seed: int = 0, **settings: Any) -> Any:
    """The weights that five epochs in masked mode end with, from the same values on, and the loss in evaluation."""
    values, result = fit(data, masked=True, num_train_epochs=5, seed=seed, **settings)
    return values, result.history[-1]["eval_loss"]


def cached(folder: Path, **settings: Any) -> dict[str, Any]:
    versions = {"trunk_cache": folder, "trunk_cache_dtype": "float32", "trunk_cache_versions": 3}
    return STRONG | versions | settings


def entries(folder: Path) -> set[Path]:
    return {*folder.rglob("*.safetensors")}


@torchvision
def test_a_cache_holds_some_versions_and_epochs_go_through_them(tmp_path: Path) -> None:
    augmented = ImageDataset(images(), PROCESSOR, augment=Augmentation(STRONGLY, 0))
    own = Versions([augmented.version(index, version) for index in range(len(augmented))] for version in range(3))
    expected, loss = masked_run(own, seed=4)
    values, found = masked_run(images(), seed=4, **cached(tmp_path))
    assert equal(values, expected)
    assert found == loss
    assert not equal(masked_run(images(), seed=4)[0], expected)
    assert len(entries(tmp_path)) == 3 * len(images()) + len(images(4, 90))


@torchvision
def test_versions_are_those_of_all_seeds_and_one_is_the_image_itself(tmp_path: Path) -> None:
    masked_run(images(), **cached(tmp_path))
    before = entries(tmp_path)
    masked_run(images(), seed=1, **cached(tmp_path))
    plain = {"randaugment_ops": 0, "trunk_cache_versions": 1}
    masked_run(images(), **cached(tmp_path, **plain))
    assert entries(tmp_path) == before
    masked_run(images(), **cached(tmp_path, randaugment_magnitude=16))
    assert len(entries(tmp_path)) == len(before) + 2 * len(images())


@torchvision
def test_a_cached_run_that_was_interrupted_goes_on_with_its_version(tmp_path: Path) -> None:
    check_resumed(images(), tmp_path, masked=True, **cached(tmp_path / "cache"))


@torchvision
def test_an_unreadable_image_is_named_once_in_all_versions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = images().cast_column("image", datasets.Image(decode=False)).to_list()
    broken[3]["image"] = {"bytes": b"no picture", "path": "broken.png"}
    data = datasets.Dataset.from_list(broken, features=images().features)
    with caplog.at_level("WARNING", logger="memtune"):
        masked_run(data, **cached(tmp_path, on_error="skip"))
    computed = [record for record in caplog.records if "broken.png" in record.getMessage()]
    assert computed
    assert len(entries(tmp_path)) == 3 * (len(images()) - 1) + len(images(4, 90))


# MixUp and CutMix


@torchvision
@pytest.mark.parametrize(("name", "alpha"), [("mixup_alpha", 0.2), ("cutmix_alpha", 1.0)])
def test_labels_are_mixed_as_images_are(name: str, alpha: float) -> None:
    mixing = make_mixing(TrainingConfig(**{name: alpha}), 4)
    assert mixing is not None
    torch.manual_seed(0)
    # an image of each class, all of whose pixels are the class: its mean after mixing is that of its shares
    labels = torch.arange(4)
    pixels = labels[:, None, None, None].float().expand(4, 3, 32, 32).contiguous()
    mixtures = 0
    for _ in range(10):
        mixed, shares = mixing(pixels, labels)
        assert shares.shape == (4, 4)
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        torch.testing.assert_close(shares @ labels.float(), mixed.mean(dim=(1, 2, 3)), atol=1e-5, rtol=0)
        if name == "mixup_alpha":
            assert (mixed == mixed[:, :1, :1, :1]).all()
        else:
            assert {*mixed.unique().tolist()} <= {0, 1, 2, 3}
        mixtures += ((shares > 0.01).sum(1) == 2).all().item()
    assert mixtures > 3


@torchvision
@pytest.mark.parametrize("settings", [{"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}, MIXED], ids=str)
def test_the_loss_gets_shares_of_classes(settings: dict[str, Any]) -> None:
    seen = []

    def loss(outputs: Any, labels: Tensor) -> Tensor:
        seen.append(labels)
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    trained, before = tuned(), weights(tuned())
    config = TrainingConfig(**QUICK | {"max_steps": 8} | settings)
    result = memtune.fit(trained, items(), config=config, compute_loss_func=loss)
    assert result.steps == 8
    assert {tuple(labels.shape) for labels in seen} == {(8, 2)}
    assert all(torch.allclose(labels.sum(1), torch.ones(8)) for labels in seen)
    assert any(((labels > 0.01) & (labels < 0.99)).any() for labels in seen)
    assert not equal(weights(trained), before)


# A data set of one's own


class Drawn(list):
    """Items with noise that the epoch and the place decide."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: Any) -> dict[str, Any]:
        item = super().__getitem__(index)
        generator = torch.Generator().manual_seed(1000 * self.epoch + index)
        return item | {"pixel_values": item["pixel_values"] + torch.randn(3, 32, 32, generator=generator)}


def test_a_data_set_is_told_the_epoch_also_after_an_interruption(tmp_path: Path) -> None:
    check_resumed(Drawn(items(16)), tmp_path)


# What is refused


def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torchvision.")] + ["torchvision"]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("settings", [{"randaugment_ops": 2}, {"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}], ids=str)
def test_torchvision_is_asked_for(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    without_torchvision(monkeypatch)
    name = next(iter(settings))
    with pytest.raises(ConfigError, match=f"{name}.*: torchvision is needed; pip install torchvision"):
        fit(images(), **settings)
    memtune.evaluate(model(), images(), TrainingConfig(**settings))  # which needs none


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup_alpha": 0.2}, "a trunk cache has no images to mix"),
        ({"randaugment_ops": 2}, "randaugment_ops, .*: a trunk cache computes each image once; say how many versions"),
        ({"trunk_cache_versions": 4}, "trunk_cache_versions: got 4, but only a trunk cache with augmentation"),
    ],
    ids=str,
)
def test_what_a_trunk_cache_cannot_do(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    trained = model(masked=True)
    config = TrainingConfig(**QUICK | settings, trunk_cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match=message):
        memtune.fit(trained, images(), images(), config)
    assert not (tmp_path / "cache").exists()


def test_a_data_set_of_items_is_its_owners_to_augment(monkeypatch: pytest.MonkeyPatch) -> None:
    unused = SimpleNamespace(RandAugment=lambda operations, magnitude: None)
    monkeypatch.setattr("memtune.data.augmentation.torchvision_transforms", lambda settings: unused)
    rows = datasets.Dataset.from_list([{"pixel_values": torch.zeros(3, 32, 32).tolist(), "labels": 0}] * 2)
    for data, kind in ((items(8), "list"), (rows, "Dataset")):
        with pytest.raises(InputError, match=rf"randaugment_ops: got items of pixel_values \({kind}\), expected pict"):
            fit(data, **STRONG)


@torchvision
def test_crops_flips_and_colours_are_those_of_torchvision() -> None:
    from torchvision.transforms import v2

    image = noise()
    flipped = Augmentation(Changes(flip=0.99), 0)
    mirrored = [flipped(image, place, 1).tobytes() for place in range(20)]
    assert set(mirrored) <= {image.tobytes(), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()}
    assert mirrored.count(image.tobytes()) < 4
    cropped = [Augmentation(Changes(crop=0.3), 0)(image, place, 1) for place in range(10)]
    assert {each.size for each in cropped} == {image.size}
    assert len({each.tobytes() for each in cropped}) == 10
    assert Augmentation(Changes(crop=0.3), 0)(image, 3, 1).tobytes() == cropped[3].tobytes()
    one = Augmentation(Changes(jitter=0.4, flip=0.5), 0)
    assert one(image, 0, 1).tobytes() != image.tobytes()
    assert one(image, 0, 0) is image
    assert one.describe(0, 1) != Augmentation(Changes(jitter=0.3, flip=0.5), 0).describe(0, 1)
    assert "RandAugment" in Augmentation(STRONGLY, 0).describe(0, 1)
    assert isinstance(one._transforms[1], v2.ColorJitter)
