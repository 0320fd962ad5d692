"""examples/demo.py: the page's answers are the model's own, and a browser shows them."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune import LoraConfig, MemoryConfig, SideNetworkConfig

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
gradio = pytest.importorskip("gradio")

EXAMPLE = Path(__file__).parents[2] / "examples" / "demo.py"
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

# gradio's and starlette's own, when they are imported and when a server of theirs starts and stops
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def _loops() -> Iterator[None]:
    """Event loops that gradio leaves open end here, not in another test, where they would count as its fault."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.set_event_loop(None)
        gc.collect()


@pytest.fixture(scope="module")
def demo() -> Any:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo"]


@pytest.fixture(scope="module")
def both() -> memtune.MultiTaskModel:
    torch.manual_seed(0)
    names = {0: "animal", 1: "thing"}
    config = ViTConfig(**SHAPE, image_size=32, patch_size=8, id2label=names)
    backbone = ViTForImageClassification(config).eval()
    tasks = {}
    for name, (adapters, labels, masked) in {
        "pets": ([MemoryConfig(4), SideNetworkConfig(4)], ["cat", "dog", "fox", "owl"], True),
        "pooled": (SideNetworkConfig(4, readout="pool"), ["day", "night"], True),
        "birds": (LoraConfig(r=2), ["wren", "robin"], False),
    }.items():
        tasks[name] = memtune.wrap(backbone, adapters, labels=labels, masked=masked, processor=PROCESSOR)
        for parameter in tasks[name].task.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return memtune.combine(backbone, tasks)


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def test_the_page_shows_what_the_model_answers(demo: Any, both: memtune.MultiTaskModel) -> None:
    page = demo.Page(both)
    *scores, base, looks, times = page.show(photo())
    pixel_values = PROCESSOR(photo(), return_tensors="pt").pixel_values
    with torch.no_grad():
        output = both(pixel_values)
    for name, shown in zip(page.tasks, scores, strict=True):
        expected = output[name].logits[0].softmax(dim=-1)
        assert len(shown) == min(demo.BEST, len(both.tasks[name]))
        for label, score in shown.items():
            assert score == pytest.approx(float(expected[both.tasks[name].index(label)]), abs=1e-5)
    logits = both.backbone(pixel_values).logits[0].softmax(dim=-1).tolist()
    assert base == {"animal": pytest.approx(logits[0], abs=1e-5), "thing": pytest.approx(logits[1], abs=1e-5)}
    assert [name for _, name in looks] == ["pets", "birds"]  # pooled reads no token
    assert "All 3 tasks" in times


def test_without_an_image_nothing_is_shown(demo: Any, both: memtune.MultiTaskModel) -> None:
    assert demo.Page(both).show(None) == [None] * 5 + [""]


@pytest.mark.slow
def test_in_a_browser(demo: Any, both: memtune.MultiTaskModel, tmp_path: Path) -> None:
    """An image is dropped, and the answers of all tasks come up."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    photo().save(tmp_path / "photo.png")
    blocks = demo.create_page(both)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(address)
            page.set_input_files("input[type=file]", str(tmp_path / "photo.png"), timeout=60_000)
            page.get_by_text("one pass:").wait_for(timeout=60_000)
            text = page.inner_text("body")
            browser.close()
    finally:
        blocks.close()
    expected = both.predict(photo(), top_k=1)
    for name, answers in expected.items():
        assert name in text
        assert answers[0]["label"] in text
    assert "the backbone itself, untouched" in text
