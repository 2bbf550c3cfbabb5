"""The stage cache: results in folders named by the hash of everything the stage read.

A result is written to a temporary folder and renamed when complete, so a killed build leaves nothing half written and
goes on where it stopped. The key covers fluxc's and fluxrt's own source and the versions of the tools a stage uses.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import fluxc
import fluxrt
from fluxc.base.errors import BuildError
from fluxc.base.progress import Report, StageProgress

SEAL = "stage.json"
PROGRESS = "progress"
TOOLS = (
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "numba",
    "numpy",
    "safetensors",
    "pillow",
)


@cache
def tool_versions() -> dict[str, str]:
    """Installed versions of the tools a build's bytes depend on, fluxc and fluxrt with a digest of their source."""
    versions = {name: metadata.version(name) for name in TOOLS}
    versions["fluxc"] = f"{fluxc.__version__}+{source_digest(Path(fluxc.__file__).parent)}"
    versions["fluxrt"] = f"{fluxrt.__version__}+{source_digest(Path(fluxrt.__file__).parent)}"
    return versions


def source_digest(folder: Path) -> str:
    """The first 12 hexadecimal digits of a SHA-256 over a package's Python files and templates."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".j2")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def key_of(*parts: Any) -> str:
    """A hash of JSON-like values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class StageCache:
    """Stage results below one folder."""

    def __init__(self, root: Path, progress: StageProgress) -> None:
        self.root = root
        self._progress = progress

    def run(self, stage: str, title: str, inputs: Any, work: Callable[[Path, Report], None]) -> Path:
        """The folder with the result of `stage` for `inputs`; `work(folder, report)` makes it if it is not there."""
        folder = self.root / f"{stage}-{key_of(stage, inputs, tool_versions())}"
        if folder.is_dir():
            if self._unchanged(folder):
                self._progress.cached(title)
                os.utime(folder)
                return folder
            shutil.rmtree(folder)
        self.root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{stage}-", dir=self.root))
        try:
            with self._progress.stage(title) as report:
                work(partial, report)
            (partial / SEAL).write_text(json.dumps(self._digests(partial)))
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder

    def prune(self, keep: int = 4) -> None:
        """Remove all but the `keep` most recently used results of every stage, and what unfinished ones kept."""
        by_stage: dict[str, list[Path]] = {}
        for folder in self.root.iterdir():
            if folder.is_dir() and not folder.name.startswith(".") and (folder / SEAL).is_file():
                by_stage.setdefault(folder.name.rpartition("-")[0], []).append(folder)
        for folders in by_stage.values():
            for folder in sorted(folders, key=lambda path: path.stat().st_mtime_ns, reverse=True)[keep:]:
                shutil.rmtree(folder)
        unfinished = sorted((self.root / PROGRESS).glob("*-*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for folder in unfinished[keep:]:
            shutil.rmtree(folder)

    def _unchanged(self, folder: Path) -> bool:
        """Whether a result's files are what the stage wrote. A bundle shares them by hard link, so an edit there shows here."""
        try:
            sealed = json.loads((folder / SEAL).read_text())
        except (OSError, json.JSONDecodeError):
            return False
        return bool(sealed == self._digests(folder))

    def _digests(self, folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
        return {path.relative_to(folder).as_posix(): self.file_digest(path) for path in files}

    def file_digest(self, path: Path) -> str:
        """SHA-256 of `path`, remembered for as long as its size, modification time and inode stay the same."""
        stat = path.stat()
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_dev, stat.st_ino]
        note = self.root / "digests" / key_of(seen)
        if note.is_file():
            return note.read_text()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f".{note.name}.{os.getpid()}")
        partial.write_text(digest)
        partial.replace(note)
        return digest


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One build at a time in a cache folder; what a killed build left half written there is removed first."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BuildError(
                f"{root}: another fluxc build is using this folder; wait for it, or give another --out"
            ) from None
        for leftover in root.glob(".*-*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
        yield
