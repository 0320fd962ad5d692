"""The table of the contract: for each method the little that a test cannot find out by itself.

A new method needs one row in `ROWS`, and `test_contract.py` then tests it on families of every kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from backbone_zoo import BY_NAME, FAMILIES, PLAIN, Case
from torch import Tensor, nn

import memtune
from memtune import (
    AdapterConfig,
    ApproximatedPromptConfig,
    CodaPromptConfig,
    LoraConfig,
    MemoryConfig,
    ScaleShiftConfig,
    SideNetworkConfig,
)
from memtune.methods.registry import find_method

LABELS = torch.tensor([0, 2])
LINEAR_ROLES = ("query", "key", "value", "out", "fc1", "fc2")
SIDE_KEYS = ("down", "down_norm", "down_norm_bias", "norm", "norm_bias", "own", "own_bias", "out", "out_bias")
SIDE_KEYS += ("up_key", "up_value")
DORA_ROLES = ("query", "out", "fc1", "fc2")

FEW = ("vit", "swin", "clip")
SOME = (*FEW, "beit", "segformer", "dinov3")


@dataclass(frozen=True)
class Row:
    """What the contract asks of a method.

    Attributes:
        config: Settings that suit backbones of width 16 and two blocks.
        keys: What stands behind `blocks.3.` in the keys of its tensors.
        count: The formula at the head of the method's file for one block: of the block, its width, and the width of the
            features that a head reads.
        unchanged: Whether a new adapter leaves the features as they are.
        steps: Training steps after which every trained value has had a gradient.
        cases: Names of the models to run on. One method meets every variant of a tower; the others meet the towers that
            differ most, and all families in the tests of their own formulas.
        masked_alone: Whether the method has no unmasked mode.
        pooled: Values that it trains beyond its blocks, by their keys, where it makes the feature without a token.
        note: What tells the row from others of its method.
    """

    config: AdapterConfig
    keys: tuple[str, ...]
    count: Callable[[nn.Module, int, int], int]
    unchanged: bool
    steps: int = 2
    cases: tuple[str, ...] = SOME
    masked_alone: bool = False
    pooled: dict[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.config.method, self.note)))

    @property
    def modes(self) -> tuple[bool, ...]:
        """The modes, masked or not, that the method has."""
        return (True,) if self.masked_alone else (False, True)

    def places(self) -> list[tuple[Case, bool]]:
        """The models and modes (masked or not) that the method runs on."""
        cases = [BY_NAME[name] for name in self.cases]
        if not self.note and not find_method(self.config.method).needs_attention_function:
            cases += PLAIN_FAMILIES
        return [(case, masked) for case in cases for masked in self.modes if not masked or can_be_masked(case)]

    def changed(self, case: Case, backbone: Any) -> list[tuple[int, nn.Module, int]]:
        """Index, module and width of each block that the method changes."""
        blocks = list(enumerate(zip(case.blocks(backbone), case.widths(backbone), strict=True)))
        chosen = range(len(blocks)) if self.config.blocks is None else self.config.blocks
        return [(index, block, width) for index, (block, width) in blocks if index in chosen]


PLAIN_FAMILIES = [case for case in PLAIN if not case.tower_path]


def can_be_masked(case: Case) -> bool:
    return not case.facts.staged and case not in PLAIN


def linears(block: nn.Module) -> list[nn.Linear]:
    """The linear layers of a block that have a role: all but those that make a position bias."""
    named = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    return [module for name, module in named if "position_bias" not in name]


ROWS = [
    Row(
        MemoryConfig(tokens=3),
        keys=("memory",),
        count=lambda block, width, feature_width: 3 * width,
        unchanged=False,
        cases=tuple(case.name for case in FAMILIES),
    ),
    Row(
        LoraConfig(r=3, roles=LINEAR_ROLES),
        keys=tuple(f"{role}.lora_{part}" for role in LINEAR_ROLES for part in "AB"),
        count=lambda block, *_: sum(3 * (layer.in_features + layer.out_features) for layer in linears(block)),
        unchanged=True,
    ),
    Row(
        LoraConfig(r=3, roles=DORA_ROLES, use_dora=True),
        keys=tuple(f"{role}.lora_{part}" for role in DORA_ROLES for part in ("A", "B", "magnitude")),
        count=lambda block, width, feature_width: (
            sum(3 * (layer.in_features + layer.out_features) + layer.out_features for layer in linears(block))
            - 2 * (3 * 2 * width + width)  # key and value
        ),
        unchanged=True,
        cases=FEW,
        note="dora",
    ),
    Row(
        ScaleShiftConfig(roles=DORA_ROLES),
        keys=tuple(f"{role}.{part}" for role in DORA_ROLES for part in ("scale", "shift")),
        count=lambda block, width, feature_width: (
            sum(2 * layer.out_features for layer in linears(block)) - 2 * 2 * width  # key and value
        ),
        unchanged=True,
        cases=FEW,
    ),
    Row(
        ApproximatedPromptConfig(n=50, r=2),  # so many that in no block ReLU sets the scores of all of them to 0
        keys=("prompts", "prompt_A", "prompt_B", "prompt_scale"),
        count=lambda block, width, feature_width: 50 * width + 2 * 2 * width + 1,
        unchanged=False,
    ),
    Row(
        ApproximatedPromptConfig(n=50, r=2, gate=True),
        keys=("prompts", "prompt_A", "prompt_B", "prompt_scale", "prompt_gate"),
        count=lambda block, width, feature_width: 50 * width + 2 * 2 * width + 2,
        unchanged=True,
        steps=3,
        cases=FEW,
        note="gate",
    ),
    Row(
        CodaPromptConfig(pool_size=6, prompt_length=4, blocks=(0, 1), ortho_mu=0.1),
        keys=("prefix", "prefix_key", "prefix_attention"),
        count=lambda block, width, feature_width: 6 * 4 * width + 2 * 6 * feature_width,
        unchanged=False,
    ),
    Row(
        SideNetworkConfig(width=8),
        keys=(*SIDE_KEYS, "conv"),
        count=lambda block, width, feature_width: 3 * width * 8 + 11 * 8 * 8 + 6 * 8,
        unchanged=True,
        masked_alone=True,
    ),
    Row(
        SideNetworkConfig(width=8, readout="pool"),
        keys=tuple(key for key in (*SIDE_KEYS, "conv") if not key.startswith("up_")),
        count=lambda block, width, feature_width: width * 8 + 11 * 8 * 8 + 6 * 8,
        unchanged=False,
        masked_alone=True,
        cases=FEW,
        pooled={f"pool.{name}": 8 for name in ("first", "first_bias", "mean", "mean_bias")},
        note="pooled",
    ),
    Row(
        SideNetworkConfig(width=8, mixing="none"),
        keys=SIDE_KEYS,
        count=lambda block, width, feature_width: 3 * width * 8 + 2 * 8 * 8 + 6 * 8,
        unchanged=True,
        masked_alone=True,
        cases=FEW,
        note="alone",
    ),
]

PLACES = [(row, case, masked) for row in ROWS for case, masked in row.places()]


def every(places: list[tuple[Row, Case, bool]] = PLACES) -> pytest.MarkDecorator:
    """Run a test for every method on every family in every mode."""
    names = [f"{row.name}-{case.name}-{'masked' if masked else 'unmasked'}" for row, case, masked in places]
    return pytest.mark.parametrize(("row", "case", "masked"), places, ids=names)


def wrapped(row: Row, case: Case, masked: bool, backbone: Any = None) -> memtune.TunedModel:
    """A new adapter on a model of the zoo, in training."""
    torch.manual_seed(3)
    return memtune.wrap(backbone or case.build(), row.config, num_labels=3, masked=masked).train()


def moved(model: memtune.TunedModel, seed: int = 5) -> memtune.TunedModel:
    """The model with every trained value somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def logits(model: memtune.TunedModel, images: Tensor) -> Tensor:
    """The model's answer in evaluation."""
    with torch.no_grad():
        return model.eval()(images).logits


def gradients(model: memtune.TunedModel, images: Tensor) -> dict[str, Any]:
    """The gradient of every trained tensor for one batch in training, None where there is none."""
    model.train().zero_grad(set_to_none=True)
    model(images, labels=LABELS).loss.backward()
    return {name: parameter.grad for name, parameter in model.task.named_parameters()}
