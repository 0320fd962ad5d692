"""Tasks of many kinds on one tiny backbone, for the tests of what runs them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import memtune
from memtune import ApproximatedPromptConfig, CodaPromptConfig, LoraConfig, MemoryConfig

CONFIGS: dict[str, Any] = {
    "memory": MemoryConfig(tokens=3),
    "more memory": MemoryConfig(tokens=5),
    "memory at the end": MemoryConfig(tokens=2, class_token=False, blocks=(-1,)),
    "head": MemoryConfig(tokens=0, class_token=False),
    "lora": LoraConfig(r=3),
    "lora of other rank and roles": LoraConfig(r=2, lora_alpha=3, roles=("query", "key", "fc2")),
    "lora at the end": LoraConfig(r=2, roles=("value", "out", "fc1"), blocks=(-1,)),
    "dora": LoraConfig(r=2, use_dora=True, roles=("query", "fc1")),
    "prompts": ApproximatedPromptConfig(n=50),
    "softmax prompts": ApproximatedPromptConfig(n=60, activation="softmax", gate=True),
    "coda": CodaPromptConfig(pool_size=6, prompt_length=4, blocks=(0, 1)),
    "smaller coda": CodaPromptConfig(pool_size=4, prompt_length=2, num_tasks=2, blocks=(1,)),
    "memory and lora": [MemoryConfig(tokens=2), LoraConfig(r=2)],
    "all": [MemoryConfig(2), LoraConfig(r=2), ApproximatedPromptConfig(n=50), CodaPromptConfig(6, 4, blocks=(0, 1))],
}
"""Settings of tasks, by a description."""


@torch.no_grad()
def tune(backbone: Any, config: Any, *, masked: bool, labels: int = 3, seed: int = 0) -> memtune.TunedModel:
    """A task with every value far from its initial one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuned = memtune.wrap(backbone, config, num_labels=labels, masked=masked).eval()
        for parameter in tuned.task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return tuned.eval()


def tune_all(backbone: Any, kinds: Sequence[tuple[str, bool]]) -> dict[str, memtune.TunedModel]:
    """A task of each kind (description, masked), with label sets of different sizes."""
    return {
        f"{number}: {'masked ' if masked else ''}{name}": tune(
            backbone, CONFIGS[name], masked=masked, labels=2 + number % 4, seed=number
        )
        for number, (name, masked) in enumerate(kinds)
    }
