"""Reads entries of a trunk cache side by side into one batch: each value is copied once, from its file to its place."""

from __future__ import annotations

import itertools
import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import MemtuneError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "I32": torch.int32}

_ALIGNMENT = 64  # bytes, of each tensor of a batch

_MOST_THREADS = 8  # of one process that read a batch

_LONGEST_HEADER = 1 << 20  # bytes; an entry's has some hundreds


class _Part(NamedTuple):
    """A tensor of an entry, as the header of its safetensors file describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def blocks(self) -> int | None:
        """How many blocks it is of; None where it is of no block."""
        return None if self.name in ("query", "grid") else self.shape[0]

    @property
    def piece(self) -> tuple[int, ...]:
        """The shape of what goes to one tensor of a batch: that of one block."""
        return self.shape if self.blocks is None else self.shape[1:]

    @property
    def piece_bytes(self) -> int:
        """Bytes of that."""
        return math.prod(self.piece) * self.dtype.itemsize


class _Region(NamedTuple):
    """Where one tensor of a batch is: its start, and the bytes of one image."""

    start: int
    piece: int

    def row(self, number: int) -> slice:
        """The bytes of an image."""
        return slice(self.start + number * self.piece, self.start + (number + 1) * self.piece)


class BatchReader:
    """Reads batches of entries.

    The memory of a batch that nothing refers to any more is used for a later one: the system takes longer to hand out
    new memory than to copy into it.
    """

    def __init__(self) -> None:
        self._spare: list[bytearray] = []

    def read(self, paths: Sequence[Path]) -> dict[str, Any]:
        """The entries in some files: `query` (batch, width), all else a list with (batch, ...) for each block.

        Raises:
            MemtuneError: A file is missing, cut, or not of the same shapes as the first.
        """
        rows = len(paths)
        try:
            with paths[0].open("rb", buffering=0) as first:
                parts = _read_header(first)
            regions, size = _arrange(parts, rows)
            memory = self._lend(size)
            places = [[region.row(row) for region in regions] for row in range(rows)]
            _in_threads(partial(_read_entry, parts, memory), paths, places)
        except (OSError, ValueError, KeyError) as error:
            raise MemtuneError(
                f"the trunk cache {paths[0].parent.parent} has been changed during the run ({error}); run again: it "
                "will be recomputed"
            ) from error
        return _tensors(parts, regions, torch.from_numpy(memory), rows)

    def _lend(self, size: int) -> np.ndarray:
        """Memory (size,) in bytes, to be lent again when no tensor made of it is left."""
        memory = self._spare.pop() if self._spare else bytearray()
        if len(memory) < size:
            memory = bytearray(size)
        lent = np.frombuffer(memory, dtype=np.uint8, count=size)
        weakref.finalize(lent, self._spare.append, memory).atexit = False
        return lent


def _read_header(file: Any) -> list[_Part]:
    """The tensors of a safetensors file in their order there; the file then stands at the first."""
    length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER:
        raise ValueError("no safetensors file")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    places = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return [_Part(name, _DTYPES[place["dtype"]], tuple(place["shape"])) for name, place in places]


def _arrange(parts: Sequence[_Part], rows: int) -> tuple[list[_Region], int]:
    """Where the tensors of a batch are in its memory, in the order of an entry; and the bytes of that memory."""
    regions, start = [], 0
    for part in parts:
        for _ in range(part.blocks or 1):
            regions.append(_Region(start, part.piece_bytes))
            start += -(-rows * part.piece_bytes // _ALIGNMENT) * _ALIGNMENT
    return regions, start


def _in_threads(read: Callable[[Path, list[slice]], None], paths: Sequence[Path], places: list[list[slice]]) -> None:
    """Read several files at a time: copying out of the system's file cache keeps a core busy."""
    threads = min(torch.get_num_threads(), _MOST_THREADS, len(paths))
    if threads == 1:
        for each in zip(paths, places, strict=True):
            read(*each)
        return
    with ThreadPoolExecutor(threads) as pool:  # of its own for each batch, as a process that is forked has no threads
        list(pool.map(read, paths, places))  # raises what a thread has raised


def _read_entry(parts: Sequence[_Part], memory: np.ndarray, path: Path, places: Sequence[slice]) -> None:
    """Read what a file has into places of the memory, one after the other."""
    view = memory.data
    with path.open("rb", buffering=0) as file:
        if (found := _read_header(file)) != parts:
            raise ValueError(f"{path.name} has {found}, expected {parts}")
        pieces = [view[place] for place in places]
        read = os.readv(file.fileno(), pieces) if hasattr(os, "readv") else sum(map(file.readinto, pieces))
        if read != sum(map(len, pieces)):
            raise ValueError(f"{path.name} is cut")


def _tensors(parts: Sequence[_Part], regions: Iterable[_Region], memory: Tensor, rows: int) -> dict[str, Any]:
    """The tensors of a batch in its memory, by name."""
    batch: dict[str, Any] = {}
    left = iter(regions)
    for part in parts:
        tensors = [
            memory[region.start : region.start + rows * region.piece].view(part.dtype).view(rows, *part.piece)
            for region in itertools.islice(left, part.blocks or 1)
        ]
        batch[part.name] = tensors[0] if part.blocks is None else tensors
    return batch
