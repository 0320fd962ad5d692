"""The side network: the streamed form equals K' and V' written out, alone and among tasks of other shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, GLOBAL, Case, each
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm

import memtune
from memtune import LoraConfig, MemoryConfig, SideNetworkConfig, TrainingConfig
from memtune.errors import ConfigError, InputError
from memtune.methods.adapter import Adapter
from memtune.streams import Grid, Pass

VIT = BY_NAME["vit"]
CONFIGS = [
    SideNetworkConfig(width=4),
    SideNetworkConfig(width=7),
    SideNetworkConfig(width=5, mixing="none"),
    SideNetworkConfig(width=4, blocks=[1]),
]


def moved(model: memtune.TunedModel, seed: int = 0) -> memtune.TunedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


def tuned(backbone: Any, *configs: Any, seed: int = 0, **options: Any) -> memtune.TunedModel:
    return moved(memtune.wrap(backbone, list(configs), num_labels=3, masked=True, **options), seed)


def slow_states(values: Tensor, before: Tensor, part: dict[str, Tensor], grid: Grid) -> Tensor:
    """One image's states (T, r) after a block, token by token, of its values (T, D) and the states before."""
    wide = len(part["norm"])
    normed = []
    for token, state in zip(values, before, strict=True):
        down = token @ part["down"]
        down = (down - down.mean()) / (down.var(unbiased=False) + 1e-5).sqrt() * part["down_norm"]
        normed.append(state + down + part["down_norm_bias"])
    updated = torch.stack(normed)
    normed_states = layer_norm(updated, (wide,), part["norm"], part["norm_bias"])
    mixed = torch.zeros_like(updated)
    for token in range(len(values)):
        place = token - grid.prefix
        if "conv" not in part or place < 0:
            mixed[token] = normed_states[token] @ part["own"]
            continue
        row, column = divmod(place, grid.width)
        for down_by in (-1, 0, 1):
            for right_by in (-1, 0, 1):
                if 0 <= row + down_by < grid.height and 0 <= column + right_by < grid.width:
                    there = grid.prefix + (row + down_by) * grid.width + column + right_by
                    mixed[token] += part["conv"][:, :, down_by + 1, right_by + 1] @ normed_states[there]
    return updated + gelu(mixed + part["own_bias"]) @ part["out"] + part["out_bias"]


def parts_of(adapter: Adapter) -> dict[int, dict[str, Tensor]]:
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in adapter.state_dict().items():
        if name.startswith("blocks."):
            _, index, key = name.split(".")
            parts.setdefault(int(index), {})[key] = tensor
    return parts


def all_states(current: Pass, adapter: Adapter) -> list[list[Tensor]]:
    """For each image the states (T, r) after each block that has some."""
    images: list[list[Tensor]] = []
    for image in range(len(current.trunk[0].value)):
        states: list[Tensor] = []
        for index, part in sorted(parts_of(adapter).items()):
            block = current.trunk[index]
            assert block.grid is not None
            values = block.value[image].transpose(0, 1).flatten(1)
            before = states[-1] if states else torch.zeros(len(values), len(part["norm"]))
            states.append(slow_states(values, before, part, block.grid))
        images.append(states)
    return images


def written_out(current: Pass, adapter: Adapter) -> Pass:
    """The pass with K' and V' in place of the trunk's keys and values."""
    parts, states = parts_of(adapter), all_states(current, adapter)
    blocks = []
    for index, block in enumerate(current.trunk):
        if index in parts:
            part, heads, place = parts[index], block.value.shape[1], sorted(parts).index(index)
            key, value = (
                (torch.stack([each[place] for each in states]) @ part[name]).unflatten(2, (heads, -1)).transpose(1, 2)
                for name in ("up_key", "up_value")
            )
            block = block._replace(key=block.key + key, value=block.value + value)
        blocks.append(block)
    return replace(current, trunk=blocks)


def slow_logits(model: memtune.TunedModel, images: Tensor, **options: Any) -> Tensor:
    """The answer of a task without a side network that reads K' and V'."""
    configs = [config for config in model.task.configs if config.method != "side_network"]
    bare = memtune.wrap(model.backbone, configs, num_labels=3, masked=True).eval()
    own = model.task.tensors()
    bare.task.load_tensors({key: own[key] for key in bare.task.tensors()})
    side = next(adapter for adapter in model.task.adapters if adapter.config.method == "side_network")
    return bare(trunk=written_out(model.trunk_pass(images, **options), side)).logits


