"""Checkpoints on the Hugging Face hub, read through huggingface_hub and its cache (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE).

1. Opening downloads the small files alone: configs, tokenizer, indexes, licence. What is in the cache is not asked for again.
2. Which files hold the weights is decided on the repository's listing, by the rules for folders (weight_files). Neither other
   variants and formats nor files outside of the components' folders are ever downloaded.
3. Weights that are not in the cache are outlined: a sparse file of the same size and header, its scales filled in, read by
   range requests. A plan reads names, shapes, sizes and scales, and finds them there; other values are zeros.
4. A build fetches the files behind the outlines, after everything that can be refused was (fluxc.checkpoint.fetch).
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fluxc.base.errors import BuildError, CheckpointError
from fluxc.base.safetensors import read_header
from fluxc.checkpoint.hub_errors import telling
from fluxc.checkpoint.named import OnHub
from fluxc.checkpoint.weight_files import find_weights
from fluxrt.safetensors import MAX_HEADER

SMALL = ("json", "txt", "jinja", "model")
"""Suffixes of the files of a component that are no weights."""
ABOUT = ("model_index.json", "LICENSE*", "LICENCE*", "NOTICE*", "README.md")
FIRST = 512 << 10
"""Bytes that are asked for before the length of a header is known; most headers are shorter."""
SCALES = (".input_scale", ".weight_scale", ".weight_scale_2", ".pre_quant_scale")
LARGEST_SCALE, GAP = 128 << 10, 256 << 10
"""Bytes: scales up to the one are filled in, together where no more than the other lies between them."""
CONNECTIONS = 8
TIMEOUT = 30.0
"""Seconds."""

Commits = MutableMapping[str, str]
"""The commit of each repository and revision that was opened: what is opened again is the same, though the branch moves."""


@dataclass(frozen=True)
class Missing:
    """A file of weights that is not in the cache: the repository's commit, its path there, its bytes, and its outline here."""

    repo: str
    commit: str
    path: str
    size: int
    outline: Path


@dataclass(frozen=True)
class Snapshot:
    """The small files of a repository at one commit, in the cache folder `root`. `before`: the commit that the cache knew."""

    repo: str
    revision: str | None
    commit: str
    root: Path
    before: str | None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the repository by its path; where the listing is not known, of those that are in the cache."""
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            return {file.path: file.size for file in get_cached_repo_tree(self.repo, revision=self.commit)}
        except CachedRepoTreeNotFoundError:
            here = [file for file in self.root.rglob("*") if file.is_file()]
            return {file.relative_to(self.root).as_posix(): file.stat().st_size for file in here}

    @property
    def moved(self) -> str | None:
        """A sentence, where the branch is at another commit than the last time."""
        if self.before in (None, self.commit):
            return None
        return (
            f"{self.repo}: {self.revision or 'main'} is at commit {self.commit} now, and was at {self.before} the last time; "
            f"`model.revision: {self.before}` keeps the one before"
        )


class Scratch:
    """A folder for outlines, which is gone when nothing refers to this any more."""

    @cached_property
    def folder(self) -> Path:
        """Made when it is first asked for; BuildError where no temporary folder can be."""
        try:
            folder = Path(tempfile.mkdtemp(prefix="fluxc-outline-"))
        except OSError as error:
            raise BuildError(
                f"no temporary folder can be made ({error.strerror or error}); set TMPDIR to a folder that can be written"
            ) from error
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def place(self, snapshot: Snapshot) -> Path:
        """Where outlines of a repository are; below `folder`, their paths are what messages say."""
        return self.folder / f"{snapshot.repo}@{snapshot.commit[:12]}"

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Raise CheckpointErrors of the body with the repository's name in place of a path of an outline."""
        try:
            yield
        except CheckpointError as error:
            if "folder" not in self.__dict__:  # nothing is outlined
                raise
            raise CheckpointError(str(error).replace(f"{self.folder}/", "")) from error


