"""Image files: checked before any work, and there when they are complete."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from typing import TYPE_CHECKING

from fluxrt.errors import OutputError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

NO_NAME = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EINVAL)
"""What the system says of a path that can be no file anywhere."""


def check_outputs(out: Path, count: int) -> list[Path]:
    """The files of `count` images: `out`, or with several images `out` with a number each.

    Raises RequestError where a name cannot be that of a PNG file, OutputError where the system does not let it be written;
    nothing is left there.
    """
    if out.suffix.lower() != ".png":
        raise RequestError(f"--out {out}: images are written as PNG; give a name that ends in .png")
    paths = [out.with_stem(f"{out.stem}-{number}") for number in range(count)] if count > 1 else [out]
    for path in paths:
        _check_output(path)
    return paths


def _check_output(path: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a name that is too long says so
        if path.is_symlink():
            raise RequestError(f"--out {path}: it is a link; give the file it should point to, or another name")
        if path.is_dir():
            raise RequestError(f"--out {path}: it is a folder; give a file name")
        if not path.parent.is_dir():
            raise RequestError(f"--out {path}: the folder {path.parent} does not exist; make it first")
        partial = _partial(path)
        partial.touch()
        partial.unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        kind = OutputError if isinstance(error, OSError) and error.errno not in NO_NAME else RequestError
        raise kind(f"--out {path}: it cannot be written: {reason}; give another name or folder") from None


def save(image: Image, path: Path) -> None:
    """Write `image` as PNG to `path`, which appears when it is complete; OutputError where it cannot be."""
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    partial = _partial(path)
    try:
        partial.write_bytes(encoded.getbuffer())
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: it cannot be written: {error.strerror}; make room or give another --out; images before it are kept"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(f".fluxrt-{os.getpid()}.png")
