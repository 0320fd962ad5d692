"""Heads in closed form, against the equations solved slowly, once for each image that is left out."""

import pytest
import torch
from backbone_zoo import BY_NAME
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, layer_norm, one_hot

import memtune
from memtune import MemoryConfig, RandomFeatures, TrainingConfig
from memtune.continual.protocol import ContinualTask, fit_continual
from memtune.errors import CheckpointError, ConfigError, InputError
from memtune.tasks import find_objective
from memtune.training.closed_form import RIDGES, TEMPERATURES, FeatureSums, solve_head

ALONE = MemoryConfig(tokens=0, class_token=False)
QUIET = TrainingConfig(disable_tqdm=True, per_device_train_batch_size=7, per_device_eval_batch_size=7)
CLASSES = 3
VIT = BY_NAME["vit"]
SIZE = tuple(VIT.images().shape[1:])


class Stripes(torch.utils.data.Dataset):
    """Noise, brighter in the channel of its class."""

    def __init__(self, images: int, classes: range = range(CLASSES), first: int = 0) -> None:
        self._images, self._classes, self._first = images, classes, first

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, index: int) -> dict:
        label = self._classes[index % len(self._classes)]
        generator = torch.Generator().manual_seed(self._first + 1000 * label + index)
        pixels = torch.randn(SIZE, generator=generator)
        pixels[label % 3] += 0.5
        return {"pixel_values": pixels, "labels": label}


def head_alone(**options) -> memtune.TunedModel:
    return memtune.wrap(VIT.build(), ALONE, num_labels=CLASSES, **options)


def solved_slowly(read: torch.Tensor, labels: torch.Tensor, classes: int, ridge: float, left_out: int | None = None):
    """Weights (width, classes) and bias by the normal equations; the scaling is that of all images."""
    kept = torch.ones(len(read), dtype=torch.bool)
    if left_out is not None:
        kept[left_out] = False
    design = torch.cat([read, torch.ones(len(read), 1, dtype=torch.float64)], dim=1)[kept]
    targets = one_hot(labels, classes).double()[kept]
    penalty = torch.eye(design.shape[1], dtype=torch.float64) * ridge * len(read)
    penalty[-1, -1] = 0
    found = torch.linalg.solve(design.T @ design + penalty, design.T @ targets)
    return found[:-1], found[-1]


