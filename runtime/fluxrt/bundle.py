"""A bundle: opening one, its targets, and checking its files.

Opening reads the manifest alone and checks the format version, the manifest's own digest, that every path stays inside
the bundle, and the size of every file. Hashes are checked by `verify_files`, and by `checked_file` for whatever is
about to be executed.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from stat import S_ISREG

import msgspec

from fluxrt.errors import BundleError, RequestError
from fluxrt.install import update
from fluxrt.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    NO_JSON,
    READABLE,
    File,
    Manifest,
    Target,
    decode_manifest,
    manifest_digest,
)

IGNORED = (".DS_Store", "Thumbs.db", "desktop.ini", ".directory")
"""Files that file managers leave in any folder they show. No loader takes one for a part of a bundle; macOS's `._NAME` files
are not among them, because a loader that looks for *.safetensors does."""


class _Head(msgspec.Struct):
    """The two fields every format version has."""

    format: str = ""
    format_version: int = 0


class Bundle:
    """An opened bundle: its folder and its manifest."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    def path(self, name: str) -> Path:
        """The path of file `name`; the manifest must list it."""
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.root}: the manifest refers to {name!r} but does not list it under files; rebuild the bundle"
            )
        return self.root / name

    def checked_file(self, name: str) -> Path:
        """The path of file `name` after its SHA-256 matched the manifest; for whatever will be executed."""
        path = self.path(name)
        if _readable_digest(path) != self.manifest.files[name].sha256:
            raise BundleError(
                f"{path}: its SHA-256 is not the one in {MANIFEST}, so it will not be run; "
                "copy the bundle again from where it was built, or rebuild it"
            )
        return path

    def target(self, name: str | None) -> Target:
        """The target called `name`, or the first one; RequestError lists those there are."""
        targets = self.manifest.targets
        for target in targets:
            if name is None or target.name == name:
                return target
        known = ", ".join(t.name for t in targets) or "none"
        raise RequestError(f"{self.root}: no target {name!r} in this bundle; it has: {known}")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as hexadecimal text, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _readable_digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(f"{path}: it cannot be read: {error.strerror}; mend that, or copy the bundle again")


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read and check `path/bundle.json` and the sizes of the files it lists; nothing else is read.

    Raises BundleError naming the file and what to do.
    """
    # A process may go to another folder while it has the bundle open.
    root = Path(path).absolute()
    manifest_path = root / MANIFEST
    try:
        if not root.is_dir():
            raise BundleError(f"{root}: no such bundle folder; `fluxc build RECIPE` makes one")
        raw = manifest_path.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{root}: there is no {MANIFEST}, so this is not a fluxc bundle") from None
    except OSError as error:
        raise _unreadable(manifest_path, error) from None
    _check_format(manifest_path, raw)
    try:
        manifest = decode_manifest(raw)
    except NO_JSON as error:
        raise BundleError(f"{manifest_path}: not a valid manifest: {error}; rebuild the bundle") from error
    if manifest_digest(manifest) != manifest.digest:
        raise BundleError(f"{manifest_path}: it was altered after the build (its digest does not match); rebuild")
    for name, file in manifest.files.items():
        _check_file(root, name, file)
    return Bundle(root, manifest)


def verify_files(bundle: Bundle) -> None:
    """Check the SHA-256 of every file in the manifest and that no other file lies in the bundle, but those in IGNORED.

    Raises BundleError naming every damaged or foreign file.
    """
    damaged = [
        name for name, file in bundle.manifest.files.items() if _readable_digest(bundle.root / name) != file.sha256
    ]
    known = {MANIFEST, *bundle.manifest.files}
    present = {
        path.relative_to(bundle.root).as_posix()
        for path in bundle.root.rglob("*")
        if not is_ignored(path) and (path.is_symlink() or not path.is_dir())
    }
    foreign = sorted(present - known)
    problems = [f"altered: {', '.join(sorted(damaged))}"] if damaged else []
    problems += [f"not listed in the manifest: {', '.join(foreign)}"] if foreign else []
    if problems:
        raise BundleError(f"{bundle.root}: {'; '.join(problems)}; copy the bundle again or rebuild it")


def is_ignored(path: Path) -> bool:
    """Whether `path` is a file manager's own file, not a link, which says nothing of the bundle it lies in."""
    return path.name in IGNORED and path.is_file() and not path.is_symlink()


def _check_format(path: Path, raw: bytes) -> None:
    try:
        head = msgspec.json.decode(raw, type=_Head)
    except NO_JSON as error:
        raise BundleError(f"{path}: not readable as JSON: {error}; rebuild the bundle") from error
    if head.format != FORMAT:
        raise BundleError(f"{path}: its format is {head.format!r}, not {FORMAT!r}; this is not a fluxc bundle")
    if head.format_version not in READABLE:
        older = "build the bundle again from its recipe, or take the fluxrt that came with the fluxc that built it"
        raise BundleError(
            f"{path}: it has bundle format {head.format_version}, this fluxrt reads format {FORMAT_VERSION}; "
            f"{older if head.format_version < FORMAT_VERSION else update('fluxrt')}"
        )


def _check_file(root: Path, name: str, file: File) -> None:
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or {"\\", "\0"} & set(name) or pure.as_posix() != name:
        raise BundleError(f"{root / MANIFEST}: the path {name!r} leaves the bundle or is not plain; refused")
    path = root / name
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise BundleError(f"{path}: listed in {MANIFEST} but missing; copy the bundle again or rebuild it") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if not S_ISREG(stat.st_mode):
        raise BundleError(f"{path}: it is not a file; copy the bundle again or rebuild it")
    if not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{path}: a link that leaves the bundle; refused")
    if stat.st_size != file.size:
        raise BundleError(
            f"{path}: {stat.st_size} bytes, but {MANIFEST} says {file.size}; it is truncated or altered, "
            "copy the bundle again or rebuild it"
        )
