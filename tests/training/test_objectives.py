"""Tasks of several classes an image, and of numbers: labels, losses, scores, and every way that a model is used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from backbone_zoo import BY_NAME
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune import LoraConfig, MemoryConfig, SideNetworkConfig, TrainingConfig
from memtune.arithmetic import merge_adapters
from memtune.cli.parser import main
from memtune.errors import CheckpointError, ConfigError, InputError
from memtune.tasks import find_objective

VIT = BY_NAME["vit-head"]
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
MULTI, NUMBERS = "multi_label_classification", "regression"
COLOURS = ["red", "green", "blue"]
METHODS: dict[str, tuple[Any, bool]] = {
    "head": (MemoryConfig(0, class_token=False), False),
    "lora": (LoraConfig(r=2), False),
    "masked memory": (MemoryConfig(2), True),
    "masked side": (SideNetworkConfig(8, readout="pool"), True),
}
FAST = {"disable_tqdm": True, "per_device_train_batch_size": 8, "learning_rate": 0.02}


def picture(shares: Any, seed: int) -> Image.Image:
    """Noise, brighter in the channels that are to be seen."""
    noise = np.random.default_rng(seed).integers(0, 60, (32, 32, 3))
    return Image.fromarray((noise + 190 * np.asarray(shares)).astype(np.uint8))


def colours(count: int = 48, names: list[str] = COLOURS) -> datasets.Dataset:
    """Images of any number of three colours, with the indices of these among some names."""
    bits = [[(number >> place) & 1 for place in range(3)] for number in range(count)]
    labels = [[names.index(COLOURS[place]) for place in range(3) if each[place]] for each in bits]
    kind = datasets.Sequence(datasets.ClassLabel(names=names))
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    images = [picture(each, seed) for seed, each in enumerate(bits)]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def brightness(count: int = 48, outputs: int = 1) -> datasets.Dataset:
    """Images and how much red, or red and green, they have."""
    random = np.random.default_rng(0)
    shares = random.random((count, 3))
    labels = [float(each[0]) if outputs == 1 else [float(value) for value in each[:outputs]] for each in shares]
    images = [picture(each, seed) for seed, each in enumerate(shares)]
    return datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())


def wrapped(problem_type: str, method: str = "masked memory", **options: Any) -> memtune.TunedModel:
    config, masked = METHODS[method]
    given: dict[str, Any] = {"labels": COLOURS} if problem_type == MULTI else {"labels": ["redness"]}
    torch.manual_seed(0)
    return memtune.wrap(
        VIT.build(), config, masked=masked, processor=PROCESSOR, problem_type=problem_type, **(given | options)
    )


def logits_of(model: memtune.TunedModel, data: datasets.Dataset) -> np.ndarray:
    with torch.no_grad():
        return model(PROCESSOR(images=data["image"][:], return_tensors="pt").pixel_values).logits.double().numpy()


def average_precision(scores: np.ndarray, true: np.ndarray) -> float:
    """By its definition: the mean precision at the rank of each image that is right."""
    order = np.argsort(-scores)
    hits = true[order]
    return float(np.mean([hits[: rank + 1].mean() for rank in range(len(hits)) if hits[rank]]))


@pytest.mark.parametrize("method", METHODS)
def test_several_classes_are_learnt_and_measured(method: str) -> None:
    data, model = colours(), wrapped(MULTI, method)
    before = memtune.evaluate(model, data)["loss"]
    result = memtune.fit(model, data, data, TrainingConfig(**FAST, num_train_epochs=6))
    scores = memtune.evaluate(model, data)
    assert result.scores == pytest.approx(scores, abs=1e-6)
    assert scores["loss"] < 0.8 * before
    logits = logits_of(model, data)
    true = np.array([[place in labels for place in range(3)] for labels in data["label"][:]])
    probabilities = 1 / (1 + np.exp(-logits))
    loss = -(true * np.log(probabilities) + ~true * np.log(1 - probabilities)).mean()
    answered = probabilities >= 0.5
    hits = (answered & true).sum(axis=0)
    f1 = np.mean(2 * hits / (answered.sum(axis=0) + true.sum(axis=0)))
    micro = 2 * hits.sum() / (answered.sum() + true.sum())
    expected = {
        "mean_average_precision": np.mean(
            [average_precision(probabilities[:, each], true[:, each]) for each in range(3)]
        ),
        "f1": f1,
        "f1_micro": micro,
        "subset_accuracy": (answered == true).all(axis=1).mean(),
        "loss": loss,
    }
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("outputs", [1, 2])
def test_numbers_are_learnt_and_measured(method: str, outputs: int) -> None:
    data = brightness(outputs=outputs)
    model = wrapped(NUMBERS, method, labels=["redness", "greenness"][:outputs])
    before = memtune.evaluate(model, data)["mse"]
    memtune.fit(model, data, config=TrainingConfig(**FAST, num_train_epochs=8))
    scores = memtune.evaluate(model, data)
    assert scores["mse"] < 0.6 * before
    answers, labels = logits_of(model, data), np.array(data["label"][:]).reshape(-1, outputs)
    errors = answers - labels
    r2 = np.mean(1 - (errors**2).sum(axis=0) / ((labels - labels.mean(axis=0)) ** 2).sum(axis=0))
    expected = {"r2": r2, "mse": (errors**2).mean(), "mae": np.abs(errors).mean(), "loss": (errors**2).mean()}
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("problem_type", [MULTI, NUMBERS])
def test_the_loss_is_that_of_transformers(problem_type: str) -> None:
    outputs = 3 if problem_type == MULTI else 1
    labels = torch.rand(4, outputs).round() if problem_type == MULTI else torch.randn(4, outputs)
    model = wrapped(problem_type, "head")
    torch.nn.init.normal_(model.task.head.weight)
    images = VIT.images()[:1].expand(4, -1, -1, -1) * torch.tensor([1.0, 0.5, -1.0, 2.0]).view(-1, 1, 1, 1)
    other = model.merge()
    assert isinstance(other, ViTForImageClassification)
    assert other.config.problem_type == problem_type
    own, theirs = model(images, labels=labels), other(images, labels=labels)
    torch.testing.assert_close(own.loss, theirs.loss)
    if outputs == 1:
        torch.testing.assert_close(model(images, labels=labels.flatten()).loss, theirs.loss)


def test_images_that_are_left_out_count_for_nothing() -> None:
    for problem_type, outputs in ((MULTI, 3), (NUMBERS, 2)):
        objective = find_objective(problem_type)
        logits, labels = torch.randn(5, outputs), torch.rand(5, outputs)
        blank = torch.tensor(objective.blank(outputs))
        mixed = torch.cat([labels[:2], blank.expand(2, -1), labels[2:]])
        more = torch.cat([logits[:2], torch.randn(2, outputs), logits[2:]])
        assert objective.kept(mixed).tolist() == [True, True, False, False, True, True, True]
        torch.testing.assert_close(objective.loss(more, mixed), objective.loss(logits, labels))
        torch.testing.assert_close(objective.loss(logits, labels), objective.losses(logits, labels).mean())


def test_smoothing_and_weights() -> None:
    objective = find_objective(MULTI)
    logits, labels, weights = torch.randn(4, 3), torch.rand(4, 3).round(), torch.tensor([1.0, 2.0, 0.0])
    targets, total = labels * 0.8 + 0.1, 0.0
    for row in range(4):
        for place in range(3):
            p = 1 / (1 + math.exp(-float(logits[row, place])))
            target = float(targets[row, place])
            total -= float(weights[place]) * (target * math.log(p) + (1 - target) * math.log(1 - p)) / 12
    found = objective.loss(logits, labels, label_smoothing=0.2, weights=weights)
    assert float(found) == pytest.approx(total, abs=1e-5)


def test_classes_are_found_by_name() -> None:
    model = wrapped(MULTI, "head")
    other = colours(names=["blue", "yellow", "red", "green"])
    scores = memtune.evaluate(model, colours())
    assert memtune.evaluate(model, other) == pytest.approx(scores)
    names = [[COLOURS[place] for place in each] for each in colours()["label"][:]]
    texts = datasets.Dataset.from_dict({"image": colours()["image"][:], "label": names})
    assert memtune.evaluate(model, texts) == pytest.approx(scores)
    shares = [[float(place in each) for place in range(3)] for each in colours()["label"][:]]
    bits = [[int(place in each) for place in range(3)] for each in colours()["label"][:]]
    for labels in (shares, bits):
        rows = [{"image": image, "label": label} for image, label in zip(colours()["image"][:], labels, strict=True)]
        assert memtune.evaluate(model, rows) == pytest.approx(scores)
        arrays = [(image, np.array(label)) for image, label in zip(colours()["image"][:], labels, strict=True)]
        assert memtune.evaluate(model, arrays) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (["red", "pink"], "'pink', which is none of the model's labels"),
        ([0, 7], r"labels: got \[7\]"),
        ([0.5, 0.5], "a share from 0 to 1 for each of 3 classes"),
        ([0.5, 2.0, 0.0], "a share from 0 to 1 for each of 3 classes"),
        ([float("nan"), 0.0, 0.0], "a share from 0 to 1 for each of 3 classes"),
        ("red", "expected a list of the classes in it"),
        (1, "expected a list of the classes in it"),
        (None, "expected a list of the classes in it"),
        ([-100], "leave the image out of the data set"),
    ],
)
def test_wrong_classes_are_named(label: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        memtune.evaluate(wrapped(MULTI, "head"), [(picture([1, 0, 0], 0), label)])


def test_two_bits_may_be_indices() -> None:
    model = wrapped(MULTI, "head", labels=["red", "green"])
    with pytest.raises(InputError, match=r"label \[0, 1\], which may be the indices of classes or a share"):
        memtune.evaluate(model, [(picture([1, 0, 0], 0), [0, 1])])
    assert memtune.evaluate(model, [(picture([1, 0, 0], 0), torch.tensor([0, 1]))])


@pytest.mark.parametrize("label", ["much", [1.0, 2.0], float("inf"), float("nan"), None])
def test_wrong_numbers_are_named(label: Any) -> None:
    with pytest.raises(InputError, match=r"item 0 has the label .*; expected 1 finite number"):
        memtune.evaluate(wrapped(NUMBERS, "head"), [(picture([1, 0, 0], 0), label)])


def test_labels_of_another_kind_say_what_to_pass() -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pets = datasets.Dataset.from_dict({"image": [picture([1, 0, 0], 0)], "label": [1]}, features=features)
    for data in (pets, datasets.Dataset.from_dict({"image": pets["image"][:], "label": ["cat"]})):
        with pytest.raises(InputError, match=r"labels are the classes .*'cat'.*, expected numbers"):
            memtune.evaluate(wrapped(NUMBERS), data)
    model = memtune.wrap(VIT.build(), MemoryConfig(2), labels=COLOURS, processor=PROCESSOR)
    with pytest.raises(InputError, match="problem_type='regression'"):
        memtune.evaluate(model, brightness())
    with pytest.raises(InputError, match="problem_type='multi_label_classification'"):
        memtune.evaluate(model, colours())
    images = VIT.images()
    with pytest.raises(InputError, match="expected a tensor of 2 class indices"):
        model(images[:2], labels=torch.rand(2, 3))
    with pytest.raises(InputError, match=r"expected a share from 0 to 1 of each class as floats, \(2, 3\)"):
        wrapped(MULTI)(images[:2], labels=torch.tensor([0, 1]))
    with pytest.raises(InputError, match=r"got \[2.0\], expected a share"):
        wrapped(MULTI)(images[:1], labels=torch.tensor([[2.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("problem_type", "settings", "message"),
    [
        (MULTI, {"mixup_alpha": 0.2}, "mixup_alpha, cutmix_alpha: not for multi_label"),
        (NUMBERS, {"label_smoothing_factor": 0.1}, "numbers have no classes"),
        (NUMBERS, {"class_weights": [1.0]}, "numbers have no classes"),
        (MULTI, {"metric_for_best_model": "accuracy"}, "metric_for_best_model: got 'accuracy', expected one of"),
        (NUMBERS, {"metric_for_best_model": "f1"}, "metric_for_best_model: got 'f1', expected one of"),
    ],
)
def test_settings_that_mean_nothing(problem_type: str, settings: Any, message: str) -> None:
    data = colours(8) if problem_type == MULTI else brightness(8)
    with pytest.raises(ConfigError, match=message):
        memtune.fit(wrapped(problem_type), data, data, TrainingConfig(**FAST, **settings))


@pytest.mark.parametrize("problem_type", [MULTI, NUMBERS])
def test_a_head_in_closed_form(problem_type: str) -> None:
    data = colours() if problem_type == MULTI else brightness()
    model = wrapped(problem_type, "head")
    before = memtune.evaluate(model, data)["loss"]
    result = memtune.fit_closed_form(model, data)
    scores = memtune.evaluate(model, data)
    assert scores["loss"] < 0.7 * before
    assert result.loo_score > 0.7
    assert result.images == len(data)


def test_what_needs_one_class_says_so() -> None:
    model, data = wrapped(MULTI), colours(8)
    with pytest.raises(ConfigError, match="for a task of multi_label_classification, which is of all classes"):
        memtune.evaluate(model, data, classes=[0])
    with pytest.raises(ConfigError, match="problem_type: got 'several', expected one of"):
        wrapped("several")
    with pytest.raises(ConfigError, match="problem_type need a head of the task's own"):
        memtune.wrap(VIT.build(), MemoryConfig(2), head=None, problem_type=MULTI)


def test_best_values_by_any_score() -> None:
    data = brightness()

    def metrics(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == prediction.label_ids.shape == (48, 1)
        return {"eval_largest": np.abs(prediction.predictions - prediction.label_ids).max()}

    for metric, greater in (("mae", None), ("eval_r2", None), ("largest", False)):
        model = wrapped(NUMBERS)
        config = TrainingConfig(
            **FAST,
            num_train_epochs=4,
            load_best_model_at_end=True,
            metric_for_best_model=metric,
            greater_is_better=greater,
        )
        result = memtune.fit(model, data, data, config, compute_metrics=metrics)
        values = [entry[f"eval_{metric.removeprefix('eval_')}"] for entry in result.history]
        best = max(values) if metric == "eval_r2" else min(values)
        assert result.scores[metric.removeprefix("eval_")] == best
        assert "largest" in result.scores
    with pytest.raises(ConfigError, match="compute_metrics: gave 3, expected a dictionary"):
        memtune.fit(wrapped(NUMBERS), data, data, TrainingConfig(**FAST, max_steps=1), compute_metrics=lambda _: 3)


@pytest.mark.parametrize("problem_type", [MULTI, NUMBERS])
def test_a_folder_a_pass_and_every_answer(problem_type: str, tmp_path: Path) -> None:
    backbone = VIT.build()
    labels = COLOURS if problem_type == MULTI else ["red", "green"]
    own = memtune.wrap(
        backbone, MemoryConfig(2), labels=labels, masked=True, processor=PROCESSOR, problem_type=problem_type
    )
    plain = memtune.wrap(backbone, LoraConfig(r=2), labels=["a", "b"], masked=True, processor=PROCESSOR)
    for model in (own, plain):
        with torch.no_grad():
            for parameter in model.eval().task.parameters():
                parameter.normal_()
    own.save_pretrained(tmp_path / "own", results={"f1": 0.5})
    loaded = memtune.load(tmp_path / "own", backbone)
    assert loaded.config.problem_type == loaded.task.problem_type == problem_type
    text = (tmp_path / "own" / "README.md").read_text()
    assert "one of these classes" not in text
    assert 'model.predict("image.jpg")' in text
    image = picture([1, 0.5, 0], 0)
    with torch.no_grad():
        logits = own(PROCESSOR(images=image, return_tensors="pt").pixel_values).logits[0]
    scores = (logits.sigmoid() if problem_type == MULTI else logits).tolist()
    ranked = sorted(zip(labels, scores, strict=True), key=lambda each: -each[1])
    in_order = ranked if problem_type == MULTI else list(zip(labels, scores, strict=True))
    as_answers = [[{"label": a, "score": pytest.approx(b, abs=1e-5)} for a, b in each] for each in (ranked, in_order)]
    many = memtune.combine(backbone, {"own": tmp_path / "own", "plain": plain})
    assert loaded.predict(image) == as_answers[1]
    assert many.predict(image)["own"] == as_answers[1]
    assert memtune.pipeline(loaded)(image) == as_answers[0]
    assert memtune.pipeline(many)(image)["own"] == as_answers[0]
    assert sum(each["score"] for each in many.predict(image)["plain"]) == pytest.approx(1)
    many.save_pretrained(tmp_path / "both")
    assert memtune.MultiTaskModel.from_pretrained(tmp_path / "both", backbone).predict(image)["own"] == as_answers[1]
    shown = memtune.explain(loaded, image)
    assert shown.probabilities.tolist() == pytest.approx(scores, abs=1e-5)
    assert (shown.label is None) == (problem_type == NUMBERS)
    shown.save(tmp_path / "shown.png")
    values = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    (tmp_path / "own" / "adapter_config.json").write_text(json.dumps(values | {"problem_type": "several"}))
    with pytest.raises(CheckpointError, match="problem_type: got 'several'"):
        memtune.load(tmp_path / "own", backbone)


def test_a_broken_image_is_skipped(tmp_path: Path) -> None:
    paths = []
    for number in range(6):
        paths.append(str(tmp_path / f"{number}.png"))
        picture([1, 0, 0], number).save(paths[-1])
    Path(paths[2]).write_bytes(b"none")
    model = wrapped(NUMBERS)
    config = TrainingConfig(**FAST, num_train_epochs=1, on_error="skip", trunk_cache=tmp_path / "cache")
    data = datasets.Dataset.from_dict({"image": paths, "label": [float(n) for n in range(6)]})
    data = data.cast_column("image", datasets.Image())
    memtune.fit(model, data, config=config)
    kept = data.select([0, 1, 3, 4, 5])
    skipped = memtune.evaluate(model, data, TrainingConfig(disable_tqdm=True, on_error="skip"))
    assert skipped == pytest.approx(memtune.evaluate(model, kept), abs=1e-5)


def test_a_run_goes_on(tmp_path: Path) -> None:
    data = colours(16)
    config = TrainingConfig(**FAST, num_train_epochs=4, output_dir=tmp_path / "run", load_best_model_at_end=True)
    whole = wrapped(MULTI)
    memtune.fit(whole, data, data, config)
    later = wrapped(MULTI)
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda each: int(each.name.partition("-")[2]))
    memtune.fit(later, data, data, config, resume_from_checkpoint=checkpoints[1])
    for key, value in whole.task.tensors().items():
        assert torch.equal(value, later.task.tensors()[key])


def test_a_look_at_the_data() -> None:
    report = memtune.inspect_data(colours(16), model=wrapped(MULTI))
    assert report.parts["train"].classes == {"red": 8, "green": 8, "blue": 8}
    assert not report.problems
    assert memtune.inspect_data(colours(16), problem_type=MULTI).parts["train"].classes["red"] == 8
    assert not memtune.inspect_data(brightness(8), problem_type=NUMBERS).problems
    assert "no right label" in str(memtune.inspect_data(brightness(8)))


@pytest.mark.parametrize("problem_type", [MULTI, NUMBERS])
def test_from_the_command_line(problem_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    VIT.build().save_pretrained(tmp_path / "backbone")
    PROCESSOR.save_pretrained(tmp_path / "backbone")
    lines = []
    (tmp_path / "photos").mkdir()
    for number, row in enumerate(colours(16) if problem_type == MULTI else brightness(16)):
        row["image"].save(tmp_path / "photos" / f"{number}.png")
        label = [COLOURS[each] for each in row["label"]] if problem_type == MULTI else row["label"]
        lines.append(json.dumps({"file_name": f"{number}.png", "label": label}))
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    output = tmp_path / "adapter"
    given = ["finetune", "--model_name_or_path", str(tmp_path / "backbone"), "--train_dir", str(tmp_path / "photos")]
    given += ["--problem_type", problem_type, "--masked", "--output_dir", str(output), "--num_train_epochs", "1"]
    assert main([*given, "--disable_tqdm"]) == 0
    name = "mean average precision" if problem_type == MULTI else "r2"
    assert capsys.readouterr().out.startswith(name)
    model = memtune.load(output)
    assert sorted(model.task.labels) == (sorted(COLOURS) if problem_type == MULTI else ["label"])
    assert main(["evaluate", str(output), "--data", str(tmp_path / "photos"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 16
    assert scores["loss"] == pytest.approx(memtune.evaluate(model, load(tmp_path / "photos"))["loss"], abs=1e-5)
    assert main(["inspect", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problem_type"] == problem_type
    assert main(["predict", str(tmp_path / "photos"), "--adapter", str(output), "--top_k", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 16


def load(folder: Path) -> datasets.Dataset:
    return memtune.data.load_folder(folder)


def test_adapters_of_several_kinds_are_not_merged() -> None:
    backbone = VIT.build()
    one = memtune.wrap(backbone, LoraConfig(r=2), labels=["a", "b"])
    other = memtune.wrap(backbone, LoraConfig(r=2), labels=["a", "b"], problem_type=MULTI)
    with pytest.raises(ConfigError, match=r"got the problem types .*multi_label.*, expected one"):
        merge_adapters([one, other], head=0)
    merged = merge_adapters([other, other], head="mean")
    assert merged.task.problem_type == MULTI


@pytest.mark.parametrize(("problem_type", "metric", "greater"), [(MULTI, "f1", True), (NUMBERS, "mae", False)])
def test_a_search_goes_by_the_score_that_is_asked_for(
    problem_type: str, metric: str, greater: bool, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    data, names = (colours(), COLOURS) if problem_type == MULTI else (brightness(), ["red"])
    result = memtune.sweep(
        VIT.build(),
        LoraConfig(r=2),
        {"learning_rate": [1e-5, 0.02]},
        data.select(range(36)),
        data.select(range(36, 48)),
        output_dir=tmp_path,
        training=TrainingConfig(**FAST | {"max_steps": 8, "metric_for_best_model": metric}),
        n_trials=4,
        seeds=(0,),
        validation=0.25,
        labels=names,
        problem_type=problem_type,
        processor=PROCESSOR,
    )
    assert len({each.score for each in result.trials}) > 1
    best = (max if greater else min)(each.score for each in result.trials)
    assert result.best.score == best
    loaded = memtune.load(tmp_path / "seed-0", VIT.build())
    assert memtune.evaluate(loaded, data.select(range(36, 48)))[metric] == result.test_score
    saved = json.loads((tmp_path / "sweep.json").read_text())["result"]
    assert (saved["metric"], saved["validation_score"]) == (metric, best)
    assert (tmp_path / "trials.csv").read_text().splitlines()[0].split(",")[2] == metric
    assert metric in str(result)


def test_a_search_refuses_a_score_that_there_is_not(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match="metric_for_best_model: got 'accuracy'"):
        memtune.sweep(
            VIT.build(),
            LoraConfig(r=2),
            {"learning_rate": [0.01]},
            brightness(),
            output_dir=tmp_path,
            training=TrainingConfig(metric_for_best_model="accuracy"),
            labels=["red"],
            problem_type=NUMBERS,
            processor=PROCESSOR,
        )
    assert not list(tmp_path.iterdir())