@each(GLOBAL)
@torch.no_grad()
def test_it_is_the_formula_written_out(case: Case) -> None:
    images = case.images()
    for config in CONFIGS[:1] if case.name != "vit" else CONFIGS:
        model = tuned(case.build(), MemoryConfig(2), config)
        expected = slow_logits(model, images)
        torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-5)
        without = memtune.wrap(model.backbone, MemoryConfig(2), num_labels=3, masked=True).eval()
        own = model.task.tensors()
        without.task.load_tensors({key: own[key] for key in without.task.tensors()})
        assert (without(images).logits - expected).abs().max() > 1e-3


def slow_features(model: memtune.TunedModel, images: Tensor, **options: Any) -> Tensor:
    """What the head reads of the states after the last block, where no token reads them."""
    adapter = model.task.adapters[0]
    current = model.trunk_pass(images, **options)
    states = torch.stack([each[-1] for each in all_states(current, adapter)])
    grid, width, pool = current.trunk[0].grid, states.shape[-1], dict(adapter.state_dict())
    assert grid is not None
    parts = [("mean", states[:, grid.prefix :].mean(dim=1))] + [("first", states[:, 0])] * bool(grid.prefix)
    normed = [layer_norm(part, (width,), pool[f"pool.{name}"], pool[f"pool.{name}_bias"]) for name, part in parts]
    return torch.cat(normed, dim=1)


