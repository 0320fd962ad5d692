"""`memtune merge`, `export`, `explain`, `cache`, `sweep` and `continual`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from backbone_zoo import BY_NAME
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

import memtune
from memtune import LoraConfig, MemoryConfig, TrainingConfig
from memtune.cli.parser import main
from memtune.errors import ConfigError
from memtune.trunk_cache import find_damaged, list_folders, prune

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, an adapter of each mode, a folder of both, and an image."""
    folder = tmp_path_factory.mktemp("desk")
    backbone: Any = BY_NAME["vit-head"].build()
    backbone.save_pretrained(folder / "backbone")
    backbone = AutoModelForImageClassification.from_pretrained(folder / "backbone")
    models = {}
    for name, config, masked in (("plain", LoraConfig(r=2), False), ("masked", MemoryConfig(2), True)):
        model = memtune.wrap(backbone, config, labels=["cat", "dog"], masked=masked, processor=PROCESSOR).eval()
        with torch.no_grad():
            for parameter in model.task.parameters():
                parameter.normal_(std=0.2)
        model.save_pretrained(folder / name)
        models[name] = model
    memtune.combine(backbone, models).save_pretrained(folder / "both")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "image.png")
    return folder


def images_of(desk: Path) -> torch.Tensor:
    with Image.open(desk / "image.png") as image:
        return PROCESSOR(images=image, return_tensors="pt").pixel_values


def test_merge(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(desk / "plain"), str(tmp_path / "merged"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_class"] == "ViTForImageClassification"
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "cat", 1: "dog"}
    with torch.no_grad():
        expected = memtune.load(desk / "plain")(images_of(desk)).logits
        torch.testing.assert_close(merged(images_of(desk)).logits, expected, atol=1e-5, rtol=1e-4)
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    assert main(["merge", str(desk / "masked"), str(tmp_path / "none")]) == 1
    assert "a masked adapter cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# torch's own, when a program is exported (torch 2.13)
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.slow
def test_export(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(desk / "both"), str(tmp_path / "both.pt2")]) == 0
    program = torch.export.load(tmp_path / "both.pt2").module()
    outputs = program(images_of(desk))
    for name in ("plain", "masked"):
        with torch.no_grad():
            expected = memtune.load(desk / name)(images_of(desk)).logits
        torch.testing.assert_close(outputs[name], expected, atol=1e-5, rtol=1e-4)
    assert main(["export", str(desk / "plain"), str(tmp_path / "plain.txt")]) == 1
    assert "expected a file .onnx or .pt2" in capsys.readouterr().err


