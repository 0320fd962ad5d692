"""A look at data before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune.cli import main
from memtune.errors import InputError, MemtuneError

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def model(*labels: str) -> memtune.TunedModel:
    backbone = ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8))
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return memtune.wrap(backbone, memtune.MemoryConfig(1), labels=labels, processor=processor)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two parts of two classes, without a fault."""
    noise = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                values = noise.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
                Image.fromarray(values).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def test_what_is_right(folder: Path) -> None:
    report = memtune.inspect_data(folder, model=model("dog", "cat"))
    assert (report.problems, report.notes) == ([], [])
    train = report.parts["train"]
    assert (train.images, train.classes) == (8, {"cat": 4, "dog": 4})
    assert (train.smallest, train.largest) == ((20, 30), (23, 30))
    assert list(report.parts) == ["train", "test"]
    assert "nothing is wrong" in str(report)
    assert report.samples is not None
    assert report.samples.shape == (8, 3, 32, 32)
    report.draw(folder / "samples.png")
    with Image.open(folder / "samples.png") as drawn:
        assert drawn.width > 100


def test_broken_images_are_named(folder: Path) -> None:
    (folder / "train" / "cat" / "1.png").write_bytes(b"no picture")
    (folder / "test" / "dog" / "0.png").write_bytes((folder / "test" / "dog" / "0.png").read_bytes()[:200])
    report = memtune.inspect_data(folder)
    assert len(report.problems) == 2
    assert "cat/1.png" in report.problems[0]
    assert "dog/0.png" in report.problems[1]


def test_what_is_in_two_parts_or_twice(folder: Path) -> None:
    picture = (folder / "train" / "cat" / "1.png").read_bytes()
    (folder / "test" / "cat" / "7.png").write_bytes(picture)
    (folder / "train" / "dog" / "7.png").write_bytes(picture)
    report = memtune.inspect_data(folder)
    assert len(report.problems) == 1
    assert "train and test share 1 images" in report.problems[0]
    assert report.notes == ["train: 1 images are there twice, byte for byte"]


def test_classes_that_differ(folder: Path) -> None:
    (folder / "test" / "cat").rename(folder / "test" / "cow")
    report = memtune.inspect_data(folder)
    assert report.problems == ["test: has the classes ['cow'], of which train has no image"]
    assert report.notes == ["test: lacks the classes ['cat'], which are not measured there"]
    with_model = memtune.inspect_data(folder, model=model("cat", "dog"))
    assert any("'cow'" in each and "none of the model's labels" in each for each in with_model.problems)


def test_uneven_classes() -> None:
    labels = [0] * 30 + [1] * 2
    pairs = [(Image.new("RGB", (8, 8), (number, label, 0)), label) for number, label in enumerate(labels)]
    (note,) = memtune.inspect_data(pairs).notes
    assert "'0' has 30 images and '1' 2" in note


def test_any_kind_of_data(folder: Path) -> None:
    tensors = [{"pixel_values": torch.randn(3, 32, 32), "labels": number % 2} for number in range(4)]
    report = memtune.inspect_data(tensors, validation=[*tensors[:1], {"pixel_values": torch.zeros(3, 32, 32)}])
    assert report.parts["train"].classes == {"0": 2, "1": 2}
    assert len(report.problems) == 2
    assert "lacks ['labels']" in report.problems[0]
    streamed = datasets.Dataset.from_list([{"image": Image.new("RGB", (8, 8)), "label": "x"}] * 2)
    assert memtune.inspect_data(datasets.DatasetDict(train=streamed)).parts["train"].classes == {"x": 2}
    assert memtune.inspect_data(tensors, max_images=2).parts["train"].looked_at == 2
    for nothing in ([], 3, "nowhere"):
        with pytest.raises(InputError):
            memtune.inspect_data(nothing)
    with pytest.raises(MemtuneError, match="pass model="):
        memtune.inspect_data(tensors).draw("x.png")


def test_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-data", str(folder)]) == 0
    assert "train: 8 images of 2 classes (cat 4, dog 4)" in capsys.readouterr().out
    (folder / "train" / "cat" / "1.png").write_bytes(b"no picture")
    assert main(["inspect-data", str(folder), "--json"]) == 1
    assert "cannot be read" in capsys.readouterr().out
    assert main(["inspect-data", str(folder), "--picture", "x.png"]) == 1
    assert "--adapter" in capsys.readouterr().err


def stream(count: int) -> Any:
    def rows() -> Any:
        for number in range(count):
            yield {"image": Image.new("RGB", (32, 32), (number % 2 * 200,) * 3), "label": number % 2}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])})
    return datasets.IterableDataset.from_generator(rows, features=features)


def test_a_stream_is_read_for_as_many_steps_as_are_asked_for() -> None:
    tuned = model("bright", "dark")
    settings = {"per_device_train_batch_size": 4, "disable_tqdm": True, "learning_rate": 0.01}
    with pytest.raises(InputError, match="set max_steps"):
        memtune.fit(tuned, stream(8), config=memtune.TrainingConfig(**settings))
    result = memtune.fit(tuned, stream(10_000_000), config=memtune.TrainingConfig(max_steps=20, **settings))
    assert result.steps == 20
    again = datasets.Dataset.from_list(list(stream(6)), features=stream(1).features)
    assert memtune.evaluate(tuned, again)["accuracy"] == 1.0  # the classes go by name in a stream, too
    with pytest.raises(InputError, match="expected a data set with a length"):
        memtune.evaluate(tuned, stream(8))
