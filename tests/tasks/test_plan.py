"""The plan of a multi-task model: what is shared, and multiply-adds counted by hand beside it."""

from __future__ import annotations

import pytest
from backbone_zoo import BY_NAME, FAMILIES, GLOBAL, Case, each
from multitask import tune, tune_all

import memtune
from memtune import LoraConfig, MemoryConfig

VIT = BY_NAME["vit-head"]


def test_what_is_shared() -> None:
    backbone = VIT.build()
    kinds = [("head", False), ("memory", False), ("lora at the end", False), ("coda", True), ("memory", True)]
    plan = memtune.combine(backbone, tune_all(backbone, kinds)).plan()
    assert plan.blocks == 2
    assert [(lane.stream, lane.shared_blocks, len(lane.tasks)) for lane in plan.lanes] == [
        ("head alone", 2, 1),
        ("adapted stream", 0, 1),
        ("adapted stream", 1, 1),
        ("task stream", 2, 2),
    ]
    assert plan.total == plan.multiply_adds + sum(lane.multiply_adds for lane in plan.lanes)
    text = str(plan)
    assert "adapted stream, sharing 1 of 2 blocks: 2: lora at the end" in text
    assert f"{plan.total / plan.multiply_adds:.3f} of the backbone's own" in text


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_multiply_adds_of_a_vit(attention: str) -> None:
    backbone = VIT.build()
    backbone.set_attn_implementation(attention)
    config = backbone.config
    width, inner, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + 1
    block = 4 * width * width + 2 * width * inner  # of one token: query, key, value, out, fc1, fc2
    expected = patches * 3 * config.patch_size**2 * width + config.num_labels * width
    expected += depth * (tokens * block + 2 * tokens * tokens * width)
    model = memtune.combine(
        backbone,
        {
            "memory": tune(backbone, MemoryConfig(tokens=3), masked=True, labels=4),
            "end": tune(backbone, LoraConfig(r=2, roles=("fc1",), blocks=(-1,)), masked=False, labels=4),
        },
    )
    plan = model.plan()
    assert plan.multiply_adds == expected
    masked, adapted = plan.lanes
    # One task's queries are as wide as all heads together. Its token to itself is a product by elements: not counted.
    heads = config.num_attention_heads
    assert masked.multiply_adds == depth * (block + 2 * (heads * tokens + 3) * width) + 4 * width
    last = tokens * (block + 2 * (width + inner)) + 2 * tokens * tokens * width
    assert adapted.multiply_adds == patches * 3 * config.patch_size**2 * width + last + 4 * width


@each(FAMILIES)
@pytest.mark.slow
def test_every_family_has_a_plan(case: Case) -> None:
    backbone = case.build()
    plan = memtune.combine(backbone, tune_all(backbone, [("lora", case in GLOBAL), ("memory", False)])).plan()
    assert plan.blocks == case.depth
    assert plan.multiply_adds > 0
    assert all(lane.multiply_adds > 0 for lane in plan.lanes)
