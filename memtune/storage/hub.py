"""Adapters on the Hugging Face Hub. This is the only file that reaches the network, through huggingface_hub alone.

huggingface_hub itself repeats what it can repeat: it resumes a download that was cut, and asks again after 429 and 5xx
where files are uploaded and lists are read. The rest (what a revision is, a new repository, the commit, files that are
answered with 5xx) is repeated here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import transformers
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers
from transformers import PreTrainedModel

from .._version import __version__
from ..errors import CheckpointError, ConfigError, HubError
from .adapter_folder import CARD_NAME, CONFIG_NAME, PROCESSOR_NAME, STATE_NAME, WEIGHTS_NAME, AdapterFolder
from .atomic import place_of
from .card import public_name
from .collection import INDEX_NAME, read_index
from .hub_errors import explain, is_temporary, root_cause

_FILES = (CONFIG_NAME, WEIGHTS_NAME, PROCESSOR_NAME, CARD_NAME)
_REQUIRED = (CONFIG_NAME, WEIGHTS_NAME)
_WAITS = (1.0, 2.0, 4.0)
"""Seconds before each repetition, where the Hub names none."""
_LONGEST_WAIT = 300.0
"""Seconds; the window of the Hub's own limits."""
_TIMEOUT = 30.0

_Result = TypeVar("_Result")


def find_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Where an adapter's files lie: the folder itself, or that in the cache of an adapter on the Hub.

    Args:
        source: A folder, or the id of a repository on the Hub (`user/name`); a folder of that name goes first.
        revision: Branch, tag, pull request (`refs/pr/1`) or commit on the Hub; by default `main`.
        subfolder: The adapter's folder within the folder or repository.
        token: A token of the Hub; True for the one that was stored at login, False for none.
        cache_dir: Where the files are kept, by default huggingface_hub's own place.
        local_files_only: Do not reach out; take what is in the cache.
        force_download: Fetch the files again.

    Raises:
        HubError: The adapter cannot be had.
    """
    if not isinstance(source, (str, Path)):
        raise ConfigError(f"got {type(source).__name__}, expected an adapter's folder, or its id on the Hub")
    path = Path(source)
    if isinstance(source, Path) or path.exists() or path.is_absolute() or source.startswith((".", "~")):
        return path / (subfolder or "")
    if public_name(source) is None:
        raise HubError(f"got {source!r}, which is no folder here, and no id of a repository on the Hub (user/name)")
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    access: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    patterns = [prefix + name for name in (*_FILES, STATE_NAME)]
    folder = Path(_download(source, patterns, revision=revision, force_download=force_download, **access), prefix)
    missing = [prefix + name for name in _REQUIRED if not (folder / name).is_file()]
    if missing and not (folder / STATE_NAME).is_file():
        raise HubError(
            f"{source!r} on the Hub has no {' and no '.join(missing)} at revision {revision or 'main'!r}: "
            "it is no adapter of memtune; name another repository, revision= or subfolder="
        )
    return folder


def find_collection(
    source: str | Path, *, revision: str | None = None, subfolder: str | None = None, **access: Any
) -> Path:
    """Where the folder of a multi-task model lies: the folder itself, or that in the cache of one on the Hub.

    Args:
        source: A folder, or the id of a repository on the Hub; a folder of that name goes first.
        revision: Branch, tag, pull request or commit on the Hub; by default `main`.
        subfolder: The collection's folder within the folder or repository.
        access: `token`, `cache_dir`, `local_files_only` and `force_download`, as for `find_folder`.

    Raises:
        HubError: The folder cannot be had.
    """
    if isinstance(source, Path) or Path(source).exists() or public_name(source) is None:
        return Path(source, subfolder or "")
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    patterns = [f"{prefix}{name}" for name in (INDEX_NAME, CARD_NAME, *(f"*/{name}" for name in _FILES))]
    return Path(_download(source, patterns, revision=revision, **access), prefix)


def _download(source: str, patterns: list[str], *, revision: str | None, **access: Any) -> str:
    with _explained(f"{source!r} is no folder here, and could not be loaded from the Hub", source, revision):
        return _repeat(
            lambda: snapshot_download(source, revision=revision, allow_patterns=patterns, **access, **_library())
        )


def make_repository(repo_id: str, *, private: bool | None = None, token: bool | str | None = None) -> str:
    """Make a repository unless it is there, and give its whole id.

    Args:
        repo_id: `user/name`, or a name in the user's own space.
        private: Whether a new repository is private; by default what the Hub's settings say.
        token: A token that may write.

    Raises:
        HubError: The Hub refused or could not be reached.
    """
    with _explained(f"{repo_id!r} could not be made on the Hub", repo_id, None):
        api = HfApi(token=token, **_library())
        return _repeat(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    token: bool | str | None = None,
) -> CommitInfo:
    """Put an adapter folder on the Hub in one commit, which either has all of its files or does not exist.

    Args:
        folder: The adapter folder, or the folder of a multi-task model.
        repo_id: `user/name`, a repository that is there.
        revision: Branch to commit to, made if it is not there; by default `main`.
        commit_message: First line of the commit's message.
        commit_description: The rest of it.
        create_pr: Open a pull request in place of a commit on the branch.
        token: A token that may write.

    Raises:
        HubError: The Hub refused or could not be reached; the repository has the old files or the new ones.
    """
    api = HfApi(token=token, **_library())
    message = commit_message or "Upload memtune adapter"
    with _explained(f"{repo_id!r} could not be pushed to the Hub", repo_id, revision):
        if revision is not None and not revision.startswith("refs/pr/"):
            _make_branch(api, repo_id, revision, optional=create_pr)

        def commit() -> CommitInfo:
            # The parent makes the Hub refuse if someone else has committed since, who might have changed a file that
            # seemed unchanged here. If an earlier try came through and only its answer was lost, nothing is left to
            # change, and huggingface_hub gives that commit.
            info = api.model_info(repo_id, revision=revision, timeout=_TIMEOUT)
            return api.create_commit(
                repo_id,
                _operations(folder, info),
                commit_message=message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=info.sha,
            )

        # A pull request whose answer was lost is no head that could be looked at: a second try would open a second one.
        return _repeat(commit, only_refused=create_pr)


def _make_branch(api: HfApi, repo_id: str, branch: str, *, optional: bool) -> None:
    try:
        _repeat(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    except HfHubHTTPError as error:
        # Whoever opens a pull request need not be allowed to make branches; the commit will tell if there is none.
        if not (optional and error.response.status_code == 403):
            raise


def _operations(folder: Path, info: ModelInfo) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What makes the adapter's files in a repository those of a folder."""
    there = {sibling.rfilename for sibling in info.siblings or []}
    names = list(_FILES)
    if place_of(folder, INDEX_NAME).is_file():
        earlier = (name.removesuffix(f"/{CONFIG_NAME}") for name in there if name.endswith(f"/{CONFIG_NAME}"))
        folders = {*read_index(folder).values(), *(name for name in earlier if "/" not in name)}
        names = [INDEX_NAME, CARD_NAME, *(f"{each}/{name}" for each in sorted(folders) for name in _FILES)]
    paths = {name: place_of((folder / name).parent, Path(name).name) for name in names}
    additions = [CommitOperationAdd(name, path) for name, path in paths.items() if path.is_file()]
    stale = [name for name, path in paths.items() if not path.is_file() and name in there]
    return [*additions, *(CommitOperationDelete(name) for name in stale)]