def test_explain(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "look.png"
    for adapter, more in ((desk / "masked", []), (desk / "both", ["--task", "masked"])):
        assert main(["explain", str(desk / "image.png"), str(adapter), str(picture), *more, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        best = memtune.load(desk / "masked").predict(desk / "image.png", top_k=1)[0]
        assert (found["label"], found["probability"]) == (best["label"], pytest.approx(best["score"], abs=1e-5))
        assert picture.stat().st_size > 1000
    assert main(["explain", str(desk / "image.png"), str(desk / "masked"), "nowhere/look.png"]) == 1
    assert "output: got 'nowhere/look.png'" in capsys.readouterr().err


@pytest.fixture
def cache(desk: Path, tmp_path: Path) -> Path:
    """A trunk cache of six images, in two types."""
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 3}, features=features)
    model = memtune.load(desk / "masked")
    for dtype in ("float32", "int8"):
        config = TrainingConfig(
            disable_tqdm=True,
            max_steps=1,
            trunk_cache=tmp_path / "cache",
            trunk_cache_dtype=dtype,  # type: ignore[arg-type]
        )
        memtune.fit(model, data, config=config)
    return tmp_path / "cache"


def test_a_cache_is_listed_and_checked(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls", str(cache), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sorted((row["dtype"], row["images"]) for row in rows) == [("float32", 6), ("int8", 6)]
    files = list(cache.rglob("*.safetensors"))
    assert sum(row["bytes"] for row in rows) == sum(path.stat().st_size for path in files)
    assert {row["backbone"].split()[0] for row in rows} == {"vit"}
    assert main(["cache", "verify", str(cache)]) == 0
    content = files[3].read_bytes()
    files[3].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    files[5].write_bytes(b"")
    capsys.readouterr()
    assert main(["cache", "verify", str(cache), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["damaged"] == sorted(map(str, (files[3], files[5])), key=order(cache))


def order(cache: Path) -> Any:
    """The order in which damaged entries are named: by the folders, the newest first."""
    folders = [str(each.path) for each in list_folders(cache)]
    return lambda path: (folders.index(str(Path(path).parents[1])), path)


def test_a_cache_is_pruned_of_what_is_its_own(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = list_folders(cache)[::-1]
    long_ago = time.time() - 10 * 24 * 3600
    for path in old.path.rglob("*.safetensors"):
        os.utime(path, (long_ago, long_ago))
    (new.path / "notes.txt").write_text("mine")
    (cache / "mine").mkdir()
    assert prune(cache, days=30) == []
    assert main(["cache", "prune", str(cache), "--days", "5"]) == 0
    assert capsys.readouterr().out.startswith(f"deleted {old.path.name}")
    assert not old.path.exists()
    assert [each.path for each in list_folders(cache)] == [new.path]
    assert len(prune(cache, max_gb=0)) == 1
    assert [path.name for path in sorted(cache.rglob("*")) if path.is_file()] == ["notes.txt"]
    assert (cache / "mine").is_dir()
    with pytest.raises(ConfigError, match="got neither"):
        prune(cache)


def test_what_is_no_cache_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    for action in (list_folders, find_damaged, lambda folder: prune(folder, days=0)):
        with pytest.raises(ConfigError, match="expected the folder of a trunk cache"):
            action(tmp_path)
    assert main(["cache", "ls", str(tmp_path / "nothing")]) == 1
    assert "expected the folder of a trunk cache" in capsys.readouterr().err
    assert (tmp_path / "photo.jpg").is_file()


def photos(folder: Path, classes: list[str], count: int) -> Path:
    """A folder for each class, each in a shade of its own."""
    random = np.random.default_rng(0)
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 60, (32, 32, 3)) + 190 // len(classes) * place
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def trained_on(desk: Path) -> Path:
    """The desk, whose backbone has a processor, with images of four classes in two parts."""
    PROCESSOR.save_pretrained(desk / "backbone")
    for part, count in (("train", 5), ("test", 2)):
        photos(desk / "shades" / part, ["black", "dark", "light", "white"], count)
    return desk


def test_sweep(trained_on: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["sweep", "--model_name_or_path", str(trained_on / "backbone"), "--train_dir"]
    given += [str(trained_on / "shades" / "train"), "--test_dir", str(trained_on / "shades" / "test"), "--masked"]
    given += ["--search", "learning_rate=log:1e-3:1e-1", "memory.tokens=1,2", "weight_decay=0:1", "--n_trials", "2"]
    given += ["--seeds", "0", "--max_steps", "1", "--output_dir", str(tmp_path / "search"), "--disable_tqdm", "--cpu"]
    assert main([*given, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["trials"]) == 2
    assert len(values["finals"]) == 1
    assert main(given) == 0  # nothing is left to do
    assert "test:" in capsys.readouterr().out
    assert main([*given, "--method_config", "[1]"]) == 1
    assert "--method_config: got [1]" in capsys.readouterr().err
    for wrong in ("learning_rate", "learning_rate=log:1", "=1,2"):
        with pytest.raises(SystemExit, match="2"):
            main([*given, "--search", wrong])
        assert "expected NAME=LOW:HIGH or NAME=A,B,C" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["closed_form", "memory", "head"])
def test_continual(trained_on: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    given = ["continual", "--model_name_or_path", str(trained_on / "backbone"), "--data_dir"]
    given += [str(trained_on / "shades"), "--method", method, "--tasks", "2", "--output_dir", str(tmp_path / "run")]
    given += ["--max_steps", "2", "--disable_tqdm", "--cpu"]
    more = ["--random_features", "50"] if method == "closed_form" else []
    assert main([*given, *more, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert {name: summary[name] for name in scores} == scores
    assert summary["command"].startswith("memtune continual")
    assert (tmp_path / "run" / "accuracy.png").is_file()
    assert main([*given, *more]) == 0  # what is there is taken
    assert "%" in capsys.readouterr().out
    assert main([*given, "--method", "full", "--masked"]) == 1
    assert "--method full: it trains the backbone" in capsys.readouterr().err
