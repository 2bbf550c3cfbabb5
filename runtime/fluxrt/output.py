"""Image files: checked before any work, and there when they are complete."""

from __future__ import annotations

import contextlib
import io
import os
from typing import TYPE_CHECKING

from fluxrt.errors import OutputError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image


def check_output(path: Path) -> None:
    """RequestError or OutputError where a PNG file cannot be written to `path`; nothing is left there."""
    if path.suffix.lower() != ".png":
        raise RequestError(f"--out {path}: images are written as PNG; give a name that ends in .png")
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
    except OSError as error:
        raise OutputError(
            f"--out {path}: it cannot be written: {error.strerror}; give another name or folder"
        ) from None


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
