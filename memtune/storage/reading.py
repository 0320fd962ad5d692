"""How files of a folder are read that may be a stranger's: plain files alone, of a limited size, as data."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError

MOST_JSON = 32 * 2**20
"""Bytes of a JSON file at most: a million labels, and more."""

_DTYPES = (torch.float16, torch.float32, torch.bfloat16, torch.float64)
_BYTES = torch.uint8

_PATIENCE = 10.0  # seconds in which a folder that others write to has to stand still for as long as it takes to read it

_FAILURES = 5  # readings of a folder that stands still, after which it is taken for damaged

ReadT = TypeVar("ReadT")


def check_plain(path: Path) -> None:
    """Raise `CheckpointError` unless a path is that of a plain file, and no link but one of the Hub's cache."""
    if path.is_symlink() and not _is_of_hub(path):
        raise CheckpointError(f"{path} is a link, which is not followed; put the file itself in its place")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is no plain file, and is not opened")


def _is_of_hub(path: Path) -> bool:
    """Whether a link is one that huggingface_hub makes: from a snapshot of a repository to one of its blobs."""
    target = path.resolve()
    return target.parent.name == "blobs" and target.parent.parent / "snapshots" in path.absolute().parents


def read_json(path: Path) -> Any:
    """The values of a JSON file.

    Raises:
        CheckpointError: It is no plain file, too large, nested too deeply, or no JSON.
    """
    check_plain(path)
    try:
        if (size := path.stat().st_size) > MOST_JSON:
            raise CheckpointError(f"{path} has {size:,} bytes, more than the {MOST_JSON:,} that are read")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from error


def parse_json(data: bytes, path: Path) -> Any:
    """The values that bytes of a file hold as JSON.

    Raises:
        CheckpointError: They are no JSON, or nested too deeply.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: It is no plain file, damaged, or has a tensor of another type than floating-point numbers, but
            for bytes.
    """
    check_plain(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error
    if wrong := [key for key, tensor in tensors.items() if tensor.dtype not in (*_DTYPES, _BYTES)]:
        raise CheckpointError(
            f"{path}: {wrong[0]!r} is of the type {tensors[wrong[0]].dtype}, expected one of {_DTYPES}"
        )
    return tensors


def read_together(folder: Path, find: Callable[[], Sequence[Path]], read: Callable[[], ReadT]) -> ReadT:
    """Read several files of a folder as they were at one moment, though another process may replace them meanwhile.

    Args:
        folder: The folder, for errors.
        find: Where the files lie at present (see `place_of`), whether they are there or not.
        read: Reads them; called again if they were replaced while it did.

    Raises:
        CheckpointError: What `read` raises while nothing is replaced; or others replaced them all the time.
    """
    end, failed = monotonic() + _PATIENCE, 0
    while True:
        before = _marks(find())
        try:
            value = read()
        except CheckpointError:
            failed += _marks(find()) == before  # a file that is moved to its place meanwhile is the same one
            if failed == _FAILURES:
                raise
        else:
            if _marks(find()) == before:
                return value
        if monotonic() > end:
            raise CheckpointError(f"{folder} was replaced again and again while it was read; try later")
        sleep(0.001)


def _marks(paths: Sequence[Path]) -> list[tuple[int, ...] | None]:
    """What tells each file from another of its name, wherever it lies."""
    marks: list[tuple[int, ...] | None] = []
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            marks.append(None)
        else:
            marks.append((found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size))
    return marks
