"""Several tasks from one pass: each answers as it does alone, and the backbone as it does bare."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, CASES, FAMILIES, GLOBAL, Case, each, outputs_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from multitask import CONFIGS, tune, tune_all
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

import memtune
from memtune import LoraConfig, MemoryConfig, MultiTaskModel, SideNetworkConfig
from memtune.errors import BackboneMismatchError, CheckpointError, ConfigError, InputError, MemtuneError
from memtune.tasks.lanes import AdaptedLane, HeadLane, MaskedLane

VIT = BY_NAME["vit-head"]
NO_DORA = [name for name in CONFIGS if name != "dora"]
"""In masked mode the keys and values that a task sees have no DoRA, and a test names it for query and fc1 alone."""

KINDS = [(name, False) for name in CONFIGS] + [(name, True) for name in NO_DORA]


def kinds_of(case: Case) -> list[tuple[str, bool]]:
    return [(name, masked) for name, masked in KINDS if case in GLOBAL or not masked]


@torch.no_grad()
def assert_alone(model: MultiTaskModel, alone: dict[str, memtune.TunedModel], images: Tensor, **options: Any) -> None:
    output = model(images, **options)
    for name, answer in output.items():
        torch.testing.assert_close(answer.logits, alone[name](images).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def assert_rows_alone(model: MultiTaskModel, tasks: dict[str, memtune.TunedModel], rows: list[str]) -> None:
    images = torch.randn(len(rows), *VIT.images(1).shape[1:])
    output = model(images, rows=rows)
    assert len(output) == len(rows)
    for image, name, answer in zip(images, rows, output, strict=True):
        torch.testing.assert_close(answer.logits, tasks[name](image[None]).logits, atol=1e-5, rtol=1e-5)


@each(FAMILIES)
@pytest.mark.slow
@pytest.mark.exact
def test_each_task_answers_as_it_does_alone(case: Case) -> None:
    backbone = case.build()
    tasks = tune_all(backbone, kinds_of(case))
    model = memtune.combine(backbone, tasks)
    assert_alone(model, tasks, case.images(2))
    output = model(case.images(2))
    assert list(output) == list(tasks)
    assert output[next(iter(tasks))].logits.shape == (2, 2)


@each([case for case in CASES if case.facts.prefix and "mae" not in case.name])
def test_base_is_the_bare_model_bit_for_bit(case: Case) -> None:
    backbone, images = case.build(), case.images()
    takes_text = backbone.main_input_name != "pixel_values"
    with torch.no_grad():
        expected = case.run_tower(backbone, images) if takes_text else backbone(pixel_values=images)
    model = memtune.combine(backbone, tune_all(backbone, [("memory", case in GLOBAL), ("lora at the end", False)]))
    assert outputs_equal(model(images).base, expected)


@each(FAMILIES)
@pytest.mark.slow
@pytest.mark.exact
def test_each_image_of_a_mixed_batch_gets_its_own_task(case: Case) -> None:
    backbone = case.build()
    tasks = tune_all(backbone, kinds_of(case))
    rows = [*tasks, *list(tasks)[::-2]]
    images = case.images(len(rows))
    with torch.no_grad():
        output = memtune.combine(backbone, tasks)(images, rows=rows)
        for image, name, answer in zip(images, rows, output, strict=True):
            torch.testing.assert_close(answer.logits, tasks[name](image[None]).logits, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def everything() -> tuple[MultiTaskModel, dict[str, memtune.TunedModel]]:
    backbone = VIT.build()
    tasks = tune_all(backbone, KINDS)
    return memtune.combine(backbone, tasks), tasks


@given(st.data())
@settings(max_examples=40)
@pytest.mark.slow
def test_any_subset_in_any_order(everything: Any, data: st.DataObject) -> None:
    model, tasks = everything
    names = data.draw(st.permutations(list(tasks)))[: data.draw(st.integers(0, len(tasks)))]
    output = model(VIT.images(2), tasks=names)
    assert list(output) == names
    assert_alone(model, tasks, VIT.images(2), tasks=names)


@given(st.data())
@settings(max_examples=40)
def test_any_mixed_batch(everything: Any, data: st.DataObject) -> None:
    model, tasks = everything
    assert_rows_alone(model, tasks, data.draw(st.lists(st.sampled_from(list(tasks)), min_size=1, max_size=9)))


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), st.randoms())
@settings(max_examples=25)
def test_any_mix_of_methods(kinds: list[tuple[str, bool]], random: Any) -> None:
    backbone = VIT.build()
    tasks = tune_all(backbone, kinds)
    model = memtune.combine(backbone, tasks)
    assert_alone(model, tasks, VIT.images(2))
    assert_rows_alone(model, tasks, random.choices(list(tasks), k=5))


@pytest.mark.slow
def test_a_hundred_tasks() -> None:
    backbone = VIT.build()
    tasks = tune_all(backbone, [(name, True) for name in ("memory", "lora", "more memory", "memory and lora")] * 25)
    model = memtune.combine(backbone, tasks)
    (lane,) = model.arrangement.lanes
    assert len(lane.names) == 100
    assert_alone(model, tasks, VIT.images(2))
    assert_rows_alone(model, tasks, list(tasks))


def test_what_tasks_share() -> None:
    backbone = VIT.build()
    kinds = [
        ("head", False),
        ("memory", False),
        ("lora at the end", False),
        ("memory at the end", False),
        ("coda", True),
    ]
    lanes = memtune.combine(backbone, tune_all(backbone, kinds)).arrangement.lanes
    assert [(type(lane), len(lane.names)) for lane in lanes] == [
        (HeadLane, 1),
        (AdaptedLane, 1),
        (AdaptedLane, 2),
        (MaskedLane, 1),
    ]
    assert [lane.shared_blocks for lane in lanes if isinstance(lane, AdaptedLane)] == [0, 1]


def test_folders_and_models_can_be_mixed(tmp_path: Path) -> None:
    backbone = VIT.build()
    tasks = tune_all(backbone, [("lora", True), ("memory", False), ("dora", False)])
    names = list(tasks)
    tasks[names[0]].save_pretrained(tmp_path / "one")
    tasks[names[1]].save_pretrained(tmp_path / "two")
    sources = {names[0]: tmp_path / "one", names[1]: str(tmp_path / "two"), names[2]: tasks[names[2]]}
    model = memtune.combine(backbone, sources)
    assert_alone(model, tasks, VIT.images(2))
    assert model.tasks == {name: tasks[name].task.labels for name in names}


def test_a_model_is_copied() -> None:
    backbone = VIT.build()
    tuned = tune(backbone, MemoryConfig(2), masked=True)
    model = memtune.combine(backbone, {"a": tuned})
    before = model(VIT.images()).pop("a").logits
    with torch.no_grad():
        tuned.task.head.weight.zero_()
    assert torch.equal(model(VIT.images())["a"].logits, before)


def test_tasks_come_and_go() -> None:
    backbone = VIT.build()
    tasks = tune_all(backbone, KINDS)
    names = list(tasks)
    model = memtune.combine(backbone, {name: tasks[name] for name in names[:9]})
    for name in names[9:]:
        model.add_task(name, tasks[name])
    for name in names[::2]:
        model.remove_task(name)
    assert list(model.tasks) == names[1::2]
    assert_alone(model, {name: tasks[name] for name in names[1::2]}, VIT.images(2))
    for name in names[1::2]:
        model.remove_task(name)
    output = model(VIT.images())
    assert len(output) == 0
    assert outputs_equal(output.base, backbone(pixel_values=VIT.images()))


def test_a_pass_under_way_keeps_its_tasks() -> None:
    backbone = VIT.build()
    tasks = tune_all(backbone, [("memory", True), ("lora", True), ("lora", False)])
    first, second, third = tasks
    model = memtune.combine(backbone, tasks)
    expected = {name: tasks[name](VIT.images(2)).logits for name in tasks}
    stop, problems = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            output = model(VIT.images(2))
            mixed = model(VIT.images(2), rows=[first, third])
            wrong = [name for name in output if not torch.allclose(output[name].logits, expected[name], atol=1e-5)]
            wrong += [
                each
                for each, name in zip(mixed, (first, third), strict=True)
                if each.logits.shape[1] != len(model.tasks[name])
            ]
            problems.extend(wrong)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        model.remove_task(second)
        model.add_task(second, tasks[second])
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems


@torch.no_grad()
def test_a_pass_under_way_keeps_its_values_where_they_are() -> None:
    """What another arrangement stacks is its own: a tensor that a pass may be reading is never moved."""
    backbone = BY_NAME["vit-head"].build()
    images = BY_NAME["vit-head"].images()
    model = memtune.combine(backbone, tune_all(backbone, [("memory", True), ("lora", True), ("lora", False)]))
    expected = {name: answer.logits for name, answer in model(images).items()}
    before = model.arrangement
    places = {name: [each.data_ptr() for each in task.parameters()] for name, task in before.tasks.items()}
    model.add_task("more", next(iter(tune_all(backbone, [("lora", True)]).values())))
    model(images)
    model.remove_task("more")
    for name, answer in model(images).items():
        torch.testing.assert_close(answer.logits, expected[name], atol=1e-6, rtol=1e-5)
    assert {name: [each.data_ptr() for each in task.parameters()] for name, task in before.tasks.items()} == places
    mine = {id(each) for task in model.arrangement.tasks.values() for each in task.parameters()}
    assert not mine & {id(each) for task in before.tasks.values() for each in task.parameters()}
    for task in model.arrangement.tasks.values():  # what is written into a task is answered with
        task.head.bias.add_(1.0)
    for name, answer in model(images).items():
        torch.testing.assert_close(answer.logits, expected[name] + 1, atol=1e-5, rtol=1e-5)


def test_copies_and_precision() -> None:
    backbone = VIT.build()
    tasks = tune_all(backbone, [("memory", True), ("lora", True), ("all", False), ("lora at the end", False)])
    model = memtune.combine(backbone, tasks)
    images = VIT.images(2)
    copied = copy.deepcopy(model)
    for name, answer in model(images).items():
        assert torch.equal(copied(images)[name].logits, answer.logits)
    copied = copied.to(torch.float64)
    for name, answer in model(images).items():
        logits = copied(images.double())[name].logits
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits.float(), answer.logits, atol=1e-5, rtol=1e-5)
    assert all(not parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
@each([BY_NAME["vit-head"], BY_NAME["beit-head"], BY_NAME["dinov3"]])
@pytest.mark.slow
def test_bfloat16(case: Case, autocast: bool) -> None:
    backbone = case.build() if autocast else case.build().bfloat16()
    tasks = tune_all(backbone, KINDS)
    model, images = memtune.combine(backbone, tasks), case.images(2).to(backbone.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for name, answer in model(images).items():
            expected = tasks[name](images).logits
            assert (answer.logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
def test_switching_tasks_never_recompiles() -> None:
    backbone = VIT.build()
    tasks = tune_all(backbone, [("memory", True), ("lora", True), ("memory and lora", True)])
    first, second, third = tasks
    model = memtune.combine(backbone, tasks)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    images = VIT.images(3)
    compiled(images)
    compiled(images, rows=[first, second, third])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mine, expected in zip(compiled(images).values(), model(images).values(), strict=True):
            torch.testing.assert_close(mine.logits, expected.logits, atol=1e-6, rtol=1e-5)
        for rows in ([second, second, first], [third, first, third]):
            for mine, expected in zip(compiled(images, rows=rows), model(images, rows=rows), strict=True):
                torch.testing.assert_close(mine.logits, expected.logits, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_adding_a_task_recompiles_its_stream_once_and_never_the_trunk() -> None:
    backbone = VIT.build()
    tasks = tune_all(backbone, [("memory", True), ("lora", True), ("memory and lora", True)])
    first, second, third = tasks
    model = memtune.combine(backbone, {first: tasks[first], second: tasks[second]})
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="eager")
    images = VIT.images(3)

    def graphs() -> int:
        compiled(images)
        return counters["stats"]["unique_graphs"]

    before = graphs()
    trunk = torch.compile(model.arrangement.trunk.answer, backend="eager")
    trunk(images)
    alone = counters["stats"]["unique_graphs"] - before
    model.add_task(third, tasks[third])
    added = graphs() - before - alone
    assert 0 < added <= before - alone  # those of the stream
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert graphs() == before + alone + added
        model.remove_task(third)
        compiled(images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "most"),
    [
        (MemoryConfig(4), 0.006),
        ([MemoryConfig(4), LoraConfig(r=8)], 0.009),
        ([MemoryConfig(4), SideNetworkConfig(width=32)], 0.0105),
    ],
)
def test_one_more_task_of_vit_b16_costs_little(config: Any, most: float) -> None:
    backbone = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
    backbone.set_attn_implementation("eager")  # whose products are all counted
    tuned = {str(number): memtune.wrap(backbone, config, num_labels=10, masked=True).eval() for number in range(4)}
    images = torch.randn(2, 3, 224, 224)

    def flops(function: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(images)
        return counter.get_total_flops()

    model = memtune.combine(backbone, tuned)
    assert flops(model) / flops(backbone) < 1.01 + 4 * most


# Bad input.


def test_bad_tasks_are_named_and_change_nothing(tmp_path: Path) -> None:
    backbone, other = VIT.build(), VIT.build(seed=1)
    good = tune(backbone, MemoryConfig(2), masked=True)
    model = memtune.combine(backbone, {"good": good})
    (tmp_path / "broken").mkdir()
    for sources, error, message in [
        ({"good": good}, ConfigError, "there is a task 'good' already"),
        (
            {"new": good, "foreign": tune(other, MemoryConfig(2), masked=True)},
            BackboneMismatchError,
            "task 'foreign': .*weights",
        ),
        ({"new": good, "broken": tmp_path / "broken"}, MemtuneError, "task 'broken': "),
        ({"number": 3}, ConfigError, "task 'number': got int, expected an adapter folder"),
        ({"": good}, ConfigError, "got the name ''"),
    ]:
        with pytest.raises(error, match=message):
            model.add_tasks(sources)  # type: ignore[arg-type]
        assert list(model.tasks) == ["good"]
    assert_alone(model, {"good": good}, VIT.images())
    tune(other, LoraConfig(r=2), masked=False).save_pretrained(tmp_path / "other")
    with pytest.raises(BackboneMismatchError, match="task 'other': "):
        memtune.combine(backbone, {"other": tmp_path / "other"})
    assert list(memtune.combine(backbone, {"other": tmp_path / "other"}, any_weights=True).tasks) == ["other"]


@pytest.mark.parametrize("tasks", [{}, None, ["a"], "folder"])
def test_no_tasks(tasks: Any) -> None:
    with pytest.raises(ConfigError, match="expected adapters by the names of their tasks, at least one"):
        memtune.combine(VIT.build(), tasks)


def test_bad_questions(everything: Any) -> None:
    model, tasks = everything
    first, *_ = tasks
    images = VIT.images(2)
    for options, error, message in [
        ({"tasks": ["pets"]}, ConfigError, r"unknown tasks \['pets'\]; this model has"),
        ({"rows": [first, "pets"]}, ConfigError, r"rows: got the unknown tasks \['pets'\]"),
        ({"rows": [first]}, InputError, "rows: got 1 names for 2 images"),
        ({"rows": [first] * 2, "tasks": [first]}, InputError, "got both tasks and rows"),
        ({"tasks": first}, InputError, "expected a sequence of the names"),
        ({"tasks": [first, first]}, InputError, "names a task twice"),
    ]:
        with pytest.raises(error, match=message):
            model(images, **options)
    with pytest.raises(InputError, match="pixel_values: got"):
        model(images[:, :1])
    with pytest.raises(ConfigError, match="unknown tasks"):
        model.remove_task("pets")
    assert len(model(images)) == len(tasks)


# Saved and loaded.


def test_a_saved_model_answers_the_same(tmp_path: Path) -> None:
    backbone = VIT.build()
    kinds = [("memory", True), ("all", False), ("lora at the end", False), ("head", False)]
    tasks = {f"a/{name}": tuned for name, tuned in tune_all(backbone, kinds).items()}
    model = memtune.combine(backbone, tasks)
    model.add_task("later", memtune.wrap(backbone, MemoryConfig(2), num_labels=2, masked=True, extends=model))
    model.save_pretrained(tmp_path / "all")
    loaded = MultiTaskModel.from_pretrained(tmp_path / "all", VIT.build())
    images = VIT.images(2)
    expected = model(images)
    assert list(loaded.tasks) == list(model.tasks)
    for name, answer in loaded(images).items():
        assert torch.equal(answer.logits, expected[name].logits)
    index = json.loads((tmp_path / "all" / "multi_task_config.json").read_text())
    first = next(iter(tasks))
    alone = memtune.load(tmp_path / "all" / index["tasks"][first], backbone=VIT.build())
    assert torch.equal(alone(images).logits, tasks[first](images).logits)


def test_saving_again_replaces_the_adapters_alone(tmp_path: Path) -> None:
    backbone = VIT.build()
    model = memtune.combine(backbone, tune_all(backbone, [("memory", True), ("lora", True), ("lora", False)]))
    model.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    removed, *_ = model.tasks
    model.remove_task(removed)
    model.save_pretrained(tmp_path)
    assert list(MultiTaskModel.from_pretrained(tmp_path, backbone).tasks) == list(model.tasks)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["1-masked-lora", "2-lora"]


def test_names_that_make_the_same_folder(tmp_path: Path) -> None:
    backbone = VIT.build()
    tuned = tune(backbone, MemoryConfig(2), masked=True)
    names = ["a/b", "a b", "A-B", "..", "ünï", "a.b"]
    memtune.combine(backbone, dict.fromkeys(names, tuned)).save_pretrained(tmp_path)
    assert list(MultiTaskModel.from_pretrained(tmp_path, backbone).tasks) == names
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "a-b",
        "a-b-2",
        "A-B-3",
        "task",
        "ünï",
        "a.b",
    }


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "has no multi_task_config.json"),
        ("{", "is damaged"),
        ('{"format_version": 1}', "is damaged"),
        ('{"format_version": 2, "tasks": {}}', "format version 2, this memtune reads 1"),
        ('{"format_version": 1, "tasks": {"a": "../a"}}', "expected the name of a folder for each task"),
        ('{"format_version": 1, "tasks": {"a": ".."}}', "expected the name of a folder for each task"),
        ('{"format_version": 1, "tasks": []}', "expected the name of a folder for each task"),
        ('{"format_version": 1, "tasks": {"a": "a"}}', "task 'a': .*no adapter folder"),
    ],
)
def test_damaged_folders(tmp_path: Path, index: str | None, message: str) -> None:
    if index is not None:
        (tmp_path / "multi_task_config.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        MultiTaskModel.from_pretrained(tmp_path, VIT.build())
