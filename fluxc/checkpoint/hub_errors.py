"""What huggingface_hub raises, as an error that says what is wrong, with which repository, and what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from fluxc.base.errors import CheckpointError, FluxError, RecipeError
from fluxc.checkpoint.named import OnHub

AGAIN = "run the same command again: what is complete is kept, and it goes on from there"


@contextmanager
def telling(place: OnHub) -> Iterator[None]:
    """Raise what the body meets on the hub as CheckpointError about `place`; RecipeError if that is no name of a repository."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except FluxError:
        raise
    except HFValidationError as error:
        raise RecipeError(f"model: {place.repo!r} is no hub id ({_said(error)}); write owner/name") from error
    except Exception as error:
        # Below huggingface_hub is an HTTP library, which differs by version and has errors of its own.
        raise CheckpointError(f"{place.repo}: {_told(place, error)}") from error


def _told(place: OnHub, error: Exception) -> str:
    from huggingface_hub import constants, get_token, is_offline_mode
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    token = "the token that is used here" if get_token() else "no token is set here"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return (
            f"the repository is gated ({token}): accept its licence at {hub}/{place.repo} with your account, then {log_in} to "
            "a token of that account, and run this again"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"has no branch, tag or commit {place.revision or 'main'!r}; mend `revision`, {hub}/{place.repo} lists them"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"no such folder here, and no such repository at {hub}, or a private one ({token}); check the name, or {log_in}"
    if isinstance(error, LocalEntryNotFoundError):
        where = f"the cache {constants.HF_HUB_CACHE} does not hold it, or not all of it ({_said(error)})"
        if is_offline_mode():
            return f"HF_HUB_OFFLINE is set, and {where}; unset it to download the checkpoint, or give its folder"
        return (
            f"no such folder here, {hub} cannot be reached, and {where}; check the network and its proxy, then {AGAIN}"
        )
    if isinstance(error, EntryNotFoundError):
        return f"a file of it is not there any more ({_said(error)}); open another `revision`"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"{hub} refuses access, HTTP {status} ({token}); {log_in} to one that may read this repository"
        if status == 429:
            return (
                f"{hub} answers that there were too many requests (HTTP 429); wait some minutes, {log_in}, then {AGAIN}"
            )
        return f"{hub} answers HTTP {status} ({_said(error)}); {AGAIN}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no room is left in {constants.HF_HUB_CACHE}; free some, or set HF_HUB_CACHE to a larger disk, then {AGAIN}"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"the cache cannot be written ({_said(error)}); set HF_HUB_CACHE to a folder that can"
    return f"the download from {hub} stopped ({type(error).__name__}: {_said(error)}); {AGAIN}"


def _said(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= 300 else f"{said[:300]}..."