def open_snapshot(place: OnHub, components: Iterable[str], commits: Commits) -> Snapshot:
    """The repository with the small files of `components`, those of the repository itself, and no weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from fluxc.checkpoint.fetch import silent

    pinned = commits.get(_key(place))
    patterns = [*ABOUT, *(f"{name}/*.{suffix}" for name in components for suffix in SMALL)]
    asked: dict[str, Any] = {"revision": pinned or place.revision, "tqdm_class": silent()}
    before = None
    if pinned is None:
        with telling(place):
            try:
                before = Path(snapshot_download(place.repo, local_files_only=True, allow_patterns=["-"], **asked)).name
            except LocalEntryNotFoundError:
                before = None
    with telling(place):
        root = Path(snapshot_download(place.repo, allow_patterns=patterns, **asked))
    commits[_key(place)] = root.name
    return Snapshot(place.repo, place.revision, root.name, root, before)


def component_folder(
    snapshot: Snapshot, name: str, variant: str | None, scratch: Scratch
) -> tuple[Path, tuple[Missing, ...]]:
    """The folder of a component with weights: of the cache, or, where some are not there, one with outlines of these."""
    listed = [path for path in snapshot.sizes if path.startswith(f"{name}/") and path.count("/") == 1]
    here = snapshot.root / name
    absent = {path for path in listed if path.endswith(".safetensors") and not (snapshot.root / path).exists()}
    if not absent or not here.is_dir():
        return here, ()
    folder = scratch.place(snapshot) / name
    folder.mkdir(parents=True)
    for file in here.iterdir():
        (folder / file.name).symlink_to(file)
    for path in absent:
        (folder / Path(path).name).touch()
    wanted = {file.name for file in find_weights(folder, variant).files}
    missing = [
        outline(snapshot, path, folder / Path(path).name) for path in sorted(absent) if Path(path).name in wanted
    ]
    return (folder, tuple(missing)) if missing else (here, ())


def component_file(snapshot: Snapshot, path: str, scratch: Scratch) -> tuple[Path, tuple[Missing, ...]]:
    """A file of weights: in the cache, or its outline."""
    if (snapshot.root / path).is_file():
        return snapshot.root / path, ()
    if path not in snapshot.sizes:
        near = [other for other in snapshot.sizes if other.endswith(".safetensors")]
        known = f"; its .safetensors files are {', '.join(near[:6])}" if near else ""
        raise CheckpointError(f"{snapshot.repo}: there is no file {path!r} at {snapshot.revision or 'main'}{known}")
    file = scratch.place(snapshot) / path
    file.parent.mkdir(parents=True, exist_ok=True)
    return file, (outline(snapshot, path, file),)


def outline(snapshot: Snapshot, path: str, file: Path) -> Missing:
    """What an outline at `file` is of; nothing is in it yet."""
    return Missing(snapshot.repo, snapshot.commit, path, snapshot.sizes[path], file)


def fill(missing: Iterable[Missing]) -> None:
    """Read the headers and scales of the files into their outlines; CheckpointError, offline without asking."""
    from huggingface_hub import is_offline_mode

    missing = list(missing)
    if missing and is_offline_mode():
        first = missing[0]
        names = ", ".join(entry.path for entry in missing if entry.repo == first.repo)
        raise CheckpointError(
            f"{first.repo}: the cache lacks {names} of commit {first.commit}, and HF_HUB_OFFLINE is set; unset it to download "
            "them, or copy the cache of a machine that has them (HF_HUB_CACHE)"
        )
    with ThreadPoolExecutor(CONNECTIONS, "fluxc-hub") as pool:
        list(pool.map(_fill, missing))


def _fill(entry: Missing) -> None:
    with telling(OnHub(entry.repo, entry.commit)):
        _read_into(entry)


def _read_into(entry: Missing) -> None:
    first = _bytes(entry, 0, min(FIRST, entry.size))
    length = 8 + int.from_bytes(first[:8], "little")
    if 8 + MAX_HEADER >= length > len(first):
        first += _bytes(entry, len(first), min(length, entry.size))
    with entry.outline.open("r+b" if entry.outline.exists() else "w+b") as file:
        file.write(first)
        file.truncate(entry.size)
        scales = sorted(
            (ref.offset, ref.offset + ref.nbytes)
            for name, ref in read_header(entry.outline).items()
            if name.endswith(SCALES) and ref.nbytes <= LARGEST_SCALE and ref.offset + ref.nbytes > len(first)
        )
        for start, stop in _together(scales):
            file.seek(start)
            file.write(_bytes(entry, start, stop))


def _together(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rising ranges, those that lie close to one another as one."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and start - found[-1][1] <= GAP:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    return found


def _bytes(entry: Missing, start: int, stop: int) -> bytes:
    """Bytes `start:stop` of the file on the hub, and no others, whatever the server sends."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(entry.repo, entry.path, revision=entry.commit)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        if response.status_code != 206 and start:
            raise CheckpointError(f"{url}: the server does not answer range requests; download it, and give the folder")
        found = b""
        for piece in response.iter_bytes():
            found += piece
            if len(found) >= stop - start:
                return found[: stop - start]
    raise CheckpointError(f"{url}: the answer ended after {len(found)} of {stop - start} bytes; run this again")


def _key(place: OnHub) -> str:
    return f"{place.repo}@{place.revision or ''}"
