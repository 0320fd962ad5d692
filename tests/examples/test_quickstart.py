"""examples/quickstart.py as a newcomer runs it, only shorter; and the backbone that it brings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

EXAMPLES = Path(__file__).parents[2] / "examples"
BACKBONE = EXAMPLES / "assets" / "backbone"


def test_the_backbone_is_small_and_loads():
    assert sum(path.stat().st_size for path in BACKBONE.iterdir()) <= 3_000_000
    model = AutoModelForImageClassification.from_pretrained(BACKBONE)
    assert 1_000_000 <= model.num_parameters() <= 1_500_000
    assert AutoImageProcessor.from_pretrained(BACKBONE).size["height"] == model.config.image_size


@pytest.mark.slow
def test_it_compares_saves_loads_and_draws(tmp_path):
    arguments = ["--num_train_epochs", "1", "--train_images", "200", "--output_dir", str(tmp_path / "digits")]
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"\| ([a-z -]+) \| ([\d,]+) \| ([\d.]+) % \|", done.stdout)
    assert [name for name, _, _ in rows] == ["head only", "masked memory", "unmasked memory", "full fine-tuning"]
    assert [count for _, count, _ in rows][:3] == ["1,290", "4,490", "4,490"]
    assert re.search(r"\d+ of 24 right", done.stdout)
    with Image.open(tmp_path / "digits" / "predictions.png") as picture:
        assert picture.width > 500
    assert (tmp_path / "digits" / "adapter_model.safetensors").is_file()
