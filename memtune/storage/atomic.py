"""Replacing several files of a folder at once: whoever reads sees all the old ones or all the new ones.

New files are written into a staging folder beside the old ones. Renaming that folder to `.memtune-commit` is the
commit: from then on its files count, whether or not they have been moved to their places yet. A process killed before
it leaves the old files; one killed after it leaves the new ones, which `current` finds and the next save moves.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError

_COMMIT = ".memtune-commit"
_STAGING = ".memtune-staging"


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """Give a staging folder; what is in it at the end of the context replaces the files of those names in `folder`.

    An exception inside the context leaves `folder` as it was. One process at a time may replace files of a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _finish(folder)
    staging = folder / _STAGING
    if staging.is_symlink() or staging.is_file():
        staging.unlink()
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for path in staging.iterdir():
            if (folder / path.name).is_dir():
                raise CheckpointError(f"{folder / path.name} is a folder, where a file is to be written; move it away")
            _sync(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    staging.rename(folder / _COMMIT)
    _sync(folder)
    _finish(folder)


def current(folder: Path, name: str) -> Path:
    """Where the valid file of that name lies, if there is one."""
    committed = folder / _COMMIT
    own = not committed.is_symlink() and (committed / name).is_file()  # a link is none of ours
    return committed / name if own else folder / name


def _finish(folder: Path) -> None:
    committed = folder / _COMMIT
    if committed.is_symlink() or committed.is_file():
        raise CheckpointError(f"{committed} is no folder of memtune's; delete it, and look where the folder came from")
    if committed.is_dir():
        for path in committed.iterdir():
            if path.is_dir() or (folder / path.name).is_dir():
                raise CheckpointError(f"{path} is no file that memtune has written; delete {committed}")
            path.replace(folder / path.name)
        committed.rmdir()


def _sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk (folders cannot be opened on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_folder(staging: Path, place: Path) -> None:
    """Give a finished folder its name, once all of it is on the disk; a folder that has the name already goes.

    Args:
        staging: The folder, on the same disk as `place`.
        place: Its name from now on.
    """
    for path in staging.rglob("*"):
        _sync(path)
    if place.exists():
        remove_folder(place)
    staging.rename(place)
    _sync(place.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder, which loses its name before it loses its first file."""
    doomed = folder.with_name(f".{folder.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
