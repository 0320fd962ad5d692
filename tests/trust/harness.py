"""What the trials of tests/trust share: artefacts of every kind, changes of files, and a watch over a call."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune import LoraConfig, MemoryConfig, SideNetworkConfig, TrainingConfig
from memtune.continual import ContinualTask, fit_continual
from memtune.errors import MemtuneError
from memtune.peft_format import export_peft

PIXELS = 16
QUICK = {"max_steps": 2, "per_device_train_batch_size": 8, "disable_tqdm": True}


def backbone() -> ViTForImageClassification:
    """Two blocks, 16 wide."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(**shape, image_size=PIXELS, patch_size=8, num_labels=2)).eval()


def processor() -> Any:
    """For images of the backbone's size."""
    return ViTImageProcessorPil(size={"height": PIXELS, "width": PIXELS})


def items(count: int = 16) -> list[dict[str, Any]]:
    """Bright and dark images."""
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, PIXELS, PIXELS, generator=noise)
    return [{"pixel_values": image + 3 * (i % 2) - 1.5, "labels": i % 2} for i, image in enumerate(images)]


def run_settings(folder: Path) -> TrainingConfig:
    """Of the run whose first checkpoint is among the artefacts."""
    return TrainingConfig(output_dir=folder, save_strategy="steps", save_steps=1, **QUICK)


