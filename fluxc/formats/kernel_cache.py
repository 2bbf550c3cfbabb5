"""Where the compiled kernels are kept: beside the source, in the user's cache folder, or else in a temporary one."""

from __future__ import annotations

import os
import stat
import tempfile
from functools import cache
from pathlib import Path

from numba.core import config
from numba.core.caching import FunctionCache


@cache
def kernel_folder() -> tuple[Path | None, str | None]:
    """The folder numba keeps compiled kernels in, None where there is none; and what to say of it, if it is not the usual one.

    Call it before the first kernel is declared: numba refuses to declare a cached one without a folder.
    """
    try:
        return Path(FunctionCache(kernel_folder.__wrapped__).cache_path), None
    except RuntimeError:
        folder = _temporary_folder()
    why = "neither fluxc's own folder nor the user's cache folder can be written to"
    if folder is None:
        return None, f"kernels are compiled anew by each command (about half a minute): {why}; set NUMBA_CACHE_DIR"
    config.CACHE_DIR = str(folder)
    return folder, f"compiled kernels are kept in {folder}: {why}; NUMBA_CACHE_DIR names another"


def _temporary_folder() -> Path | None:
    """A folder of this user's own: numba runs what it finds there, so it must be nobody else's."""
    try:
        folder = Path(tempfile.gettempdir()) / f"fluxc-kernels-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if ours else None