@pytest.mark.parametrize(("images", "width"), [(40, 12), (15, 24)], ids=["more images", "more features"])
def test_it_is_the_ridge_regression_that_leave_one_out_prefers(images, width):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (images,), generator=generator)
    features = torch.randn(images, width, generator=generator) * 3 + 1
    features[:, 0] += labels
    features[:, 1] = 5.0  # which says nothing
    head = torch.nn.Linear(width, CLASSES)
    sums = FeatureSums(head)
    sums.add(features, labels, products=images > width)
    result = solve_head(head, sums, features, labels, find_objective(None))

    read = features.double() - features.double().mean(dim=0)
    read = read / torch.where(read.std(dim=0) > 0, read.std(dim=0, correction=0), 1.0)
    scores = []
    for ridge in RIDGES:
        answers = []
        for image in range(images):
            weights, bias = solved_slowly(read, labels, CLASSES, ridge, left_out=image)
            answers.append(read[image] @ weights + bias)
        answers = torch.stack(answers)
        scores.append(((answers.argmax(dim=1) == labels).double().mean().item(), ridge, answers))
    best = max(accuracy for accuracy, *_ in scores)
    assert result.loo_score == pytest.approx(best)
    chosen = next(answers for _, ridge, answers in scores if ridge == result.ridge)
    expected = cross_entropy(chosen * result.temperature, labels, label_smoothing=1 / (images + 1)).item()
    assert result.loo_loss == pytest.approx(expected, abs=1e-5)
    weights, bias = solved_slowly(read, labels, CLASSES, result.ridge)
    torch.testing.assert_close(
        head(features), ((read @ weights + bias) * result.temperature).float(), atol=2e-4, rtol=2e-4
    )


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_several_classes_and_numbers_by_leave_one_out(problem_type):
    images, width, outputs = 30, 8, 2
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(images, width, generator=generator)
    truth = features[:, :outputs] + 0.5 * torch.randn(images, outputs, generator=generator)
    labels = (truth > 0).float() if problem_type == "multi_label_classification" else truth * 3 + 2
    head = torch.nn.Linear(width, outputs)
    sums = FeatureSums(head)
    sums.add(features[:11], labels[:11])
    sums.add(features[11:], labels[11:])
    result = solve_head(head, sums, features, labels, find_objective(problem_type))

    def solved(ridge, left_out=None):
        kept = torch.tensor([image for image in range(images) if image != left_out])
        design = torch.cat([read, torch.ones(images, 1, dtype=torch.float64)], dim=1)[kept]
        penalty = torch.eye(width + 1, dtype=torch.float64) * ridge * images
        penalty[-1, -1] = 0
        return torch.linalg.solve(design.T @ design + penalty, design.T @ labels[kept].double())

    read = features.double() - features.double().mean(dim=0)
    read = read / read.std(dim=0, correction=0)
    whole = torch.cat([read, torch.ones(images, 1, dtype=torch.float64)], dim=1)
    found = []
    for ridge in RIDGES:
        answers = torch.stack([whole[image] @ solved(ridge, image) for image in range(images)])
        if problem_type == "regression":
            errors, spread = (answers - labels).square(), (labels - labels.mean(dim=0)).double().square()
            found.append((-(1 - errors.sum(dim=0) / spread.sum(dim=0)).mean().item(), errors.mean().item(), ridge, 1.0))
            continue
        right = ((answers >= 0.5) == (labels >= 0.5)).double().mean().item()
        smoothed = labels.double() * (1 - 1 / (images + 1)) + 0.5 / (images + 1)
        losses = {t: binary_cross_entropy_with_logits((answers - 0.5) * t, smoothed).item() for t in TEMPERATURES}
        factor = min(losses, key=losses.__getitem__)
        found.append((-right, losses[factor], ridge, factor))
    score, loss, ridge, factor = min(found)
    assert (result.loo_score, result.loo_loss) == (pytest.approx(-score), pytest.approx(loss, abs=1e-5))
    assert (result.ridge, result.temperature) == (ridge, pytest.approx(factor))
    even = 0.0 if problem_type == "regression" else 0.5
    torch.testing.assert_close(head(features), ((whole @ solved(ridge) - even) * factor).float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("head", ["linear", RandomFeatures(40, seed=3)], ids=["linear", "random features"])
def test_it_learns_saves_and_shares_a_pass(head, tmp_path):
    model = head_alone(head=head)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    result = memtune.fit_closed_form(model, Stripes(120), QUIET)
    assert result.images == 120
    assert result.loo_score > 0.6
    assert abs(memtune.evaluate(model, Stripes(150, first=500), QUIET)["accuracy"] - result.loo_score) < 0.15
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())

    model.save_pretrained(tmp_path)
    loaded = memtune.load(tmp_path, backbone=model.backbone)
    images = torch.stack([Stripes(6)[index]["pixel_values"] for index in range(6)])
    with torch.no_grad():
        expected = model(images).logits
        assert torch.equal(loaded(images).logits, expected)
        combined = memtune.combine(
            model.backbone, {"a": loaded, "b": memtune.wrap(model.backbone, ALONE, num_labels=2)}
        )
        torch.testing.assert_close(combined(images)["a"].logits, expected, atol=1e-5, rtol=1e-5)
    assert {lane.stream for lane in combined.plan().lanes} == {"head alone"}


def test_random_features_are_those_of_the_formula():
    model = head_alone(head=RandomFeatures(40, seed=3)).eval()
    images = torch.randn(2, *SIZE)
    with torch.no_grad():
        feature = model.features(images)
        made = torch.relu(layer_norm(feature, feature.shape[-1:]) @ model.task.head.projection)
        expected = made @ model.task.head.weight.T + model.task.head.bias
        torch.testing.assert_close(model(images).logits, expected)
    assert not any("projection" in name for name in model.task.tensors())
    assert model.task.head.projection.std().item() == pytest.approx(feature.shape[-1] ** -0.5, rel=0.1)


def test_a_trunk_cache_serves_a_head_alone_and_changes_nothing(tmp_path):
    cached = TrainingConfig(disable_tqdm=True, trunk_cache=tmp_path, trunk_cache_dtype="float32")
    model, other = head_alone(), head_alone()
    memtune.fit_closed_form(model, Stripes(60), QUIET)
    memtune.fit_closed_form(other, Stripes(60), cached)
    torch.testing.assert_close(other.task.head.weight, model.task.head.weight, atol=1e-3, rtol=1e-3)
    assert memtune.evaluate(other, Stripes(60), cached) == pytest.approx(memtune.evaluate(other, Stripes(60)), abs=1e-4)


def test_masked_tasks_get_one_as_well(tmp_path):
    model = memtune.wrap(VIT.build(), MemoryConfig(2), num_labels=CLASSES, masked=True)
    memory = {name: value.clone() for name, value in model.task.tensors().items() if "memory" in name}
    assert memory
    assert memtune.fit_closed_form(model, Stripes(90), QUIET).loo_score > 0.5
    assert all(torch.equal(value, memory[name]) for name, value in model.task.tensors().items() if name in memory)


