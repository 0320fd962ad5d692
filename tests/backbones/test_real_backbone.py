"""A real backbone and real images: nothing that is masked touches the backbone, not by a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_zoo import assert_same, outputs_equal, snapshot
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification

import memtune
from memtune import MemoryConfig

pytestmark = pytest.mark.shared


@pytest.fixture
def backbone(shared_models: Path) -> Any:
    torch.set_num_threads(1)  # on a busy machine, faster than to wait for the second one
    return AutoModelForImageClassification.from_pretrained(shared_models / "vit-tiny-patch16-224")


@pytest.fixture(scope="module")
def batch(shared_data: Path) -> tuple[Tensor, Tensor]:
    """Four traffic signs of two classes, as the backbone's processor makes them."""
    folders = sorted(path for path in (shared_data / "gtsrb" / "train").iterdir() if path.is_dir())[:2]
    paths = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())[:2]]
    images = [Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR) for path, _ in paths]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1, torch.tensor([label for _, label in paths])


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.slow
def test_training_leaves_the_backbone_bit_for_bit(backbone: Any, batch: tuple[Tensor, Tensor], masked: bool) -> None:
    images, labels = batch
    before = snapshot(backbone)
    with torch.no_grad():
        expected = backbone(images)
    model = memtune.wrap(backbone, MemoryConfig(tokens=4), num_labels=2, masked=masked).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert outputs_equal(backbone(images), expected)  # ImageNet's 1,000 logits
        with model.disable_adapter():
            assert outputs_equal(model(images), expected)
        if masked:
            _, output = model._trunk.run(images)
            assert torch.equal(backbone.classifier(output.last_hidden_state[:, 0]), expected.logits)
    assert_same(model.detach(), before)


def test_a_task_that_was_not_trained_sees_what_the_backbone_sees(backbone: Any, batch: tuple[Tensor, Tensor]) -> None:
    """From the backbone's class token, without its own key or memory, a task reproduces the class feature."""
    model = memtune.wrap(backbone, MemoryConfig(tokens=0), num_labels=2, masked=True).eval()
    with torch.no_grad():
        current, output = model._trunk.run(batch[0])
        current.own_key = False
        feature = model.stream.features(current, model.task.token()).squeeze(1)
    torch.testing.assert_close(feature, output.last_hidden_state[:, 0], atol=1e-4, rtol=1e-4)
