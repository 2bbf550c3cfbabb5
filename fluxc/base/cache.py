"""The stage cache: results in folders named by the hash of everything the stage read.

1. A key covers the stage's inputs, the source it can run (fluxc.base.imports), and the versions of the tools.
2. A result is made in a hidden folder and renamed when complete, so a killed build leaves nothing half written and goes on
   where it stopped. It is sealed with the hashes of its files, so one that was edited is noticed and made again.
3. Several processes may use one cache: a result is made under a lock of its own, and whoever else wants it waits for it.
4. Pruning never drops what a bundle in this cache was last built from, nor what a running build uses.
5. A file's hash is remembered for its size, its times of modification and of status change, device and inode. The second time
   cannot be set, so a file that is put in place of another under the same name, size and time is read again. A file that
   changed so recently that a further change might leave no trace is hashed and not remembered.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import fluxc
import fluxrt
from fluxc.base.errors import BuildError
from fluxc.base.imports import code_digest
from fluxc.base.progress import Report, StageProgress

SEAL = "stage.json"
PROGRESS = "progress"
LOCKS = "locks"
USED = "used"
ENVIRONMENT = "FLUXC_CACHE"
TICK_NS = 20_000_000
"""Two changes of a file that lie this far apart have different times: twice the longest tick of a kernel's clock."""
COARSE_TICK_NS = 2_000_000_000
"""The same where a file system keeps whole seconds."""
READS = 3
KEEP_BYTES = 8 << 30
"""Of results that no bundle's last build used, the most recent ones are kept up to this size."""
TOOLS = (
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "accelerate",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "numba",
    "numpy",
    "scipy",
    "scikit-image",
    "safetensors",
    "pillow",
)


@cache
def library_versions() -> dict[str, str]:
    """Installed versions of the libraries a build's bytes depend on."""
    return {name: metadata.version(name) for name in TOOLS}


@cache
def tool_versions() -> dict[str, str]:
    """Installed versions of the tools a build's bytes depend on, fluxc and fluxrt with a digest of their source."""
    versions = dict(library_versions())
    versions["fluxc"] = f"{fluxc.__version__}+{source_digest(Path(fluxc.__file__).parent)}"
    versions["fluxrt"] = f"{fluxrt.__version__}+{source_digest(Path(fluxrt.__file__).parent)}"
    return versions


def source_digest(folder: Path) -> str:
    """The first 12 hexadecimal digits of a SHA-256 over a package's Python files, and what its pages are made from."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".j2", ".css", ".js")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def key_of(*parts: Any) -> str:
    """A hash of JSON-like values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def cache_root(out: Path) -> Path:
    """Where results for the bundle or file `out` are kept: the folder FLUXC_CACHE names, or .fluxc/ beside `out`."""
    shared = os.environ.get(ENVIRONMENT)
    return Path(shared).expanduser().resolve() if shared else beside(out)


def beside(out: Path) -> Path:
    """The folder beside `out` for what is about to become it."""
    return out.resolve().parent / ".fluxc"


class UnknownDigestError(Exception):
    """A file's hash is not remembered."""


@dataclass(frozen=True)
class Made:
    """The folder of a stage's result as an input of another: its name holds the hash of all it was made from."""

    folder: Path

    def fingerprint(self) -> str:
        """What a stage's key takes of it."""
        return self.folder.name


