"""Runs of seconds on two classes of noise, and what interrupts them."""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification

import memtune
from memtune import TrainingConfig
from memtune.training.callbacks import TrainingCallback

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "disable_tqdm": True}


def tuned(masked=False, **options):
    torch.manual_seed(0)
    backbone = ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8))
    return memtune.wrap(backbone, memtune.MemoryConfig(2), num_labels=2, masked=masked, **options)


def items(count=32, seed=0):
    """Bright and dark images: a class each."""
    torch.manual_seed(seed)
    labels = torch.arange(count) % 2
    return [{"pixel_values": torch.randn(3, 32, 32) + 2 * label - 1, "labels": int(label)} for label in labels]


def train(model, data=None, **settings):
    return memtune.fit(model, data or items(), config=TrainingConfig(**QUICK | settings))


def weights(model):
    return {key: tensor.clone() for key, tensor in model.task.tensors().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Stop(Exception):
    """Raised by a data set."""


class StopAfter(TrainingCallback):
    """Ends a run after a step, as an exception anywhere would."""

    def __init__(self, step):
        self._left = step

    def on_step_end(self, model):
        self._left -= 1
        if self._left == 0:
            raise Stop
