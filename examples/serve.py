"""Serve many tasks on one frozen backbone over HTTP; requests that come at about the same time share a pass.

    pip install fastapi uvicorn
    python examples/serve.py --backbone google/vit-base-patch16-224-in21k --adapter pets=pets-lora \\
        --adapter signs=me/vit-signs-memory

    curl http://127.0.0.1:8000/tasks
    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/predict?task=pets&top_k=3'
    curl -X PUT 'http://127.0.0.1:8000/tasks/flowers?adapter=me/vit-flowers-lora'
    curl -X DELETE http://127.0.0.1:8000/tasks/flowers

`/predict` takes the bytes of an image, and answers by the tasks that are named, by default all of them. Where each of
the requests of a pass asks for one task, it is a mixed batch (`rows=`). `/health` and `/metrics` are for who watches
over it. Whoever can reach the server can add adapters: it listens on this machine alone unless `--host` says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import Body, FastAPI, HTTPException, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import AutoModelForImageClassification

import memtune
from memtune.models import TaskScores

Answers = dict[str, Tensor]
"""Of one image the logits (classes,) of each task that it was asked for."""

Run = Callable[[Tensor, Sequence[tuple[str, ...]]], list[Answers]]
"""Gives the answers to images (batch, channels, height, width) by the tasks that each asks for."""


@dataclass
class Request:
    """An image that waits for its answers.

    Attributes:
        pixel_values: The image, (1, channels, height, width).
        tasks: The tasks that it asks for.
        answers: Set when they are there.
    """

    pixel_values: Tensor
    tasks: tuple[str, ...]
    answers: asyncio.Future[Answers]


def answer(model: memtune.MultiTaskModel, pixel_values: Tensor, tasks: Sequence[tuple[str, ...]]) -> list[Answers]:
    """The answers to a batch of images, each by the tasks that it asks for, from one pass."""
    pixel_values = pixel_values.to(model.device, model.dtype)
    if all(len(own) == 1 for own in tasks):
        mixed = model(pixel_values, rows=[own[0] for own in tasks])
        return [{own[0]: each.logits[0]} for own, each in zip(tasks, mixed, strict=True)]
    output = model(pixel_values, tasks=list(dict.fromkeys(name for own in tasks for name in own)))
    return [{name: output[name].logits[row] for name in own} for row, own in enumerate(tasks)]


class Batches:
    """Puts requests together to batches, and answers them one batch after the other.

    Args:
        run: Answers a batch.
        most: Images in a batch at most.
        wait: Seconds that the first of a batch waits for others.
    """

    def __init__(self, run: Run, *, most: int, wait: float) -> None:
        self.count: dict[str, float] = {"batches": 0, "images": 0, "seconds": 0.0}
        self._run = run
        self._most = most
        self._wait = wait
        self._waiting: asyncio.Queue[Request] = asyncio.Queue()
        self._worker = ThreadPoolExecutor(1)

    async def ask(self, pixel_values: Tensor, tasks: tuple[str, ...]) -> Answers:
        """The answers to one image, (1, channels, height, width)."""
        request = Request(pixel_values, tasks, asyncio.get_running_loop().create_future())
        await self._waiting.put(request)
        return await request.answers

    async def work(self) -> None:
        """Answer requests until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._collect()
            images = torch.cat([each.pixel_values for each in batch])
            start = time.perf_counter()
            try:
                answers = await loop.run_in_executor(self._worker, self._run, images, [each.tasks for each in batch])
            except Exception as error:  # noqa: BLE001 - of whatever kind, it is those who wait that have to know
                for each in batch:
                    if not each.answers.done():
                        each.answers.set_exception(error)
                continue
            for name, more in (("batches", 1), ("images", len(batch)), ("seconds", time.perf_counter() - start)):
                self.count[name] += more
            for each, own in zip(batch, answers, strict=True):
                if not each.answers.done():  # its client may have gone
                    each.answers.set_result(own)

    async def _collect(self) -> list[Request]:
        """The next batch: images of one size."""
        batch = [await self._waiting.get()]
        end = time.monotonic() + self._wait
        while len(batch) < self._most:
            try:
                request = await asyncio.wait_for(self._waiting.get(), max(end - time.monotonic(), 0))
            except asyncio.TimeoutError:  # another one than the built-in in Python 3.10
                break
            if request.pixel_values.shape != batch[0].pixel_values.shape:
                await self._waiting.put(request)
                break
            batch.append(request)
        return batch


def read_image(data: bytes) -> Image.Image:
    """The picture that the bytes of a file hold, upright.

    Raises:
        HTTPException: They hold none.
    """
    try:
        return ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise HTTPException(422, f"the body is no image: {error}") from error