class StageCache:
    """Stage results below one folder. Close it, or use it in a `with` statement: until then, what it gave is not pruned."""

    def __init__(self, root: Path, progress: StageProgress) -> None:
        self.root = root
        self.progress = progress
        self.used: dict[str, None] = {}
        self._held = ExitStack()

    def __enter__(self) -> StageCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the results it gave."""
        self._held.close()

    def folder(self, stage: str, inputs: Any, code: str) -> Path:
        """Where the result of `stage` is, or would be: `inputs` is JSON-like, `code` the module whose source it runs."""
        return self.root / f"{stage}-{key_of(stage, inputs, library_versions(), code_digest(code))}"

    def find(self, folder: Path) -> Path | None:
        """`folder` if it holds a complete, unaltered result."""
        return folder if folder.is_dir() and self._unchanged(folder) else None

    def run(self, folder: Path, title: str, work: Callable[[Path, Report], None]) -> Path:
        """The result `folder`, see `folder`; `work(path, report)` makes it if it is not there."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._hold(folder.name)
        with self._making(folder.name):
            if self.find(folder):
                self.progress.cached(title)
                os.utime(folder)
                return folder
            partial = self.root / f".{folder.name}"
            for old in (folder, partial):
                shutil.rmtree(old, ignore_errors=True)
            partial.mkdir()
            try:
                with self.progress.stage(title) as report:
                    work(partial, report)
                (partial / SEAL).write_text(json.dumps(self._digests(partial)))
                partial.replace(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return folder

    def remember(self, owner: str) -> None:
        """Note that these are the results the bundle or file `owner` (an absolute path) was made from."""
        note = self.root / USED / f"{key_of(owner)}.json"
        _write(note, json.dumps({"owner": owner, "results": sorted(self.used)}))

    def prune(self, keep_bytes: int = KEEP_BYTES) -> None:
        """Remove results and unfinished work that nothing needs: the least recently used beyond `keep_bytes`; say what went.

        What the last build of a bundle that is still there used, and what a running build uses, is kept whatever its size.
        """
        needed = set(self.used)
        for note in (self.root / USED).glob("*.json"):
            try:
                entry = json.loads(note.read_text())
            except ValueError:
                entry = None
            if entry and Path(entry["owner"]).exists():
                needed.update(entry["results"])
            else:
                note.unlink()
        free = [folder for folder in self._results() if folder.name not in needed]
        free += list((self.root / PROGRESS).glob("*-*"))
        room, dropped = keep_bytes, []
        for folder in sorted(free, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            room -= _size(folder)
            if room < 0 and self._drop(folder):
                dropped.append(folder.name.rpartition("-")[0])
        if dropped:
            self.progress.say(
                f"cache {self.root}: removed {len(dropped)} results that no bundle uses ({', '.join(sorted(set(dropped)))})"
            )
        for leftover in self.root.glob(".*-*"):
            if leftover.is_dir():
                self._drop(leftover)

    def file_digest(self, path: Path) -> str:
        """SHA-256 of `path`, remembered for as long as nothing was done to the file (rule 5)."""
        for _ in range(READS):
            before, settled = _settled(path)
            known = self._known(before)
            if known is not None:
                return known
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                after = os.fstat(file.fileno())
            if _identity(before) == _identity(after) == _identity(path.stat()):
                if settled:
                    _write(self._note(before), digest)
                return digest
        raise BuildError(
            f"{path}: it changes while it is read; wait until whatever writes it is done, then build again"
        )

    def known_digest(self, path: Path) -> str:
        """The SHA-256 of `path` if it is remembered; UnknownDigestError otherwise, for who must not read whole files."""
        known = self._known(path.stat())
        if known is None:
            raise UnknownDigestError(str(path))
        return known

    @contextmanager
    def relinking(self, files: Iterable[Path]) -> Iterator[None]:
        """While the body makes or removes links to `files`: what was known of them stays known.

        A link changes the time of status change and nothing else.
        """
        stats = {file: file.stat() for file in files}
        yield
        for file, before in stats.items():
            known = self._known(before)
            if known is None or not file.exists():
                continue
            after, settled = _settled(file)
            if settled and _identity(after)[1:] == _identity(before)[1:]:
                _write(self._note(after), known)

    def _known(self, stat: os.stat_result) -> str | None:
        try:
            known = self._note(stat).read_text()
        except OSError:
            return None
        return known if len(known) == 64 else None

    def _note(self, stat: os.stat_result) -> Path:
        return self.root / "digests" / key_of(_identity(stat))

    def _results(self) -> list[Path]:
        return [
            folder
            for folder in self.root.iterdir()
            if folder.is_dir() and not folder.name.startswith(".") and (folder / SEAL).is_file()
        ]

    def _drop(self, folder: Path) -> bool:
        """Remove `folder` unless another process makes or uses it."""
        with ExitStack() as stack:
            for kind in ("make", "use"):
                lock = stack.enter_context(self._lock(folder.name.removeprefix("."), kind))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return False
            shutil.rmtree(folder, ignore_errors=True)
        return True

    def _hold(self, name: str) -> None:
        if name not in self.used:
            lock = self._held.enter_context(self._lock(name, "use"))
            fcntl.flock(lock, fcntl.LOCK_SH)
            self.used[name] = None

    @contextmanager
    def _making(self, name: str) -> Iterator[None]:
        with self._lock(name, "make") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _lock(self, name: str, kind: str) -> Iterator[int]:
        path = self.root / LOCKS / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

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


@contextmanager
def locked(out: Path) -> Iterator[Path]:
    """The folder beside `out` while this is the one build that makes `out`; what a killed one left half written is removed."""
    folder = beside(out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".lock-{out.name}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BuildError(f"{out}: another fluxc build is making it; wait for that, or give another --out") from None
        for leftover in folder.glob(f".{out.name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield folder


def _identity(stat: os.stat_result) -> list[int]:
    """What says that a file is the same as before; the time of status change first, which every link changes."""
    return [stat.st_ctime_ns, stat.st_mtime_ns, stat.st_size, stat.st_dev, stat.st_ino]


def _settled(path: Path) -> tuple[os.stat_result, bool]:
    """What the file system says of `path`, and whether a change from now on would show in it; waits for a tick if need be."""
    stat = path.stat()
    coarse = not (stat.st_ctime_ns % 1_000_000_000 or stat.st_mtime_ns % 1_000_000_000)
    tick = COARSE_TICK_NS if coarse else TICK_NS
    for _ in range(READS):
        left = stat.st_ctime_ns + tick - time.time_ns()
        if left <= 0:
            return stat, True
        if left > TICK_NS:
            break
        time.sleep(left / 1e9)
        stat = path.stat()
    return stat, False


def _size(folder: Path) -> int:
    """Bytes of a folder's own files; a link to a bundle's takes none."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += 0 if path.is_symlink() else path.stat().st_size
    return total


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