def list_adapters(
    backbone: str | PreTrainedModel,
    *,
    author: str | None = None,
    limit: int | None = None,
    token: bool | str | None = None,
) -> list[ModelInfo]:
    """The memtune adapters on the Hub for a backbone, by their cards.

    Example:
        >>> from memtune.hub import list_adapters
        >>> found = list_adapters("google/vit-base-patch16-224-in21k")

    Args:
        backbone: The backbone's name on the Hub, or the backbone loaded from there.
        author: Only those of a user or an organization.
        limit: At most so many.
        token: A token of the Hub, to see private ones too.

    Raises:
        ConfigError: The backbone has no name on the Hub.
        HubError: The Hub refused or could not be reached.
    """
    name = backbone if isinstance(backbone, str) else backbone.name_or_path
    if name is None or public_name(name) is None:
        raise ConfigError(f"backbone: got {name!r}, expected the name of a model on the Hub (user/name)")
    with _explained(f"the adapters for {name!r} could not be listed", name, None):
        found = HfApi(token=token, **_library()).list_models(
            filter=["memtune", f"base_model:{name}"], author=author, limit=limit
        )
        return list(found)


def load_recorded_backbone(
    adapter: AdapterFolder,
    *,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel:
    """Load the backbone that an adapter was trained on by its recorded name (see `find_folder` for the arguments).

    Raises:
        CheckpointError: There is no such model class, or no such model.
    """
    name, kind = adapter.backbone.get("name_or_path"), adapter.backbone.get("model_class")
    model_class = getattr(transformers, str(kind), None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)) or not name:
        raise CheckpointError(
            f"{adapter.path} names the backbone {name!r} of class {kind!r}; give backbone=... yourself"
        )
    try:
        return _repeat(
            lambda: model_class.from_pretrained(
                name,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                trust_remote_code=False,
                use_safetensors=True,  # nobody's pickles
            )
        )
    except Exception as error:
        raise CheckpointError(f"the recorded backbone {name!r} cannot be loaded; give backbone=...: {error}") from error


def _library() -> dict[str, Any]:
    """What tells the Hub which library asks."""
    return {"library_name": "memtune", "library_version": __version__}


@contextmanager
def _explained(what: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Give whatever huggingface_hub raises as one error that says what to do."""
    try:
        yield
    except Exception as error:
        raise HubError(f"{what}: {explain(error, repo_id, revision)}") from error


def _repeat(action: Callable[[], _Result], *, only_refused: bool = False) -> _Result:
    """Run something that may be run again, until it is done or the waits are used up.

    Args:
        action: What to do.
        only_refused: Run it again only where the Hub has said that it did nothing.
    """
    for wait in _WAITS:
        try:
            return action()
        except Exception as error:
            if not is_temporary(error, only_refused=only_refused) or (asked := _asked_wait(error)) > _LONGEST_WAIT:
                raise
            time.sleep(asked or wait)
    return action()


def _asked_wait(error: Exception) -> float:
    """The seconds that the Hub asks to wait, or 0."""
    cause = root_cause(error)
    if not isinstance(cause, HfHubHTTPError):
        return 0.0
    limits = parse_ratelimit_headers(cause.response.headers)
    if limits is not None and limits.remaining == 0:
        return limits.reset_in_seconds + 1.0
    seconds = cause.response.headers.get("Retry-After", "")
    return float(seconds) + 1.0 if seconds.isdigit() else 0.0