def test_it_refuses_before_the_head_is_changed(tmp_path):
    model = head_alone()
    before = model.task.head.weight.clone()

    class Broken(Stripes):
        def __getitem__(self, index: int) -> dict:
            return {"pixel_values": torch.full(SIZE, torch.nan), "labels": 0}

    with pytest.raises(InputError, match=r"features of the images \[0, 1"):
        memtune.fit_closed_form(model, Broken(4), QUIET)
    with pytest.raises(InputError, match="got 1 image, expected at least 2"):
        memtune.fit_closed_form(model, Stripes(1), QUIET)
    with pytest.raises(InputError, match="label"):
        memtune.fit_closed_form(model, Stripes(8, range(2, 6)), QUIET)
    with pytest.raises(ConfigError, match="no head"):
        memtune.fit_closed_form(memtune.wrap(VIT.build(), MemoryConfig(1), head=None), Stripes(8), QUIET)
    cached = TrainingConfig(disable_tqdm=True, trunk_cache=tmp_path)
    unmasked = memtune.wrap(VIT.build(), MemoryConfig(1), num_labels=CLASSES)
    with pytest.raises(ConfigError, match="trunk_cache"):
        memtune.fit_closed_form(unmasked, Stripes(8), cached)
    assert torch.equal(model.task.head.weight, before)


def test_what_has_no_place_elsewhere_is_refused(tmp_path):
    model = memtune.wrap(VIT.build(), memtune.LoraConfig(r=2), num_labels=CLASSES, head=RandomFeatures(8))
    for refused in (model.merge, lambda: model.export_peft(tmp_path)):
        with pytest.raises(ConfigError, match="random features"):
            refused()
    for wrong in ({"width": 0}, {"width": 8.0}, {"seed": -1}):
        with pytest.raises(ConfigError, match="random features"):
            RandomFeatures(**wrong)
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"width": 8,', '"width": -8,'))
    with pytest.raises(CheckpointError, match="random_features"):
        memtune.load(tmp_path / "a", backbone=model.backbone)


def sequence(order: list[int]) -> list[ContinualTask]:
    return [
        ContinualTask([label], Stripes(40, range(label, label + 1)), Stripes(30, range(label, label + 1), first=500))
        for label in order
    ]


def test_in_a_sequence_nothing_is_forgotten_and_the_order_does_not_matter(monkeypatch):
    monkeypatch.setattr("memtune.training.closed_form.RIDGES", (0.1,))
    heads = []
    for order in ([0, 1, 2], [2, 0, 1]):
        model = head_alone()
        result = fit_continual(model, sequence(order), QUIET, solver="closed_form")
        assert result.tasks_done == CLASSES
        heads.append(model.task.head)
    directions = [torch.nn.functional.normalize(head.weight.flatten(), dim=0) for head in heads]
    torch.testing.assert_close(*directions, atol=1e-5, rtol=1e-4)

    whole = head_alone()
    everything = torch.utils.data.ConcatDataset([task.train_dataset for task in sequence([0, 1, 2])])
    memtune.fit_closed_form(whole, everything, QUIET)
    direction = torch.nn.functional.normalize(whole.task.head.weight.flatten(), dim=0)
    torch.testing.assert_close(directions[0], direction, atol=1e-5, rtol=1e-4)


def test_a_sequence_goes_on_where_it_stopped(tmp_path, monkeypatch):
    expected = head_alone()
    fit_continual(expected, sequence([0, 1, 2]), QUIET, solver="closed_form")

    stopped = sequence([0, 1, 2])
    original = Stripes.__getitem__

    def failing(self: Stripes, index: int) -> dict:
        if self is stopped[2].train_dataset:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(Stripes, "__getitem__", failing)
    with pytest.raises(KeyboardInterrupt):
        fit_continual(head_alone(), stopped, QUIET, solver="closed_form", output_dir=tmp_path)
    monkeypatch.setattr(Stripes, "__getitem__", original)
    model = head_alone()
    fit_continual(model, sequence([0, 1, 2]), QUIET, solver="closed_form", output_dir=tmp_path)
    torch.testing.assert_close(model.task.head.weight, expected.task.head.weight)
    with pytest.raises(ConfigError, match="loss: got 'local'"):
        fit_continual(head_alone(), sequence([0, 1, 2]), QUIET, output_dir=tmp_path)
    with pytest.raises(ConfigError, match="solver: got 'magic'"):
        fit_continual(head_alone(), sequence([0, 1, 2]), QUIET, solver="magic")
