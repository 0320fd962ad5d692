"""`base=False`: the same answers, from no more of the backbone than the tasks read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME
from multitask import tune
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTImageProcessorPil

import memtune
from memtune import CodaPromptConfig, LoraConfig, MemoryConfig

VIT = BY_NAME["vit-head"]
TASKS: dict[str, tuple[Any, bool]] = {
    "all blocks": (LoraConfig(r=2), False),
    "others": (LoraConfig(r=3), False),
    "last block": (LoraConfig(r=2, blocks=[-1]), False),
    "head": (MemoryConfig(tokens=0, class_token=False), False),
    "masked": (MemoryConfig(2), True),
}


@pytest.fixture(scope="module")
def model() -> memtune.MultiTaskModel:
    backbone = VIT.build()
    return memtune.combine(
        backbone, {name: tune(backbone, config, masked=masked) for name, (config, masked) in TASKS.items()}
    )


def cost(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("names", [[name] for name in TASKS] + [["all blocks", "last block"], list(TASKS)], ids=str)
def test_the_answers_are_the_same(model: memtune.MultiTaskModel, names: list[str]) -> None:
    images = VIT.images(3)
    expected, found = model(images, tasks=names), model(images, tasks=names, base=False)
    assert found.base is None
    assert list(found) == names
    for name in names:
        assert torch.equal(found[name].logits, expected[name].logits)


@pytest.mark.parametrize("rows", [["all blocks", "last block", "last block"], ["masked", "head", "others"]], ids=str)
def test_so_are_those_of_mixed_batches(model: memtune.MultiTaskModel, rows: list[str]) -> None:
    images = VIT.images(3)
    expected, found = model(images, rows=rows), model(images, rows=rows, base=False)
    assert found.base is None
    assert all(torch.equal(one.logits, other.logits) for one, other in zip(found, expected, strict=True))


def test_blocks_that_no_task_reads_are_not_run(model: memtune.MultiTaskModel) -> None:
    """What is saved, in passes of the backbone, which has two blocks."""
    images = VIT.images(2)
    bare = cost(lambda: model.backbone(images))
    saved = {
        name: cost(lambda name=name: model(images, tasks=[name]))
        - cost(lambda name=name: model(images, tasks=[name], base=False))
        for name in TASKS
    }
    assert saved["all blocks"] == saved["others"] == bare
    assert 0.2 * bare < saved["last block"] < 0.7 * bare
    for name in ("head", "masked"):  # which read what the whole backbone gives: its old head alone is saved
        assert 0 <= saved[name] < 0.05 * bare


def test_prompts_that_ask_the_backbone_first_run_all_of_it() -> None:
    config = CodaPromptConfig(pool_size=4, prompt_length=2, blocks=[-1])
    model = memtune.combine(backbone := VIT.build(), {"coda": tune(backbone, config, masked=False)})
    images = VIT.images(2)
    assert torch.equal(model(images, base=False)["coda"].logits, model(images)["coda"].logits)


def test_predictions_do_not_ask_for_the_base(model: memtune.MultiTaskModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    forward = memtune.MultiTaskModel.forward

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(options["base"])
        return forward(self, *arguments, **options)

    monkeypatch.setattr(memtune.MultiTaskModel, "forward", watched)
    picture = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    size = {"height": 32, "width": 32}
    model.predict(picture, tasks=["all blocks"], image_processor=ViTImageProcessorPil(size=size))
    assert asked == [False]


def test_each_of_several_unmasked_tasks_answers_as_it_does_alone() -> None:
    backbone = VIT.build()
    alone = {
        "few": tune(backbone, LoraConfig(r=2), masked=False, seed=1),
        "more": tune(backbone, [MemoryConfig(3), LoraConfig(r=4)], masked=False, seed=2),
        "dora": tune(backbone, LoraConfig(r=2, use_dora=True), masked=False, seed=3),
    }
    images = VIT.images(3)
    together = memtune.combine(backbone, alone)(images)
    for name, each in alone.items():
        torch.testing.assert_close(together[name].logits, each(images).logits, atol=1e-5, rtol=1e-5)
