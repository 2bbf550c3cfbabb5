"""Where a command writes: checked before any work, and named when the disk fails in the middle of it."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxc.base.errors import BuildError, RecipeError

LONGEST_NAME = 200
"""Bytes; what is made beside an output is named after it, and a file's name has at most 255."""
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "allow files of that size (ulimit -f)",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EROFS: "give another place",
    errno.EACCES: "give a place that you may read and write",
    errno.EPERM: "give a place that you may read and write",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EIO: "check the disk",
}
"""What helps against errors of the place that is written to; other errors are not the place's."""


def check_output(out: Path, noun: str, is_folder: bool = False) -> None:
    """Refuse a place where no `noun` ("a bundle") can be written, or that is something else; nothing is left there.

    Raises RecipeError for a place that can be none, BuildError for one that the system does not let be written. What is there
    already, the caller looks at.
    """
    if out.name in ("", ".."):
        raise RecipeError(f"--out {out}: give the name of {noun}")
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        raise RecipeError(f"--out {out.name[:40]}...: the name is longer than {LONGEST_NAME} bytes; give a shorter one")
    with names_place("--out", out):
        if out.is_symlink():
            raise RecipeError(f"{out}: is a symbolic link; give --out the place that it points to, or remove it")
        if out.exists() and not (out.is_dir() if is_folder else out.is_file()):
            raise RecipeError(f"{out}: exists and is not {noun}; give another --out, or move it away")
        check_writable(out if out.is_dir() else out.parent)
        check_writable(out.parent)


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, or that no file can be written into; RecipeError or BuildError says why."""
    existing = folder.resolve()
    with names_place("cannot write", existing):
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise RecipeError(f"{existing}: is not a folder, so nothing can be written below it; give another place")
        try:
            with tempfile.TemporaryFile(dir=existing) as probe:
                probe.write(bytes(4096))
                probe.flush()
        except FileNotFoundError as error:
            # What file systems without ordinary files, such as /proc, answer.
            raise BuildError(f"{existing}: no file can be made in this folder; give another place") from error


def write_complete(path: Path, text: str) -> None:
    """Write `text` in UTF-8; `path` appears when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def names_place(what: str, place: Path) -> Iterator[None]:
    """Turn errors of the place that is written to into a BuildError: what was at work, where, what to do."""
    try:
        yield
    except Exception as error:
        found = _place_error(error)
        if found is None:
            raise
        name = getattr(error, "filename", None)
        where = os.fsdecode(name) if isinstance(name, str | bytes) else str(place)
        raise BuildError(f"{what}: {where}: {os.strerror(found)}; {ADVICE[found]} and run the command again") from error


def _place_error(error: Exception) -> int | None:
    """The errno of an error in ADVICE; safetensors says it in words, numpy's tofile only that less was written."""
    if isinstance(error, OSError) and error.errno is None and re.search(r"requested and \d+ written", str(error)):
        return errno.ENOSPC
    number = error.errno if isinstance(error, OSError) else None
    if type(error).__name__ == "SafetensorError" and (said := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(said[1])
    return number if number in ADVICE else None
