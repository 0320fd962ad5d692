"""examples/serve.py over real HTTP on loopback: answers are the model's own, however requests fall together."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune import LoraConfig, MemoryConfig

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve.py"
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def backbone() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SHAPE, image_size=32, patch_size=8)).eval()


def adapter(config: Any, labels: list[str], seed: int, **options: Any) -> memtune.TunedModel:
    torch.manual_seed(seed)
    model = memtune.wrap(backbone(), config, labels=labels, processor=PROCESSOR, **options)
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def sources() -> dict[str, memtune.TunedModel]:
    return {
        "pets": adapter(MemoryConfig(4), ["cat", "dog", "fox"], 1, masked=True),
        "birds": adapter(LoraConfig(r=2), ["wren", "robin"], 2),
        "colours": adapter(
            LoraConfig(r=2), ["red", "green"], 3, masked=True, problem_type="multi_label_classification"
        ),
    }


def photo(seed: int, kind: str = "png") -> bytes:
    file = BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("serve", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve"] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model() -> memtune.MultiTaskModel:
    return memtune.combine(backbone(), sources())


@pytest.fixture
def address(model: memtune.MultiTaskModel) -> Iterator[str]:
    """A server of the model, with time enough for requests to meet."""
    torch.set_num_threads(1)
    app = load_example().create_app(model, max_batch=8, max_wait=0.05)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)


def call(url: str, data: bytes | None = None, method: str | None = None) -> tuple[int, Any]:
    request = Request(url, data=data, method=method, headers={"Content-Type": "image/png"})
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        return error.code, json.loads(error.read())


def expected(model: memtune.MultiTaskModel, data: bytes, names: list[str], top_k: int) -> dict[str, Any]:
    found: Any = model.predict(Image.open(BytesIO(data)), tasks=names, top_k=top_k)
    return {name: [(each["label"], each["score"]) for each in found[name]] for name in names}


def as_pairs(answers: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [(each["label"], pytest.approx(each["score"], abs=1e-5)) for each in own] for name, own in answers.items()
    }


def test_one_request_of_each_kind(address: str, model: memtune.MultiTaskModel) -> None:
    assert call(f"{address}/health") == (200, {"status": "ok", "tasks": 3})
    assert call(f"{address}/tasks") == (200, model.tasks)
    for query, names, top_k in [
        ("", ["pets", "birds", "colours"], 1),
        ("?task=pets&top_k=2", ["pets"], 2),
        ("?task=colours&task=birds&top_k=9", ["colours", "birds"], 9),
    ]:
        status, answers = call(f"{address}/predict{query}", photo(1))
        assert status == 200
        assert list(answers) == names
        assert expected(model, photo(1), names, top_k) == as_pairs(answers)


def test_requests_that_come_together_share_passes_and_keep_their_own_answers(
    address: str, model: memtune.MultiTaskModel
) -> None:
    names = list(model.tasks)
    asked = [(seed, [names[seed % 3]] if seed % 4 else names[: 1 + seed % 3]) for seed in range(40)]

    def ask(each: tuple[int, list[str]]) -> Any:
        seed, own = each
        return call(f"{address}/predict?top_k=2&" + "&".join(f"task={name}" for name in own), photo(seed))

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, asked))
    for (seed, own), (status, answers) in zip(asked, found, strict=True):
        assert status == 200
        assert expected(model, photo(seed), own, 2) == as_pairs(answers)
    with urlopen(f"{address}/metrics") as response:
        metrics = dict(line.split() for line in response.read().decode().splitlines())
    assert float(metrics["memtune_images_total"]) == 40
    assert float(metrics["memtune_batches_total"]) < 30


def test_tasks_come_and_go(address: str, model: memtune.MultiTaskModel, tmp_path: Path) -> None:
    adapter(MemoryConfig(2), ["stop", "go"], 5, masked=True).save_pretrained(tmp_path / "signs")
    put = f"{address}/tasks/signs?adapter={quote(str(tmp_path / 'signs'))}"
    assert call(put, method="PUT") == (200, {"signs": ["stop", "go"]})
    status, answers = call(f"{address}/predict?task=signs", photo(3))
    assert (status, expected(model, photo(3), ["signs"], 1)) == (200, as_pairs(answers))
    assert call(put, method="PUT")[0] == 409
    assert call(f"{address}/tasks/signs", method="DELETE") == (200, {"removed": "signs"})
    assert call(f"{address}/predict?task=signs", photo(3))[0] == 404
    assert call(f"{address}/tasks/signs", method="DELETE")[0] == 404
    status, answer = call(f"{address}/tasks/none?adapter={quote(str(tmp_path / 'nowhere'))}", method="PUT")
    assert status == 422
    assert "nowhere" in answer["detail"]
    other = adapter(MemoryConfig(2), ["stop", "go"], 5, masked=True)
    other.processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.1, 0.1])
    other.save_pretrained(tmp_path / "other")
    status, answer = call(f"{address}/tasks/other?adapter={quote(str(tmp_path / 'other'))}", method="PUT")
    assert status == 422
    assert "image_processor" in answer["detail"]
    assert list(model.tasks) == ["pets", "birds", "colours"]


def test_wrong_requests(address: str) -> None:
    assert call(f"{address}/predict?task=fish", photo(1))[0] == 404
    assert call(f"{address}/predict?top_k=0", photo(1))[0] == 422
    for data in (b"no image", b"", photo(1)[:100]):
        assert call(f"{address}/predict", data)[0] == 422
    assert call(f"{address}/predict", photo(1, "jpeg"))[0] == 200  # and it goes on


@pytest.mark.slow
def test_as_a_user_starts_it(tmp_path: Path) -> None:
    backbone().save_pretrained(tmp_path / "backbone")
    sources()["pets"].save_pretrained(tmp_path / "pets")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLE), "--backbone", str(tmp_path / "backbone"), "--port", str(port)]
    server = subprocess.Popen([*command, "--adapter", f"pets={tmp_path / 'pets'}"], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                assert call(f"http://127.0.0.1:{port}/health") == (200, {"status": "ok", "tasks": 1})
                break
            except OSError:
                assert time.monotonic() < end
                assert server.poll() is None
                time.sleep(0.2)
        status, answers = call(f"http://127.0.0.1:{port}/predict", photo(1))
        assert status == 200
        assert list(answers) == ["pets"]
    finally:
        server.terminate()
        server.wait(30)
