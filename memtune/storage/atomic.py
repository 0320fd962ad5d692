"""Replacing several files of a folder at once: whoever reads sees all the old ones or all the new ones.

New files are written into a staging folder beside the old ones. Renaming that folder to `.memtune-commit` is the
commit: from then on its files count, whether or not they have been moved to their places yet. A process killed before
it leaves the old files; one killed after it leaves the new ones, which `place_of` finds and the next save moves.

What is staged may hold folders of files: each moves as a whole, to be the commit of the folder of its name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError

_COMMIT = ".memtune-commit"
_STAGING = ".memtune-staging"


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """Give a staging folder; what is in it at the end of the context replaces the files of those names in `folder`.

    An exception inside the context leaves `folder` as it was. One process at a time may replace files of a folder.

    Raises:
        CheckpointError: The folder cannot be written to, or the disk is full.
    """
    try:
        with _replaced(folder) as staging:
            yield staging
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written to, and is as it was: {error}") from error


def settle(folder: Path) -> Path:
    """Move what was committed to its place, and delete what a killed process had staged; gives the staging's place."""
    _finish(folder)
    staging = folder / _STAGING
    if staging.is_symlink() or staging.is_file():
        staging.unlink()
    shutil.rmtree(staging, ignore_errors=True)
    return staging


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    staging = settle(folder)
    staging.mkdir()
    try:
        yield staging
        for path in sorted(staging.rglob("*")):
            place = folder / path.relative_to(staging)
            if path.is_dir() and place.is_symlink():
                raise CheckpointError(f"{place} is a link, where a folder is to be written; move it away")
            if place.exists() and place.is_dir() != path.is_dir():
                got, wanted = ("folder", "file") if place.is_dir() else ("file", "folder")
                raise CheckpointError(f"{place} is a {got}, where a {wanted} is to be written; move it away")
            _sync(path)
        _sync(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    staging.rename(folder / _COMMIT)
    _sync(folder)
    _finish(folder)


def place_of(folder: Path, name: str, within: Path | None = None) -> Path:
    """Where the valid file of that name lies, if there is one.

    Args:
        folder: Its folder.
        name: The file's name.
        within: The folder that `folder` was written together with others of, if it shall count what was committed there
            and has not moved yet.
    """
    commits = [folder / _COMMIT] if within is None else [within / _COMMIT, within / _COMMIT / folder.name]
    if not any(each.is_symlink() for each in commits) and (commits[-1] / name).is_file():  # a link is none of ours
        return commits[-1] / name
    return folder / name if within is None else place_of(folder, name)


def _finish(folder: Path) -> None:
    committed = folder / _COMMIT
    if committed.is_symlink() or committed.is_file():
        raise CheckpointError(f"{committed} is no folder of memtune's; delete it, and look where the folder came from")
    if committed.is_dir():
        for path in sorted(committed.iterdir(), key=Path.is_file):  # folders go first, as files may tell of them
            if path.is_dir() and not path.is_symlink():
                _finish_folder(path, folder / path.name)
            elif path.is_dir() or (folder / path.name).is_dir():
                raise CheckpointError(f"{path} is no file that memtune has written; delete {committed}")
            else:
                path.replace(folder / path.name)
        committed.rmdir()


def _finish_folder(committed: Path, place: Path) -> None:
    """Give a folder what was committed for it: at once, as if it had been written there alone."""
    if place.is_symlink() or place.is_file() or any(path.is_dir() for path in committed.iterdir()):
        raise CheckpointError(f"{committed} is no folder that memtune has written; delete {committed.parent}")
    if not place.exists():
        committed.rename(place)
        return
    _finish(place)
    committed.rename(place / _COMMIT)
    _finish(place)


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