class Service:
    """What the server answers with.

    Args:
        model: The model; its tasks may come and go.
        batches: What answers by it.
    """

    def __init__(self, model: memtune.MultiTaskModel, batches: Batches) -> None:
        self._model = model
        self._batches = batches

    async def health(self) -> dict[str, Any]:
        """Whether it answers."""
        return {"status": "ok", "tasks": len(self._model.tasks)}

    async def metrics(self) -> str:
        """Counts since the start, as Prometheus reads them."""
        lines = [f"memtune_{name}_total {value}" for name, value in self._batches.count.items()]
        return "\n".join([*lines, f"memtune_tasks {len(self._model.tasks)}", ""])

    async def tasks(self) -> dict[str, list[str]]:
        """The labels of each task."""
        return self._model.tasks

    async def add(self, name: str, adapter: str) -> dict[str, list[str]]:
        """Add a task: a folder of the server's, or the id of a repository on the Hub."""
        try:
            await run_in_threadpool(self._add, name, adapter)
        except memtune.MemtuneError as error:
            raise HTTPException(409 if name in self._model.tasks else 422, str(error)) from error
        return {name: self._model.tasks[name]}

    def _add(self, name: str, adapter: str) -> None:
        self._model.add_task(name, adapter)
        try:
            self._model.shared_processor()  # an image is prepared once for all tasks
        except memtune.MemtuneError:
            self._model.remove_task(name)
            raise

    async def remove(self, name: str) -> dict[str, str]:
        """Take a task out."""
        self._known([name])
        self._model.remove_task(name)
        return {"removed": name}

    async def predict(
        self,
        image: Annotated[bytes, Body(media_type="image/*")],
        task: Annotated[list[str] | None, Query()] = None,
        top_k: Annotated[int, Query(ge=1)] = 1,
    ) -> dict[str, list[dict[str, Any]]]:
        """The best labels of some tasks, or of all, for the image whose file is the body."""
        names, there = self._known(task or []), self._model.arrangement.tasks
        picture = await run_in_threadpool(read_image, image)
        processor = partial(self._model.shared_processor(), return_tensors="pt")
        pixel_values = (await run_in_threadpool(processor, picture)).pixel_values
        try:
            answers = await self._batches.ask(pixel_values, names)
        except memtune.MemtuneError as error:  # a task that has been removed meanwhile
            raise HTTPException(409, str(error)) from error
        return {name: TaskScores(there[name], logits[None]).best(top_k)[0] for name, logits in answers.items()}

    def _known(self, names: Sequence[str]) -> tuple[str, ...]:
        """The tasks that are asked for; without names all that have labels."""
        there = self._model.tasks
        if unknown := [name for name in names if name not in there]:
            raise HTTPException(404, f"there are no tasks {unknown}; there are {sorted(there)}")
        asked = tuple(dict.fromkeys(names)) or tuple(name for name, labels in there.items() if labels)
        if not asked:
            raise HTTPException(409, "there is no task; add one first")
        return asked


def create_app(
    model: memtune.MultiTaskModel, *, max_batch: int = 32, max_wait: float = 0.005, run: Run | None = None
) -> FastAPI:
    """The application that serves a model.

    Args:
        model: The model; its tasks may come and go.
        max_batch: Images in a pass at most.
        max_wait: Seconds that the first image of a pass waits for others.
        run: What answers a batch, in place of the model.
    """
    batches = Batches(run or partial(answer, model), most=max_batch, wait=max_wait)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batches.work())
        yield
        worker.cancel()

    app, service = FastAPI(title="memtune", lifespan=running), Service(model, batches)
    app.get("/health")(service.health)
    app.get("/metrics", response_class=PlainTextResponse)(service.metrics)
    app.get("/tasks")(service.tasks)
    app.put("/tasks/{name}")(service.add)
    app.delete("/tasks/{name}")(service.remove)
    app.post("/predict")(service.predict)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", required=True, help="the frozen model: a folder, or a name on the Hub")
    add("--adapter", action="append", default=[], metavar="NAME=ADAPTER", help="a task and its adapter; any number")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--max_batch", type=int, default=32, help="images in a pass at most (%(default)s)")
    add("--max_wait", type=float, default=0.005, help="seconds that an image waits for others (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    adapters = dict(each.split("=", 1) for each in args.adapter)
    backbone = AutoModelForImageClassification.from_pretrained(args.backbone).to(args.device)
    model = memtune.combine(backbone, adapters)
    uvicorn.run(create_app(model, max_batch=args.max_batch, max_wait=args.max_wait), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