def train_from_cache(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Two steps from a trunk cache; the values they give."""
    torch.manual_seed(0)
    tuned = memtune.wrap(model, MemoryConfig(1), num_labels=2, masked=True)
    try:
        memtune.fit(tuned, items(8), None, TrainingConfig(trunk_cache=folder, **QUICK))
        return {key: tensor.clone() for key, tensor in tuned.task.tensors().items()}
    finally:
        tuned.detach()


def search(model: Any, folder: Path) -> Any:
    """Two trials of one step, and a final run."""
    training = TrainingConfig(**QUICK | {"max_steps": 1})
    space = {"learning_rate": [1e-3, 1e-2]}
    options = {"output_dir": folder, "training": training, "n_trials": 2, "seeds": (0,)}
    return memtune.sweep(model, MemoryConfig(1), space, items(12), items(4), **options)


class Stop(Exception):
    """Ends a run."""


class Stopping(list):
    """Data that end a run when they are read."""

    def __getitem__(self, index: Any) -> Any:
        raise Stop


def learn(model: Any, folder: Path, stop_after: int | None = None) -> Any:
    """Two classes, one after the other; stopped before a task, or as far as it goes."""
    tuned = memtune.wrap(model, MemoryConfig(1), num_labels=2)
    groups = [[each for each in items(8) if each["labels"] == label] for label in range(2)]
    data = [Stopping(group) if number == stop_after else group for number, group in enumerate(groups)]
    tasks = [ContinualTask([label], data[label], groups[label]) for label in range(2)]
    try:
        return fit_continual(tuned, tasks, TrainingConfig(**QUICK | {"max_steps": 1}), output_dir=folder)
    except Stop:
        return None
    finally:
        tuned.detach()


ADAPTERS: dict[str, tuple[list[Any], bool]] = {
    "memory": ([MemoryConfig(2)], True),
    "lora": ([LoraConfig(r=2)], False),
    "prompts": ([memtune.ApproximatedPromptConfig(2)], False),
    "coda": ([memtune.CodaPromptConfig(pool_size=4, blocks=None)], False),
    "side": ([MemoryConfig(1), SideNetworkConfig(width=4)], True),
    "pooled": ([SideNetworkConfig(width=4, readout="pool")], True),
}


def make_artefacts(place: Path) -> None:
    """One of each kind that memtune reads, in folders of their names."""
    model, tuned = backbone(), {}
    for name, (methods, masked) in ADAPTERS.items():
        tuned[name] = memtune.wrap(model, methods, labels=["a", "b"], masked=masked, processor=processor())
        tuned[name].save_pretrained(place / name)
    memtune.combine(model, {name: tuned[name] for name in ("memory", "lora", "side")}).save_pretrained(place / "all")
    export_peft(tuned["lora"], place / "peft")
    trained = memtune.wrap(model, MemoryConfig(2), num_labels=2, masked=True)
    memtune.fit(trained, items(), None, run_settings(place / "run"))
    shutil.rmtree(place / "run" / "checkpoint-2")
    train_from_cache(model, place / "cache")
    search(model, place / "search")
    learn(model, place / "continual", stop_after=1)
    (place / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg", "c.gif", "d.tif", "e.webp", "f.bmp", "g.ppm"):
        Image.fromarray(noise).save(place / "images" / name)


# Changes


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("nan"),
    "",
    "\ud800",
    "\x1b[2J",
    "../../x",
    "/etc/passwd",
]
ODD += ["a" * 5000, [], {}, [[]], [{}], {"": None}, [None], "float32", "NaN", ["a", "a"], -1.5]


def change_bytes(path: Path, luck: random.Random) -> None:
    """Flip, cut, double or replace bytes."""
    data = bytearray(path.read_bytes())
    for _ in range(luck.choice((1, 1, 2, 8))):
        at = luck.randrange(len(data) + 1)
        how = luck.randrange(5)
        if how == 0 and data:
            data[at % len(data)] ^= 1 << luck.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            del data[at : at + luck.choice((1, 4, 64))]
        elif how == 3:
            data[at:at] = luck.randbytes(luck.choice((1, 8, 300)))
        else:
            data[at : at + 8] = struct.pack("<Q", luck.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
    path.write_bytes(data)


def change_json(path: Path, luck: random.Random) -> None:
    """Put something odd into a JSON file, take something away, or make it deep."""
    values = json.loads(path.read_text())
    for _ in range(luck.choice((1, 1, 1, 3))):
        spots = list(_spots(values))
        holder, key = luck.choice(spots)
        how = luck.randrange(4)
        if how == 0 and isinstance(holder, dict):
            holder.pop(key, None)
        elif how == 1 and isinstance(holder, list):
            holder.append(luck.choice(ODD))
        elif how == 2:
            holder[key] = luck.choice(spots)[0]
        else:
            holder[key] = luck.choice(ODD)
    try:
        text = json.dumps(values)
    except (ValueError, RecursionError):  # it holds itself by now
        text = '{"a": ' * 100_000
    path.write_text(text)


def _spots(values: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every place in JSON values, as its holder and key."""
    keys = list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    for key in keys:
        yield values, key
        if depth < 6:
            yield from _spots(values[key], depth + 1)


def change_tensors(path: Path, luck: random.Random) -> None:
    """Other shapes, types, names or values in a safetensors file."""
    tensors = safetensors.torch.load_file(path)
    key = luck.choice(list(tensors))
    how = luck.randrange(7)
    if how == 0:
        tensors[luck.choice(["", "x", "\ud7ff", "blocks.9.memory", "backbone.vit.layernorm.bias"])] = tensors.pop(
            key
        ).clone()
    elif how == 1:
        del tensors[key]
    elif how == 2:
        tensors[key] = torch.full_like(tensors[key], luck.choice([float("nan"), float("inf"), 1e38]))
    elif how == 3:
        tensors[key] = torch.full(tensors[key].shape, 1e300, dtype=torch.float64)
    elif how == 4:
        kinds = [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
        tensors[key] = tensors[key].to(luck.choice(kinds))
    elif how == 5:
        tensors[key] = torch.zeros(luck.choice([(), (0,), (1, 1, 1, 1), (3,), (2, 0), (64, 64)]))
    else:
        tensors["backbone.x"] = torch.zeros(3)
    safetensors.torch.save_file({name: each.contiguous() for name, each in tensors.items()}, path)


def change_header(path: Path, luck: random.Random) -> None:
    """Put something odd into the header of a safetensors file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    holder, key = luck.choice(list(_spots(header)))
    holder[key] = luck.choice([*ODD, [0, 2**40], [4, 0], [2**31, 2**31], "F64", "I8"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_place(path: Path, luck: random.Random) -> None:
    """Something else in the place of a file: nothing, a folder, a link, a FIFO."""
    path.unlink()
    how = luck.randrange(7)
    if how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(path.parent)
    elif how == 3:
        path.symlink_to("/dev/zero")
    elif how == 4:
        os.mkfifo(path)
    elif how == 5:
        path.write_bytes(b"")
    elif how == 6:
        path.symlink_to(SECRET)


SECRET = Path("/etc/hostname")
"""A plain file that nobody asked to read."""


def change(folder: Path, luck: random.Random) -> None:
    """Change one file of a folder, or two."""
    for _ in range(luck.choice((1, 1, 1, 2))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            return
        path = luck.choice(files)
        kinds: list[Callable[[Path, random.Random], None]] = [change_bytes, change_place]
        kinds += {".json": [change_json] * 6, ".safetensors": [change_tensors, change_header] * 2}.get(path.suffix, [])
        with contextlib.suppress(Exception):
            luck.choice(kinds)(path, luck)  # of a file that the change before has spoilt some cannot be made


# The watch


class Hang(BaseException):
    """A call took too long. No `Exception`, so that nobody takes it for a file's fault."""


@dataclass
class Outcome:
    """What came of a call.

    Attributes:
        kind: "ok", "refused" (a MemtuneError), "raw" (another exception), "hang".
        text: The exception, and the lines it came from.
        events: What the call did that none may do.
        grown: Megabytes that the process has grown at its highest.
        most: How many it may.
        seconds: How long it took.
    """

    kind: str
    text: str = ""
    events: list[str] = field(default_factory=list)
    grown: float = 0.0
    most: float = 300.0
    seconds: float = 0.0

    @property
    def fault(self) -> str:
        """What is wrong with it; empty if nothing is."""
        if self.kind in ("raw", "hang"):
            return f"{self.kind}: {self.text}"
        if self.events:
            return f"forbidden: {self.events[:3]}"
        return f"grew by {self.grown:.0f} MB" if self.grown > self.most else ""


class Watch:
    """Looks at what calls do, through Python's audit hook, which stays for as long as the process.

    Attributes:
        most: Megabytes that a call may take.

    Args:
        own: The folder that calls may write to.
        limit: Seconds that a call may take.
    """

    FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def __init__(self, own: Path, limit: float = 5.0) -> None:
        self._own = (str(own.resolve()), "/dev/", str(Path.home() / ".cache" / "huggingface" / "metrics"))
        self._limit = limit
        self.most = 300.0
        self._events: list[str] | None = None
        sys.addaudithook(self._hear)
        signal.signal(signal.SIGALRM, self._ring)

    def _hear(self, event: str, values: tuple[Any, ...]) -> None:
        if self._events is None:
            return
        if event == "open" and not isinstance(values[0], int) and values[0] is not None:
            path, flags = os.path.abspath(os.fsdecode(values[0])), values[2]  # noqa: PTH100 - pathlib would be heard, too
            if (flags & self.WRITING and not path.startswith(self._own)) or path == str(SECRET):
                self._events.append(f"open {path}")
        elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate", "shutil.rmtree"):
            path = os.fsdecode(values[0]) if isinstance(values[0], (str, bytes, os.PathLike)) else "/dev/"
            if os.path.isabs(path) and not path.startswith(self._own):  # noqa: PTH117 - a name alone is within a folder
                self._events.append(f"{event} {path}")
        elif event in self.FORBIDDEN and not (event == "pickle.find_class" and values[0] in ("torch", "collections")):
            self._events.append(f"{event} {str(values)[:100]}")
        elif event == "import" and str(values[1] or "").startswith(self._own):
            self._events.append(f"import {values[1]}")

    def _ring(self, *arguments: Any) -> None:
        if self._events is not None:
            raise Hang

    def call(self, function: Callable[[], Any]) -> Outcome:
        """Run something and look at it."""
        Path("/proc/self/clear_refs").write_text("5")  # the highest size from now on
        before, begun = _status("VmRSS"), time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, self._limit)
        self._events = events = []
        kind, text = "ok", ""
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                function()
        except MemtuneError as error:
            kind, text = "refused", str(error)
        except Hang as error:
            kind, text = "hang", _origin(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is looked at
            kind, text = "raw", f"{type(error).__name__}: {str(error)[:300]} {_origin(error)}"
        finally:
            self._events = None
            signal.setitimer(signal.ITIMER_REAL, 0)
        grown = (_status("VmHWM") - before) / 1024
        return Outcome(kind, text, events, grown, self.most, time.monotonic() - begun)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _origin(error: BaseException) -> str:
    """The lines of memtune's, and the last one, that an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/memtune/" in frame.filename][-2:]
    return " <- ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*own, *frames[-1:]])
