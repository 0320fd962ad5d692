"""Processes that are killed while they save, readers beside a writer, and threads that share models: `make soak`.

    python tests/trust/soak.py --kills 250 --reads 100000 --answers 50000

What a killed process leaves, and what a reader finds at any moment, is one save as a whole, never parts of two. What a
thread gets is what it asked for, whatever others do with the model meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
from harness import PIXELS, backbone, processor

import memtune
from memtune import LoraConfig, MemoryConfig, SideNetworkConfig
from memtune.storage import AdapterFolder, read_collection, read_folder

MODEL = backbone()
GENERATIONS = ({"x": 0.0, "y": 0.0, "w w": 0.0}, {"y": 1.0, "x": 1.0}, {"w/w": 2.0, "w w": 2.0, "x": 2.0})
"""Tasks and the value that everything of them has, for each of the saves that follow each other."""


def tuned(value: float) -> memtune.TunedModel:
    """A model in which every trained value, and the label, is one number; every second one has a processor."""
    chosen = processor() if int(value) % 2 else None
    model = memtune.wrap(MODEL, MemoryConfig(2), labels=[f"label {value}"], masked=True, processor=chosen)
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.fill_(value)
    return model


def save_alone() -> Callable[[int, Path], None]:
    """What saves a single adapter."""
    models = [tuned(float(number)) for number in range(len(GENERATIONS))]
    return lambda turn, folder: models[turn % len(models)].save_pretrained(folder)


def read_alone(folder: Path) -> None:
    """Raise `AssertionError` unless a folder has one adapter of one save."""
    check_adapter(read_folder(folder))


def check_adapter(adapter: AdapterFolder) -> float:
    """The one value of an adapter, whose label and processor must be those of the same save."""
    values = {float(each) for tensor in adapter.tensors.values() for each in tensor.flatten()}
    assert adapter.labels == [f"label {value}" for value in values], (adapter.labels, values)
    (value,) = values
    assert (adapter.processor is not None) == bool(int(value) % 2)
    return value


def save_many() -> Callable[[int, Path], None]:
    """What saves a model of several tasks, whose names, order and number change."""
    models = [memtune.combine(MODEL, {name: tuned(value) for name, value in each.items()}) for each in GENERATIONS]
    return lambda turn, folder: models[turn % len(models)].save_pretrained(folder)


def read_many(folder: Path) -> None:
    """Raise `AssertionError` unless a folder has all tasks of one save, and no other one."""
    found = {name: check_adapter(adapter) for name, adapter in read_collection(folder).items()}
    assert found in GENERATIONS, found


@contextlib.contextmanager
def writer(save: Callable[[int, Path], None], folder: Path) -> Iterator[int]:
    """A process that saves without a pause; its number."""
    pid = os.fork()
    if pid == 0:
        try:
            for turn in itertools.count():
                save(turn, folder)
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"


def kill_writers(save: Callable[[int, Path], None], read: Callable[[Path], None], count: int) -> None:
    """Kill a process that saves, at a random moment, again and again, and read what it has left."""
    luck = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        save(0, Path(name))
        for _ in range(count):
            with writer(save, Path(name)):
                time.sleep(luck.uniform(0.001, 0.08))
            read(Path(name))
        save(0, Path(name))
        left = [path.name for path in Path(name).rglob(".memtune*")]
        assert not left, left


def read_beside(save: Callable[[int, Path], None], read: Callable[[Path], None], count: int) -> None:
    """Read a folder again and again while a process writes to it."""
    with tempfile.TemporaryDirectory() as name:
        save(0, Path(name))
        with writer(save, Path(name)):
            for _ in range(count):
                read(Path(name))


class Sharing:
    """Two models that many threads ask, while modes, tasks and contexts change."""

    def __init__(self) -> None:
        self.images = torch.randn(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
        methods = {"memory": [MemoryConfig(2)], "lora": [LoraConfig(r=2)], "side": [SideNetworkConfig(width=4)]}
        self.made = {name: memtune.wrap(MODEL, each, labels=["a", "b"], masked=True) for name, each in methods.items()}
        for number, each in enumerate(self.made.values()):
            torch.manual_seed(number)
            with torch.no_grad():
                for parameter in each.task.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
            each.eval()
        self.both = memtune.combine(MODEL, dict(self.made))
        self.alone = self.made["memory"]
        with torch.no_grad():
            self.base = MODEL(self.images).logits
            self.wanted = {name: each(self.images).logits for name, each in self.made.items()}
        self.wrong: list[str] = []
        self.answers = 0

    def check(self, got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """Write down an answer that is not the expected one."""
        if not torch.allclose(got, expected, atol=1e-5):
            self.wrong.append(what)

    def ask_one(self, luck: random.Random) -> None:
        """Ask the model of one task, with its adapter or without."""
        if luck.randrange(2):
            self.check(self.alone(self.images).logits, self.wanted["memory"], "alone")
        else:
            with self.alone.disable_adapter():
                self.check(self.alone(self.images).logits, self.base, "without the adapter")

    def ask_rows(self, luck: random.Random) -> None:
        """Ask for one task of each image."""
        rows = luck.choices(list(self.wanted), k=2)
        for row, (name, output) in enumerate(zip(rows, self.both(self.images, rows=rows), strict=True)):
            self.check(output.logits[0], self.wanted[name][row], "rows")

    def ask_some(self, luck: random.Random) -> None:
        """Ask for some tasks of all images."""
        names = luck.sample(list(self.wanted), luck.randrange(1, 4))
        output = self.both(self.images, tasks=names)
        self.check(output.base.logits, self.base, "base")
        for name in names:
            self.check(output[name].logits, self.wanted[name], name)

    def ask(self, stop: threading.Event, number: int) -> None:
        """What a thread does."""
        luck = random.Random(number)
        try:
            with torch.no_grad():
                while not stop.is_set():
                    luck.choice((self.ask_one, self.ask_rows, self.ask_some))(luck)
                    self.answers += 1
        except Exception as error:  # noqa: BLE001 - which nobody would see
            self.wrong.append(repr(error))

    def disturb(self, stop: threading.Event) -> None:
        """What another thread does meanwhile."""
        for turn in itertools.count():
            if stop.is_set():
                return
            self.alone.train(turn % 2 == 0)
            if turn % 2:
                self.both.remove_task("more")
            else:
                self.both.add_task("more", self.made["lora"])
            time.sleep(0.001)


def share(answers: int, threads: int) -> None:
    """Let many threads ask, until there are so many answers."""
    sharing, stop = Sharing(), threading.Event()
    sys.setswitchinterval(1e-5)
    running = [threading.Thread(target=sharing.ask, args=(stop, number)) for number in range(threads)]
    running.append(threading.Thread(target=sharing.disturb, args=(stop,)))
    for each in running:
        each.start()
    while sharing.answers < answers and not sharing.wrong and all(each.is_alive() for each in running):
        time.sleep(0.05)
    stop.set()
    for each in running:
        each.join()
    assert not sharing.wrong, sharing.wrong[:5]
    assert sharing.answers >= answers


def main() -> None:
    """Run what is asked for, and say what it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=250)
    parser.add_argument("--reads", type=int, default=100_000)
    parser.add_argument("--answers", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=32)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    trials: dict[str, Callable[[], Any]] = {
        f"{options.kills} kills while an adapter is saved": lambda: kill_writers(
            save_alone(), read_alone, options.kills
        ),
        f"{options.kills} kills while many are saved": lambda: kill_writers(save_many(), read_many, options.kills),
        f"{options.reads} reads of an adapter": lambda: read_beside(save_alone(), read_alone, options.reads),
        f"{options.reads // 10} reads of many": lambda: read_beside(save_many(), read_many, options.reads // 10),
        f"{options.answers} answers to {options.threads} threads": lambda: share(options.answers, options.threads),
    }
    for name, trial in trials.items():
        begun = time.monotonic()
        trial()
        print(f"{name}: none wrong, in {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
