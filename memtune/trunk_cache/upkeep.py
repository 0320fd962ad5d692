"""What lies in the folder of a trunk cache: what it is of, whether it is whole, and making room."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .store import is_whole

_CONTEXT = re.compile(r"[0-9a-f]{32}")
_PART = re.compile(r"[0-9a-f]{2}")
_ENTRY = re.compile(r"[0-9a-f]+\.safetensors")
DESCRIBED = "context.json"
_DAY = 24 * 3600


@dataclass(frozen=True)
class CacheFolder:
    """The entries of one backbone, processor, size and precision.

    Attributes:
        path: Where they are.
        context: All that they depend on beside the images; nothing where the folder does not say it.
        images: How many there are.
        bytes: What they take.
        written: When the last of them was written, in seconds since 1970.
    """

    path: Path
    context: dict[str, Any]
    images: int
    bytes: int
    written: float

    @property
    def backbone(self) -> str:
        """The backbone's family, and the first digits of its weights' digest."""
        described = self.context.get("backbone")
        family = described.get("family") if isinstance(described, dict) else None
        return f"{family or 'unknown'} {str(self.context.get('weights', ''))[:8]}".strip()

    @property
    def days(self) -> float:
        """How long ago the last of them was written."""
        return max(time.time() - self.written, 0) / _DAY


def list_folders(directory: str | Path) -> list[CacheFolder]:
    """What lies in the folder of a trunk cache, the newest first.

    Raises:
        ConfigError: It is none.
    """
    directory = Path(directory)
    found = [_describe(path) for path in _contexts(directory)]
    if not found and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"got {str(directory)!r}, expected the folder of a trunk cache")
    return sorted(found, key=lambda each: -each.written)


def find_damaged(directory: str | Path) -> list[Path]:
    """The entries that are not whole, for which each is read.

    Raises:
        ConfigError: It is no folder of a trunk cache.
    """
    return [entry for each in list_folders(directory) for entry in _entries(each.path) if not is_whole(entry)]


def prune(directory: str | Path, *, days: float | None = None, max_gb: float | None = None) -> list[CacheFolder]:
    """Delete what is old, or the oldest until the rest fits; nothing that is no trunk cache's. No run may use it.

    Args:
        directory: The folder.
        days: Delete folders into which nothing was written for so long.
        max_gb: Delete the oldest folders until the others take so many gigabytes (1e9 bytes).

    Returns:
        What was deleted.

    Raises:
        ConfigError: It is no folder of a trunk cache, or neither is given.
    """
    if days is None and max_gb is None:
        raise ConfigError("days, max_gb: got neither; say how old, or how much may stay")
    kept, deleted = 0, []
    for each in list_folders(directory):  # the newest first
        kept += each.bytes
        if (days is not None and each.days > days) or (max_gb is not None and kept > max_gb * 1e9):
            deleted.append(each)
            kept -= each.bytes
    for each in deleted:
        _delete(each.path)
    return deleted


def _contexts(directory: Path) -> Iterator[Path]:
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            if _CONTEXT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                yield path


def _entries(folder: Path) -> Iterator[Path]:
    """The entries in a folder, and nothing else."""
    for part in sorted(folder.iterdir()):
        if _PART.fullmatch(part.name) and part.is_dir() and not part.is_symlink():
            yield from (
                path for path in sorted(part.iterdir()) if _ENTRY.fullmatch(path.name) and not path.is_symlink()
            )


def _describe(folder: Path) -> CacheFolder:
    try:
        context = json.loads((folder / DESCRIBED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        context = {}
    sizes = [path.stat() for path in _entries(folder)]
    written = max((each.st_mtime for each in sizes), default=folder.stat().st_mtime)
    return CacheFolder(
        folder,
        context if isinstance(context, dict) else {},
        len(sizes),
        sum(each.st_size for each in sizes),
        written,
    )


def _delete(folder: Path) -> None:
    """Delete the entries of a folder, and the folder if there is nothing else in it."""
    for entry in list(_entries(folder)):
        entry.unlink(missing_ok=True)
    (folder / DESCRIBED).unlink(missing_ok=True)
    for part in [*folder.iterdir(), folder]:
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()
