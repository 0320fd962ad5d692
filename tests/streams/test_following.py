"""Task streams that go along with the trunk: the answers of those that come after it, with nothing kept of it."""

import threading

import pytest
import torch
from backbone_zoo import BY_NAME
from multitask import tune

import memtune
from memtune.streams import TaskStream, Trunk
from memtune.streams.passes import Pass

CASE = BY_NAME["beit"]  # whose blocks have a bias
METHODS = {
    "memory": memtune.MemoryConfig(2),
    "lora": memtune.LoraConfig(r=2),
    "coda": memtune.CodaPromptConfig(pool_size=4, prompt_length=2, blocks=None),
}


def combined(*names, extends=False):
    backbone = CASE.build()
    tasks = {name: tune(backbone, METHODS[name], masked=True, seed=number) for number, name in enumerate(names)}
    model = memtune.combine(backbone, tasks)
    if extends:
        options = {"num_labels": 3, "masked": True, "extends": model}
        model.add_task("later", memtune.wrap(backbone, METHODS["memory"], **options).eval())
    return model


@pytest.fixture
def kept(monkeypatch):
    """How many blocks each pass of a trunk has kept."""
    numbers = []
    answer = Trunk.answer

    def counted(self, *arguments, **options):
        current, output = answer(self, *arguments, **options)
        numbers.append(len(current.trunk))
        return current, output

    monkeypatch.setattr(Trunk, "answer", counted)
    return numbers


def after(model, monkeypatch):
    """The same model, its streams after the trunk."""
    monkeypatch.setattr("memtune.tasks.lanes.MaskedLane.follow", lambda *arguments, **options: None)
    return model


@pytest.mark.parametrize("options", [{}, {"tasks": ["lora"]}, {"rows": ["memory", "lora", "lora", "memory"]}], ids=str)
def test_answers_are_those_of_streams_after_the_trunk_and_nothing_is_kept(options, kept, monkeypatch):
    model, images = combined("memory", "lora"), CASE.images(4)
    found = model(images, **options)
    expected = after(model, monkeypatch)(images, **options)
    assert kept == [0, model.backbone.config.num_hidden_layers]
    places = range(4) if "rows" in options else found
    assert all(torch.equal(found[place].logits, expected[place].logits) for place in places)


def test_a_mixed_batch_of_several_lanes_gives_each_its_images():
    model, images = combined("memory", extends=True), CASE.images(4)
    rows = ["memory", "later", "later", "memory"]
    found, whole = model(images, rows=rows), model(images)
    for row, name in enumerate(rows):
        torch.testing.assert_close(found[row].logits[0], whole[name].logits[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "options", "number"),
    [
        (("memory", "coda"), {}, 2),  # CODA asks for the trunk's feature
        (("memory", "coda"), {"tasks": ["memory"]}, 2),  # which shares the stream of CODA's task
        (("memory", "extends"), {}, 2),
        (("memory", "extends"), {"tasks": ["memory"]}, 0),
    ],
    ids=str,
)
def test_the_trunk_is_kept_for_those_who_need_it_whole(model, options, number, kept):
    names = [name for name in model if name != "extends"]
    made = combined(*names, extends="extends" in model)
    kept.clear()
    made(CASE.images(2), **options)
    assert kept == [number]


def test_the_backbones_hidden_states_are_its_own(kept):
    model, images = combined("memory", "lora"), CASE.images(2)
    model.backbone.config.output_hidden_states = True
    with torch.no_grad():
        expected = model.backbone(images).hidden_states
    found = model(images).base.hidden_states
    assert kept == [0]
    assert len(found) == len(expected) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_pass_that_fails_leaves_nothing_behind(monkeypatch):
    model, images = combined("memory"), CASE.images(2)
    expected = model(images)["memory"].logits
    step = TaskStream.step

    def fail(self, index, tokens, current):
        if index == 1:
            raise RuntimeError("out of memory")
        return step(self, index, tokens, current)

    monkeypatch.setattr(TaskStream, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(images)
    monkeypatch.setattr(TaskStream, "step", step)
    trunk = model.arrangement.trunk
    current, _ = trunk.answer(images)
    assert isinstance(current, Pass)
    assert len(current.trunk) == 2
    assert torch.equal(model(images)["memory"].logits, expected)


def test_threads_have_streams_of_their_own():
    model = combined("memory", "lora")
    images = [CASE.images(number) for number in (1, 2, 3, 4)]
    expected = [model(each) for each in images]
    wrong = []

    def run(number):
        for _ in range(10):
            found = model(images[number], tasks=[("memory", "lora")[number % 2]])
            for name, output in found.items():
                if not torch.allclose(output.logits, expected[number][name].logits, atol=1e-5):
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
