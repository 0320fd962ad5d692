"""A Hub of its own for each test, which huggingface_hub takes for the only one; `conftest.py` has it for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from hub_server import Hub, running
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from transformers import ViTConfig, ViTForImageClassification

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited, which the tests do not."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: list[float]) -> Iterator[Hub]:
    """A Hub of its own, which huggingface_hub in this process takes for the only one, and a user who may write."""
    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", "writer")
        monkeypatch.chdir(tmp_path)
        huggingface_hub.utils.disable_progress_bars()
        close_session()
        yield server
        close_session()
        huggingface_hub.utils.enable_progress_bars()


@cache
def backbone() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8)).eval()
