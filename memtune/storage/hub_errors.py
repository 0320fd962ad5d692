"""What an error of huggingface_hub means, in words that say what to do."""

from __future__ import annotations

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of the client that this release of huggingface_hub uses
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_REFUSED = (408, 429, 503)
"""Statuses with which the Hub has done nothing."""
_FAILED = (500, 502, 504)
"""Statuses after which it may have done what was asked."""

_LOGIN = "log in by `hf auth login`, or pass token="

_STATUSES = {
    401: f"the Hub does not accept the token (401); {_LOGIN}",
    403: "the token may not do this (403); use one with the permission to write to this repository, or create_pr=True",
    409: "another change of the repository is under way (409); push again",
    412: "someone else has committed since (412); look at what changed, and push again",
    413: "a file is larger than the Hub takes (413)",
    429: "too many requests (429); wait for some minutes, and try again",
}


def root_cause(error: BaseException) -> BaseException:
    """The first error in a chain of causes that tells what went wrong between here and the Hub; else the error."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, (HTTPError, OfflineModeIsEnabled)):
            return current
        current = current.__cause__
    return error


def is_temporary(error: BaseException, *, only_refused: bool = False) -> bool:
    """Whether the same request may do later: the Hub is busy or has failed, or the connection was lost.

    Args:
        error: What was raised.
        only_refused: Only where it is certain that the Hub has not done what was asked.
    """
    cause = root_cause(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in (_REFUSED if only_refused else (*_REFUSED, *_FAILED))
    if not isinstance(cause, HTTPError):
        return False
    return type(cause).__name__ in ("ConnectError", "ConnectTimeout") if only_refused else True


def explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    """What went wrong and what to do.

    Args:
        error: What huggingface_hub raised.
        repo_id: The repository that was asked for.
        revision: The revision that was asked for.
    """
    cause = root_cause(error)
    if isinstance(cause, GatedRepoError):
        return f"access must be granted first (403); ask for it at https://huggingface.co/{repo_id}"
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"there is no such repository, or this token may not see it ({_status(cause)}); check the name, or {_LOGIN}"
        )
    if isinstance(cause, RevisionNotFoundError):
        return f"it has no revision {revision!r} (404); give a branch, a tag or a commit that it has"
    if isinstance(cause, HfHubHTTPError):
        return _explain_status(cause)
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and the cache does not hold all of it; unset it, or load it once while online"
    if isinstance(cause, HTTPError):
        return f"the Hub cannot be reached ({type(cause).__name__}: {cause}); check the connection, and try again"
    return _explain_local(cause)


def _explain_status(error: HfHubHTTPError) -> str:
    status = _status(error)
    said = f"\n{error.server_message}" if error.server_message else ""
    if isinstance(error, EntryNotFoundError):
        return f"it lacks a file (404): {error}"
    if status >= 500:
        return f"the Hub failed ({status}), also when asked again; try again later, see https://status.huggingface.co{said}"
    return _STATUSES.get(status, f"the Hub answered with {status}: {error}") + said


def _explain_local(error: BaseException) -> str:
    """Errors before anything was sent."""
    if isinstance(error, HFValidationError):
        return f"that is no id of a repository (user/name): {error}"
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token on this machine; {_LOGIN}"
    if isinstance(error, LocalEntryNotFoundError):
        return "the cache does not hold all of it, and local_files_only=True; load it once without"
    reason = f"{type(error).__name__}: {error}"
    return reason if error.__cause__ is None else f"{reason} ({_explain_local(error.__cause__)})"


def _status(error: HfHubHTTPError) -> int:
    return error.response.status_code