@each(GLOBAL)
@torch.no_grad()
def test_without_a_token_the_head_reads_the_mean_of_the_states(case: Case) -> None:
    images = case.images()
    model = tuned(case.build(), SideNetworkConfig(width=4, readout="pool"))
    assert model.task.class_token is None
    expected = slow_features(model, images)
    torch.testing.assert_close(model.features(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(images).logits, model.task.head(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tasks_without_a_token_share_a_pass(tmp_path: Path) -> None:
    backbone, images = VIT.build(), VIT.images(7)
    pooled = SideNetworkConfig(width=4, readout="pool")
    kinds = [pooled, pooled, replace(pooled, mixing="none"), replace(pooled, width=6), CONFIGS[0], MemoryConfig(2)]
    models = {str(number): tuned(backbone, config, seed=number) for number, config in enumerate(kinds)}
    alone = {name: model(images).logits for name, model in models.items()}
    together = memtune.combine(backbone, models)
    assert [lane.tasks for lane in together.plan().lanes] == [("0", "1"), ("2",), ("3",), ("4", "5")]
    for names in ([*models], ["1"], ["3", "0"]):
        answers = together(images, tasks=names)
        for name in names:
            torch.testing.assert_close(answers[name].logits, alone[name], atol=1e-5, rtol=1e-5)
    rows = ["1", "0", "5", "2", "0", "3", "4"]
    for row, (name, answer) in enumerate(zip(rows, together(images, rows=rows), strict=True)):
        torch.testing.assert_close(answer.logits[0], alone[name][row], atol=1e-5, rtol=1e-5)
    together.save_pretrained(tmp_path)
    loaded = memtune.MultiTaskModel.from_pretrained(tmp_path, backbone=backbone)(images)
    assert all(torch.equal(loaded[name].logits, answers.logits) for name, answers in together(images).items())
    program = memtune.export.export_program(together, tasks=["0", "2"])
    torch.testing.assert_close(program.module()(images)["0"], alone["0"], atol=1e-5, rtol=1e-5)


def test_without_a_token_nothing_else_is_to_be_read() -> None:
    backbone, pooled = VIT.build(), SideNetworkConfig(width=4, readout="pool")
    for others in ([MemoryConfig(2)], [LoraConfig(r=2)]):
        with pytest.raises(ConfigError, match="no task token"):
            memtune.wrap(backbone, [pooled, *others], num_labels=2, masked=True)
    with pytest.raises(ConfigError, match="readout: got 'mean'"):
        SideNetworkConfig(readout="mean")
    with pytest.raises(ConfigError, match="blocks: got none"):
        memtune.wrap(backbone, SideNetworkConfig(readout="pool", blocks=[]), num_labels=2, masked=True)
    task = memtune.wrap(backbone, pooled, num_labels=2, masked=True)
    with pytest.raises(ConfigError, match="without a token"):
        memtune.explain(task, VIT.images(1))
    earlier = memtune.combine(backbone, {"a": task})
    with pytest.raises(ConfigError, match="no task tokens"):
        memtune.wrap(backbone, MemoryConfig(2), num_labels=2, masked=True, extends=earlier)
    both = memtune.combine(
        backbone, {"a": task, "b": memtune.wrap(backbone, MemoryConfig(1), num_labels=2, masked=True)}
    )
    assert [*memtune.wrap(backbone, MemoryConfig(2), num_labels=2, masked=True, extends=both).task.extends] == ["b"]
    with pytest.raises(ConfigError, match="tasks to extend"):
        memtune.wrap(backbone, pooled, num_labels=2, masked=True, extends=both)


@each([BY_NAME["vit"], BY_NAME["dinov2_with_registers"], BY_NAME["beit"]])
@torch.no_grad()
def test_images_that_are_no_squares(case: Case) -> None:
    model = tuned(case.build(), SideNetworkConfig(width=4))
    height, width = case.images().shape[-2:]
    images = torch.randn(2, 3, height, 2 * width)
    options = {"interpolate_pos_encoding": True}
    expected = slow_logits(model, images, **options)
    torch.testing.assert_close(model(images, **options).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_tasks_of_several_widths_and_mixings_together(attention: str) -> None:
    backbone = VIT.build()
    backbone.set_attn_implementation(attention)
    images = VIT.images(7)
    kinds = [[MemoryConfig(2), config] for config in CONFIGS] + [[MemoryConfig(3)], [LoraConfig(r=2), CONFIGS[1]], []]
    models = {str(number): tuned(backbone, *configs, seed=number) for number, configs in enumerate(kinds)}
    alone = {name: model(images).logits for name, model in models.items()}
    base = backbone(images).logits if hasattr(backbone(images), "logits") else backbone(images).last_hidden_state
    together = memtune.combine(backbone, models)
    for names in ([*models], ["1", "5"], ["2"], ["4", "0", "3"]):
        answers = together(images, tasks=names)
        for name in names:
            torch.testing.assert_close(answers[name].logits, alone[name], atol=1e-5, rtol=1e-5)
        own = answers.base.logits if hasattr(answers.base, "logits") else answers.base.last_hidden_state
        assert torch.equal(own, base)
    for rows in ([*models], ["1", "1", "2", "0", "3", "5", "6"]):
        for image, (name, answer) in enumerate(zip(rows, together(images, rows=rows), strict=True)):
            torch.testing.assert_close(answer.logits[0], alone[name][image], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_goes_along_with_the_trunk() -> None:
    """Block by block or after the trunk: the same answer, and only the last state is kept."""
    model = tuned(VIT.build(), SideNetworkConfig(width=4))
    images = VIT.images()
    after = model(trunk=model.trunk_pass(images)).logits
    torch.testing.assert_close(model(images).logits, after)
    together = memtune.combine(model.backbone, {"a": model})
    torch.testing.assert_close(together(images)["a"].logits, after)


def test_gradients_are_those_of_the_formula() -> None:
    model = tuned(VIT.build().double(), MemoryConfig(1), SideNetworkConfig(width=3)).double()
    images = VIT.images(1).double()
    current = model.trunk_pass(images)
    side = model.task.adapters[1]
    names, values = zip(*side.named_parameters(), strict=True)
    chosen = [number for number, name in enumerate(names) if name.startswith("blocks.0")]

    def answer(*own: Tensor) -> Tensor:
        given = {f"task.adapters.1.{names[number]}": value for number, value in zip(chosen, own, strict=True)}
        return torch.func.functional_call(model, given, kwargs={"trunk": current}).logits.sum(dim=-1)

    assert torch.autograd.gradcheck(answer, [values[number] for number in chosen], fast_mode=True)


def test_a_task_extends_one_with_a_side_network() -> None:
    backbone, images = VIT.build(), VIT.images()
    first = tuned(backbone, SideNetworkConfig(width=4))
    second = tuned(
        backbone, MemoryConfig(2), SideNetworkConfig(width=3), extends=memtune.combine(backbone, {"a": first}), seed=1
    )
    together = memtune.combine(backbone, {"a": first, "b": second})
    with torch.no_grad():
        answers = together(images)
        for name, model in (("a", first), ("b", second)):
            torch.testing.assert_close(answers[name].logits, model(images).logits, atol=1e-5, rtol=1e-5)


def test_training_from_a_cache_is_training_without(tmp_path: Path) -> None:
    torch.manual_seed(1)
    items = [{"pixel_values": VIT.images(1)[0] + index, "labels": index % 3} for index in range(9)]
    runs = []
    for cache in (None, tmp_path / "cache"):
        model = memtune.wrap(VIT.build(), [MemoryConfig(2), SideNetworkConfig(width=4)], num_labels=3, masked=True)
        torch.manual_seed(2)
        for adapter in model.task.adapters:
            for parameter in adapter.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        torch.nn.init.zeros_(model.task.head.weight)
        settings = TrainingConfig(
            num_train_epochs=2,
            per_device_train_batch_size=4,
            disable_tqdm=True,
            trunk_cache=cache,
            trunk_cache_dtype="float32",
        )
        memtune.fit(model, items, config=settings)
        runs.append(model.task.tensors())
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, atol=1e-5, rtol=1e-4)


def test_unmasked_mode_is_refused_before_anything_changes() -> None:
    backbone = VIT.build()
    with pytest.raises(ConfigError, match=r"side_network: got masked=False, .*pass masked=True"):
        memtune.wrap(backbone, SideNetworkConfig(), num_labels=2)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width: got 0, expected a whole number"),
        ({"width": True}, "width: got True"),
        ({"mixing": "attention"}, r"mixing: got 'attention', expected one of \('conv', 'none'\)"),
        ({"blocks": "all"}, "blocks: got 'all'"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SideNetworkConfig(**settings)


def test_a_pass_that_does_not_say_how_patches_lie() -> None:
    model = tuned(VIT.build(), SideNetworkConfig(width=4))
    current = model.trunk_pass(VIT.images())
    blank = replace(current, trunk=[block._replace(grid=None) for block in current.trunk])
    with pytest.raises(InputError, match="does not say how its patches lie"):
        model(trunk=blank)


def test_the_convolution_is_torchs() -> None:
    """The slow loop above against conv2d, so that its own order of rows and columns is right."""
    torch.manual_seed(0)
    part = {"conv": torch.randn(2, 2, 3, 3), "down": torch.zeros(3, 2), "own": torch.zeros(2, 2)}
    part |= {"out": torch.eye(2)} | {name: torch.ones(2) for name in ("down_norm", "norm")}
    part |= {name: torch.zeros(2) for name in ("down_norm_bias", "norm_bias", "own_bias", "out_bias")}
    before = torch.randn(6, 2)
    got = slow_states(torch.randn(6, 3), before, part, Grid(0, 2, 3)) - before
    normed = layer_norm(before, (2,)).T.view(1, 2, 2, 3)
    torch.testing.assert_close(got.T.view(1, 2, 2, 3), gelu(conv2d(normed, part["conv"], padding=1)))


@torch.no_grad()
def test_an_explanation_says_what_the_token_takes_of_the_states() -> None:
    """For each block, head and patch the length of p s U_V over that of all p V and p s U_V, written out."""
    model = tuned(VIT.build(), MemoryConfig(2), CONFIGS[0])
    images = VIT.images(1)
    explanation = memtune.explain(model, images)
    current = model.trunk_pass(images)
    side = next(adapter for adapter in model.task.adapters if adapter.config.method == "side_network")
    states = all_states(current, side)[0]
    assert len(explanation.sides) == len(current.trunk)
    for index, (place, part) in enumerate(sorted(parts_of(side).items())):
        block, found = current.trunk[place], explanation.sides[place]
        assert block.grid is not None
        attention = explanation.heads[place]
        for head in range(block.value.shape[1]):
            parts = attention.class_token, attention.registers, attention.patches
            weights = torch.cat([each[head].flatten() for each in parts])
            up = part["up_value"].unflatten(1, (block.value.shape[1], -1))[:, head]
            taken = [float(weight * (state @ up).norm()) for weight, state in zip(weights, states[index], strict=True)]
            own = [float(weight * value.norm()) for weight, value in zip(weights, block.value[0, head], strict=True)]
            expected = torch.tensor(taken[block.grid.prefix :]) / (sum(taken) + sum(own))
            torch.testing.assert_close(found[head].flatten(), expected, atol=1e-6, rtol=1e-4)


def test_an_explanation_without_a_side_network_has_no_part_of_one(tmp_path: Path) -> None:
    assert memtune.explain(tuned(VIT.build(), MemoryConfig(2)), VIT.images(1)).sides == []
    memtune.explain(tuned(VIT.build(), CONFIGS[0]), VIT.images(1)).save(tmp_path / "look.png")
    assert (tmp_path / "look.png").stat().st_size > 10_000
