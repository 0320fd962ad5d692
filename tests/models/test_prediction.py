"""`predict`: images in every form, by one task and by many, from Python and from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from backbone_zoo import BY_NAME
from PIL import Image
from transformers import ViTImageProcessorPil

import memtune
from memtune import LoraConfig, MemoryConfig
from memtune.cli.parser import main
from memtune.errors import ConfigError, InputError

VIT = BY_NAME["vit-head"]
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
LABELS = {"pets": ["cat", "dog", "owl"], "signs": ["stop", "go"]}


def tuned(name: str, backbone: Any, processor: Any = PROCESSOR) -> memtune.TunedModel:
    config: Any = MemoryConfig(2) if name == "pets" else LoraConfig(r=2)
    model = memtune.wrap(backbone, config, labels=LABELS[name], masked=name == "pets", processor=processor).eval()
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.normal_()
    return model


@pytest.fixture
def models() -> dict[str, Any]:
    """A model of one task and one of two, on one backbone."""
    backbone = VIT.build()
    one = {name: tuned(name, backbone) for name in LABELS}
    return {"one": one["pets"], "many": memtune.combine(backbone, one)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five photos, one of them in a folder within, beside a text."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("b.png", "a.png", "c.jpg", "d.png", "more/e.png")):
        pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def expected(model: memtune.TunedModel, path: Path, labels: list[str]) -> list[dict[str, Any]]:
    """The answers by a pass over one image alone."""
    with torch.no_grad(), Image.open(path) as image:
        scores = model(PROCESSOR(images=image, return_tensors="pt").pixel_values).logits[0].softmax(-1)
    order = scores.argsort(descending=True).tolist()
    return [{"label": labels[place], "score": pytest.approx(float(scores[place]), abs=1e-5)} for place in order]


def test_a_folder(models: dict[str, Any], photos: Path) -> None:
    found = models["one"].predict(photos, batch_size=2)
    names = ["a.png", "b.png", "c.jpg", "d.png", "more/e.png"]
    assert found.images == [str(photos / name) for name in names]
    assert found == [expected(models["one"], photos / name, LABELS["pets"]) for name in names]
    assert found.problems == {}
    assert str(found).splitlines()[0].startswith(f"{photos / 'a.png'}\t{found[0][0]['label']} 0.")


def test_images_in_every_form(models: dict[str, Any], photos: Path) -> None:
    path = photos / "a.png"
    with Image.open(path) as image:
        picture = image.convert("RGB")
    right = expected(models["one"], path, LABELS["pets"])
    predict = models["one"].predict
    for one in (path, str(path), picture, np.asarray(picture), path.read_bytes(), {"bytes": path.read_bytes()}):
        assert predict(one) == right
        assert list(predict([one])) == [right]
    assert predict(path, top_k=1) == right[:1]
    assert predict(path, top_k=None) == right
    assert list(predict(np.stack([np.asarray(picture)] * 2))) == [right, right]
    data = datasets.Dataset.from_dict({"image": [str(path)], "label": [0]}).cast_column("image", datasets.Image())
    assert list(predict(data)) == [right]
    assert predict([picture, path]).images == ["image 0", str(path)]
    assert predict(str(photos / "*.png")).images == [str(photos / name) for name in ("a.png", "b.png", "d.png")]
    assert predict(str(photos / "**" / "e.png")).images == [str(photos / "more" / "e.png")]
    assert predict([]) == []


def test_many_tasks_from_one_pass(models: dict[str, Any], photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many, passes = models["many"], []
    forward = type(many).forward
    monkeypatch.setattr(type(many), "forward", lambda *args, **kw: passes.append(kw) or forward(*args, **kw))
    found = many.predict(photos, batch_size=4)
    assert [len(each) for each in (found, passes)] == [5, 2]
    one = models["one"].predict(photos)
    for answer, own in zip(found, one, strict=True):
        assert list(answer) == ["pets", "signs"]
        assert answer["pets"] == [{"label": a["label"], "score": pytest.approx(a["score"], abs=1e-5)} for a in own]
    assert list(many.predict(photos / "a.png", tasks=["signs"])) == ["signs"]


def test_the_mode_stays(models: dict[str, Any], photos: Path) -> None:
    model = models["one"].train()
    assert model.predict(photos) == models["one"].eval().predict(photos)
    model.train().predict(photos)
    assert model.training


def test_broken_images(models: dict[str, Any], photos: Path) -> None:
    (photos / "b.png").write_bytes(b"no png")
    with pytest.raises(InputError, match=r"b\.png cannot be read: .*skip such with on_error='skip'"):
        models["one"].predict(photos)
    found = models["one"].predict(photos, on_error="skip", batch_size=1)
    assert len(found) == len(found.images) == 4
    assert list(found.problems) == [str(photos / "b.png")]
    with pytest.raises(InputError, match="cannot be read"):
        models["one"].predict(photos / "b.png", on_error="skip")


def test_processors_that_fail(models: dict[str, Any], photos: Path) -> None:
    sizes = iter((32, 64))

    def uneven(images: Any, return_tensors: str) -> Any:
        size = next(sizes)
        return ViTImageProcessorPil(size={"height": size, "width": size})(images=images, return_tensors="pt")

    with pytest.raises(InputError, match=r"different shapes, \(3, 32, 32\) and \(3, 64, 64\)"):
        models["one"].predict([photos / "a.png", photos / "b.png"], image_processor=uneven)
    with pytest.raises(InputError, match=r"a\.png, 50 x 40 pixels, fails in the processor"):
        models["one"].predict(photos / "a.png", image_processor=uneven)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, ConfigError, "top_k: got 0"),
        ({"top_k": True}, ConfigError, "top_k: got True"),
        ({"batch_size": None}, ConfigError, "batch_size: got None"),
        ({"on_error": "ignore"}, ConfigError, "on_error: got 'ignore'"),
        ({"image_processor": 3}, ConfigError, "image_processor: got 3"),
        ({"tasks": ["pets"]}, ConfigError, "this model has one task"),
    ],
)
def test_wrong_options(models: dict[str, Any], photos: Path, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        models["one"].predict(photos, **options)


def test_wrong_tasks_and_images(models: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown tasks"):
        models["many"].predict(tmp_path, tasks=["birds"])
    with pytest.raises(InputError, match="expected a sequence"):
        models["many"].predict(tmp_path, tasks="pets")
    with pytest.raises(InputError, match="no image in this folder"):
        models["many"].predict(tmp_path)
    with pytest.raises(InputError, match=r"none\.png is no file"):
        models["one"].predict("none.png")
    with pytest.raises(InputError, match="got Tensor, expected an image"):
        models["one"].predict([torch.zeros(3, 32, 32)])
    for other in (None, 3):
        with pytest.raises(InputError, match=f"images: got {type(other).__name__}, expected paths"):
            models["one"].predict(other)
    backbone = VIT.build()
    with pytest.raises(ConfigError, match="image_processor: got None"):
        tuned("pets", backbone, processor=None).predict(tmp_path)
    features = memtune.wrap(backbone, MemoryConfig(2), head=None, processor=PROCESSOR)
    with pytest.raises(ConfigError, match="predict"):
        features.predict(tmp_path)
    with pytest.raises(ConfigError, match="none that have labels"):
        memtune.combine(backbone, {"a": features}).predict(tmp_path)


def test_tables_and_pictures(models: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    for model in models.values():
        found = model.predict(photos, top_k=2)
        found.to_csv(tmp_path / "answers.csv")
        rows = table(tmp_path / "answers.csv")
        first = found[0] if model is models["one"] else found[0]["pets"]
        assert [rows[0][key] for key in ("image", "rank", "label")] == [found.images[0], "1", first[0]["label"]]
        assert float(rows[1]["score"]) == pytest.approx(first[1]["score"], abs=1e-6)
        assert len(rows) == 5 * 2 * (1 if model is models["one"] else 2)
        found.draw(tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width > 800


@pytest.fixture
def saved(models: dict[str, Any], tmp_path: Path) -> Path:
    """A folder with the backbone, an adapter and a collection."""
    backbone = models["one"].backbone
    backbone.save_pretrained(tmp_path / "backbone")
    models["one"].save_pretrained(tmp_path / "pets", base_model_name=str(tmp_path / "backbone"))
    models["many"].save_pretrained(tmp_path / "both", base_model_name=str(tmp_path / "backbone"))
    return tmp_path


def test_the_command_takes_folders_patterns_and_collections(
    models: dict[str, Any], photos: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [
        [(best["label"], pytest.approx(best["score"], abs=1e-5)) for best in each]
        for each in models["one"].predict(photos)
    ]
    for images in (str(photos), str(photos / "**" / "*")):
        given = ["predict", images, "--adapter", str(saved / "pets"), "--top_k", "3", "--json"]
        code = main(given)
        answers = json.loads(capsys.readouterr().out)
        assert [[tuple(each) for each in answer["tasks"]["pets"]] for answer in answers][:5] == right
        assert code == (0 if images == str(photos) else 1)  # a pattern takes the text as well
    assert main(["predict", str(photos), "--adapter", str(saved / "both")]) == 0
    assert [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()] == ["pets", "signs"] * 5
    output = saved / "answers.csv"
    assert main(["predict", str(photos), "--adapter", str(saved / "both"), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"5 images; the answers are in {output}\n"
    rows = table(output)
    assert {row["task"] for row in rows} == set(LABELS)
    models["many"].predict(photos, top_k=1).to_csv(saved / "own.csv")
    own = table(saved / "own.csv")
    assert [list(row.values())[:4] for row in rows] == [list(row.values())[:4] for row in own]


def test_the_command_refuses_in_one_line(photos: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (["--output", "nowhere/answers.csv"], "--output: got 'nowhere/answers.csv', but there is no folder nowhere"),
        (["--adapter", f"pets={saved / 'pets'}"], "names a task twice: 'pets'"),
        (["--image_size", "33"], "33"),
        (["--device", "nothing"], "--device: 'nothing' cannot be used"),
    ):
        assert main(["predict", str(photos), "--adapter", str(saved / "both"), *more]) == 1
        assert message in capsys.readouterr().err


def test_without_the_adapter_there_are_no_such_labels(models: dict[str, Any], photos: Path) -> None:
    model = models["one"]
    with model.disable_adapter():
        for ask in (
            lambda: model.predict(photos),
            lambda: memtune.evaluate(model, []),
            lambda: memtune.fit(model, []),
        ):
            with pytest.raises(ConfigError, match=r"within disable_adapter\(\) the answers are the backbone's own"):
                ask()
