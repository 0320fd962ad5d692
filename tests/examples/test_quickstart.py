"""examples/quickstart.py as a newcomer runs it, only shorter; and the backbone that it brings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import memtune

EXAMPLES = Path(__file__).parents[2] / "examples"
BACKBONE = EXAMPLES / "assets" / "backbone"


def test_the_backbone_is_small_and_loads():
    assert sum(path.stat().st_size for path in BACKBONE.iterdir()) <= 3_000_000
    model = AutoModelForImageClassification.from_pretrained(BACKBONE)
    assert 1_000_000 <= model.num_parameters() <= 1_500_000
    assert AutoImageProcessor.from_pretrained(BACKBONE).size["height"] == model.config.image_size


@pytest.mark.slow
def test_two_tasks_from_one_pass(tmp_path):
    arguments = ["--num_train_epochs", "3", "--train_images", "250", "--output_dir", str(tmp_path / "both")]
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"\| (tens|ones) \| ([a-z ]+) \| ([\d,]+) \| ([\d.]+) % \|", done.stdout)
    kinds = ["head only", "memory and side network"]
    assert [row[:2] for row in rows] == [(task, name) for task in ("tens", "ones") for name in kinds]
    assert [count for _, _, count, _ in rows] == ["1,290", "146,954"] * 2
    for head, adapter in (rows[:2], rows[2:]):
        assert float(adapter[3]) > float(head[3]) > 10
    times = dict(re.findall(r"\| ([\w',' ]+) \| (\d+) \|$", done.stdout, re.MULTILINE))
    assert len(times) == 4
    assert int(times["memtune, one pass"]) < int(times["memtune, a pass for each"])
    assert re.search(r"\d+ of 24 right in both", done.stdout)
    with Image.open(tmp_path / "both" / "predictions.png") as picture:
        assert picture.width > 500
    assert sorted(memtune.MultiTaskModel.from_pretrained(tmp_path / "both", load()).tasks) == ["ones", "tens"]


def load():
    return AutoModelForImageClassification.from_pretrained(BACKBONE, dtype=torch.float32)
