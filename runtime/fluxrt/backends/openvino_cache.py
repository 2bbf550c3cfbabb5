"""Graphs that OpenVINO compiled, kept beside the user's caches; losing them costs time and nothing else.

OpenVINO loads a file of its cache without a look at what is in it: with some bytes changed, images were others (2026.4.1). So
each folder has a seal, the SHA-256 of its files, and one without the right seal is made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SEAL = "sha256"
CACHED = 64 << 20
"""Bytes of weights up to which the CPU's compiled graphs are kept: it writes the weights into them, and compiles quickly."""


class CompiledGraphs:
    """Keeps what is compiled for `device` by OpenVINO `version`; what goes wrong is told to `note`, in a sentence."""

    def __init__(self, device: str, version: str, note: Callable[[str], None]) -> None:
        self._device, self._version, self._note = device, version, note

    def compiled(self, make: Callable[[dict[str, Any]], Any], weights: int, digests: list[str]) -> Any:
        """What `make` gives for properties that name a cache: of a graph with so many bytes of weights, made from files and
        settings of these digests; without any it is not kept."""
        if not digests or (self._device == "CPU" and weights > CACHED):
            return make({})
        folder = self.folder(digests)
        # Without weights, where the device can read them from the bundle again. The CPU takes the property and writes them.
        how = {} if self._device == "CPU" else {"CACHE_MODE": "OPTIMIZE_SIZE"}
        if is_sealed(folder):
            try:
                return make({"CACHE_DIR": str(folder), **how})
            except RuntimeError as error:
                self._note(f"{folder}: not usable ({error}), its graph is compiled again")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        except OSError as error:
            self._note(f"{folder}: the compiled graph cannot be kept ({error})")
            return make({})
        try:
            made = make({"CACHE_DIR": str(scratch), **how})
            self._keep(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return made

    def folder(self, digests: list[str]) -> Path:
        """Where a graph is kept: below XDG_CACHE_HOME, by device, version and what it is made from."""
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        key = hashlib.sha256("\0".join((self._device, self._version, *digests)).encode()).hexdigest()[:32]
        return root / "fluxc" / "openvino" / key

    def _keep(self, scratch: Path, folder: Path) -> None:
        try:
            (scratch / SEAL).write_text(_digest(scratch))
            shutil.rmtree(folder, ignore_errors=True)
            scratch.rename(folder)
        except OSError as error:
            # Another process may have been faster.
            if not is_sealed(folder):
                self._note(f"{folder}: the compiled graph could not be kept ({error})")


def is_sealed(folder: Path) -> bool:
    """Whether the files in `folder` are those that were written."""
    try:
        return (folder / SEAL).read_text() == _digest(folder)
    except OSError:
        return False


def _digest(folder: Path) -> str:
    """SHA-256 of the names and contents of a folder's files, but for the seal."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name != SEAL:
            found.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()
