"""Reports of evaluations: every figure by its definition, files, pages with strangers' names, and the command."""

from __future__ import annotations

import csv
import json
import math
from html.parser import HTMLParser
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
from memtune import LoraConfig, MemoryConfig, TrainingConfig
from memtune.cli.parser import main
from memtune.errors import ConfigError, InputError, MemtuneError
from memtune.evaluation import EvaluationReport

VIT = BY_NAME["vit-head"]
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
LABELS = ["cat", "dog", "<owl>", "$x^$", "ant", "bee", "fly"]


def data(count: int = 40, labels: list[str] = LABELS, seed: int = 0) -> datasets.Dataset:
    random = np.random.default_rng(seed)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=labels)})
    images = [Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
    chosen = random.integers(0, len(labels) - 1, count).tolist()  # none of the last class
    return datasets.Dataset.from_dict({"image": images, "label": chosen}, features=features)


def wrapped(backbone: Any = None, labels: list[str] = LABELS, **options: Any) -> memtune.TunedModel:
    torch.manual_seed(0)
    given: dict[str, Any] = {"masked": True, "processor": PROCESSOR} | options
    model = memtune.wrap(VIT.build() if backbone is None else backbone, MemoryConfig(2), labels=labels, **given)
    torch.nn.init.normal_(model.task.head.weight, std=0.5)
    return model.eval()


def logits_of(model: memtune.TunedModel, images: datasets.Dataset) -> np.ndarray:
    with torch.no_grad():
        return model(PROCESSOR(images=images["image"][:], return_tensors="pt").pixel_values).logits.double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def calibration_error(probabilities: np.ndarray, true: np.ndarray) -> float:
    """By its definition, part by part."""
    total = 0.0
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == true
    for part in range(15):
        there = [place for place in range(len(true)) if part / 15 < sure[place] <= (part + 1) / 15]
        if there:
            total += len(there) / len(true) * abs(np.mean(sure[there]) - np.mean(right[there]))
    return total


def test_every_figure_by_its_definition() -> None:
    model, images = wrapped(), data()
    report = memtune.evaluate(model, images, report=True)
    logits, true = logits_of(model, images), np.array(images["label"][:])
    probabilities = softmax(logits)
    answered = probabilities.argmax(axis=1)
    assert report.scores == pytest.approx(memtune.evaluate(model, images), abs=1e-6)
    np.testing.assert_allclose(report.answers, probabilities, atol=1e-5)
    confusion = [[int(((true == row) & (answered == column)).sum()) for column in range(7)] for row in range(7)]
    assert report.confusion.tolist() == confusion
    recalls, f1s = [], []
    for place, row in enumerate(report.per_class):
        hits, own, given = confusion[place][place], sum(confusion[place]), sum(line[place] for line in confusion)
        recall, precision = hits / own if own else 0.0, hits / given if given else 0.0
        f1 = 2 * hits / (own + given) if own + given else 0.0
        assert row == {
            "label": LABELS[place],
            "precision": pytest.approx(precision),
            "recall": pytest.approx(recall),
            "f1": pytest.approx(f1),
            "images": own,
        }
        if own:
            recalls.append(recall)
            f1s.append(f1)
    summary = report.summary
    assert summary["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert summary["macro_f1"] == pytest.approx(np.mean(f1s))
    order = np.argsort(-probabilities, axis=1)[:, :5]
    assert summary["top_5_accuracy"] == pytest.approx(
        np.mean([label in row for label, row in zip(true, order, strict=True)])
    )
    assert summary["calibration_error"] == pytest.approx(calibration_error(probabilities, true), abs=1e-5)

    def loss(temperature: float) -> float:
        return float(-np.log(softmax(logits / temperature)[np.arange(len(true)), true]).mean())

    best = min((math.exp(number / 200) for number in range(-600, 600)), key=loss)
    assert summary["temperature"] == pytest.approx(best, rel=0.02)
    at_best = calibration_error(softmax(logits / summary["temperature"]), true)
    assert summary["calibration_error_at_temperature"] == pytest.approx(at_best, abs=1e-4)
    pairs = [(LABELS[a], LABELS[b], confusion[a][b]) for a in range(7) for b in range(7) if a != b and confusion[a][b]]
    assert sorted(report.confused) == sorted(pairs)
    assert [count for *_, count in report.confused] == sorted((count for *_, count in pairs), reverse=True)
    wrong = [place for place in range(len(true)) if answered[place] != true[place]]
    assert sorted(report.worst) == wrong
    assert report.losses[report.worst].tolist() == sorted(report.losses[wrong].tolist(), reverse=True)


class Page(HTMLParser):
    """What a page has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    report = memtune.evaluate(wrapped(), data(), report=True)
    report.save(tmp_path / "report")
    page = Page((tmp_path / "report" / "report.html").read_text())
    pictures = [values["src"] for tag, values in page.tags if tag == "img"]
    assert len(pictures) == 3
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert {tag for tag, _ in page.tags} <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        *["h1", "h2", "p", "img"],
    } | {"table", "tr", "td", "th"}
    assert "<owl>" in page.text
    values = json.loads((tmp_path / "report" / "report.json").read_text())
    assert values["scores"]["accuracy"] == report.scores["accuracy"]
    assert values["confusion"] == report.confusion.tolist()
    with (tmp_path / "report" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert np.mean([row["true"] == row["answered"] for row in rows]) == report.scores["accuracy"]
    assert "<td>&lt;owl&gt;</td>" in report._repr_html_()
    assert "top 5 accuracy" in str(report)
    (tmp_path / "file").write_text("")
    with pytest.raises(MemtuneError, match="the report cannot be written to"):
        report.save(tmp_path / "file")


def test_images_that_are_left_out_are_named(tmp_path: Path) -> None:
    paths = []
    for number, image in enumerate(data(6)["image"]):
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    Path(paths[1]).write_bytes(b"none")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = datasets.Dataset.from_dict({"image": paths, "label": [0, 1, -100, 2, 1, 0]}, features=features)
    report = memtune.evaluate(wrapped(), images, TrainingConfig(disable_tqdm=True, on_error="skip"), report=True)
    assert report.skipped == [paths[1], paths[2]]
    assert report.images == [paths[place] for place in (0, 3, 4, 5)]
    assert report.targets.tolist() == [0, 2, 1, 0]
    assert "4 images, 2 left out" in str(report)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_several_classes_and_numbers(problem_type: str, tmp_path: Path) -> None:
    numbers = problem_type == "regression"
    model = wrapped(labels=["a", "b"], problem_type=problem_type)
    random = np.random.default_rng(0)
    labels = random.random((20, 2)) if numbers else random.integers(0, 2, (20, 2)).astype(float)
    items = [(image, label) for image, label in zip(data(20)["image"], labels, strict=True)]
    report = memtune.evaluate(model, items, report=True)
    logits = logits_of(model, data(20))
    if numbers:
        np.testing.assert_allclose(report.answers, logits, atol=1e-4)
        assert np.mean([row["mse"] for row in report.per_class]) == pytest.approx(report.scores["mse"], rel=1e-4)
        assert np.mean([row["r2"] for row in report.per_class]) == pytest.approx(report.scores["r2"], rel=1e-4)
    else:
        answered = logits > 0
        first = report.per_class[0]
        assert first["recall"] == pytest.approx((answered & (labels == 1))[:, 0].sum() / labels[:, 0].sum())
        assert len(report.worst) == (answered != (labels == 1)).any(axis=1).sum()
    with pytest.raises(MemtuneError, match="a confusion matrix needs one class an image"):
        report.confusion  # noqa: B018
    report.save(tmp_path)
    assert "Worst errors" in (tmp_path / "report.html").read_text()
    assert str(report)


def test_many_tasks_each_on_its_own_data() -> None:
    backbone = VIT.build()
    pets = wrapped(backbone)
    signs = memtune.wrap(backbone, LoraConfig(r=2), labels=["stop", "go"], processor=PROCESSOR).eval()
    many = memtune.combine(backbone, {"pets": pets, "signs": signs})
    given = {"pets": data(10), "signs": data(12, ["stop", "go"], 1)}
    scores = memtune.evaluate(many, given)
    assert scores == {"pets": memtune.evaluate(pets, given["pets"]), "signs": memtune.evaluate(signs, given["signs"])}
    assert isinstance(memtune.evaluate(many, given, report=True)["signs"], EvaluationReport)
    with pytest.raises(ConfigError, match="unknown tasks"):
        memtune.evaluate(many, {"birds": data(2)})
    with pytest.raises(ConfigError, match="expected a data set for each task"):
        memtune.evaluate(many, data(2))  # type: ignore[call-overload]
    with pytest.raises(InputError, match="task 'pets': the data set is empty"):
        memtune.evaluate(many, {"pets": []})
    with pytest.raises(ConfigError, match="classes: got"):
        memtune.evaluate(many, given, classes=[0])  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="for a report, which is of all classes"):
        memtune.evaluate(pets, given["pets"], classes=[0], report=True)  # type: ignore[call-overload]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = VIT.build()
    backbone.save_pretrained(tmp_path / "backbone")
    names = ["cat", "dog"]
    pets = wrapped(backbone, names)
    for place, image in enumerate(data(8)["image"]):
        folder = tmp_path / "photos" / names[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{place}.png")
    pets.save_pretrained(tmp_path / "pets", base_model_name=str(tmp_path / "backbone"))
    many = memtune.combine(backbone, {"pets": pets})
    many.save_pretrained(tmp_path / "both", base_model_name=str(tmp_path / "backbone"))
    photos, report = str(tmp_path / "photos"), tmp_path / "report"
    assert main(["evaluate", str(tmp_path / "pets"), "--data", photos, "--report", str(report), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["images"] == 8
    assert values["macro_f1"] == json.loads((report / "report.json").read_text())["scores"]["macro_f1"]
    assert main(["evaluate", str(tmp_path / "both"), "--data", f"pets={photos}", "--report", str(report)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("pets: 8 images")
    assert out.endswith(f"{report / 'pets' / 'report.html'}\n")
    assert (report / "pets" / "predictions.csv").is_file()
    for arguments, message in (
        (["both", "--data", photos], "expected TASK=FOLDER for each task"),
        (["pets", "--data", f"pets={photos}"], "expected one FOLDER"),
        (["pets", "--data", photos, "--data", photos], "expected one FOLDER"),
    ):
        assert main(["evaluate", str(tmp_path / arguments[0]), *arguments[1:]]) == 1
        assert message in capsys.readouterr().err
