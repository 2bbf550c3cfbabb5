"""Stages and the loop that runs them.

A stage is a frozen struct of inputs and a function of them. The struct is all the function reads, and with the code of the
function's module all that the cache key hashes:

1. Plain values count as they are, structs and dataclasses by their fields.
2. A Path counts by the content of the file it names, a TensorRef by its place in a file of that name (what a graph points to).
3. An object with a method `fingerprint` says itself what counts of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from fluxc.base.cache import StageCache, UnknownDigestError
from fluxc.base.errors import BuildError
from fluxc.base.output import names_place
from fluxc.base.progress import Report
from fluxc.base.safetensors import TensorRef
from fluxrt.memory import return_memory

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


class Fingerprinted(Protocol):
    """What says itself what a cache key takes of it: a JSON-like value."""

    def fingerprint(self) -> Any: ...


@dataclass(frozen=True)
class Stage(Generic[Inputs, Result]):
    """A piece of work: `run(inputs, folder, report)` writes a result into an empty folder, `load` reads it.

    `name` begins the result's folder name, `title` is shown. `run` must be a function of a module, whose code the key takes in.
    """

    name: str
    title: str
    inputs: Inputs
    run: Callable[[Inputs, Path, Report], None]
    load: Callable[[Path], Result]


def fingerprint(value: Any, digest: Callable[[Path], str]) -> Any:
    """`value` as JSON, equal only for inputs that are; `digest` gives a file's hash. TypeError for what has no such form."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return digest(value.resolve())
    if isinstance(value, TensorRef):
        return [value.name, value.dtype, list(value.shape), value.file.name, value.offset, value.begins_at]
    if hasattr(value, "fingerprint"):
        return value.fingerprint()
    if isinstance(value, Mapping):
        return {str(key): fingerprint(item, digest) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [fingerprint(item, digest) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(fingerprint(item, digest) for item in value)
    if isinstance(value, msgspec.Struct) or dataclasses.is_dataclass(value):
        names = (
            value.__struct_fields__
            if isinstance(value, msgspec.Struct)
            else [f.name for f in dataclasses.fields(value)]
        )
        fields = {name: fingerprint(getattr(value, name), digest) for name in names}
        return {"type": type(value).__qualname__, **fields}
    raise TypeError(f"{type(value).__qualname__} has no fingerprint, so no stage can take it as an input")


def folder_of(cache: StageCache, stage: Stage[Inputs, Result], digest: Callable[[Path], str] | None = None) -> Path:
    """Where the result of `stage` is, or would be; `digest` gives hashes of files, by default those of the cache."""
    inputs = fingerprint(stage.inputs, digest or cache.file_digest)
    return cache.folder(stage.name, inputs, stage.run.__module__)


def run(cache: StageCache, stage: Stage[Inputs, Result]) -> Result:
    """The result of `stage`: from the cache, or made.

    Raises BuildError where a file that it was made from is another one by then, since the key names the one before, and where
    there is no room for the result.
    """
    given: dict[Path, str] = dict(_hashed_files(stage.inputs))

    def digest(path: Path) -> str:
        given[path] = cache.file_digest(path)
        return given[path]

    def work(path: Path, report: Report) -> None:
        stage.run(stage.inputs, path, report)
        # glibc keeps what a stage freed, and the next one has a need of its own.
        return_memory()
        for file, before in given.items():
            if not file.is_relative_to(cache.root) and not (file.is_file() and cache.file_digest(file) == before):
                raise BuildError(f"{file}: it changed while the build read it ({stage.title}); build again")

    folder = folder_of(cache, stage, digest)
    with names_place(stage.title, cache.root):
        made = cache.run(folder, stage.title, work)
    cache.progress.explain(f"{stage.title}: {made}")
    return stage.load(made)


def _hashed_files(value: Any) -> Iterator[tuple[Path, str]]:
    """The files that `value`, a stage's inputs, brings with their hashes."""
    if hasattr(value, "hashed_files"):
        yield from value.hashed_files().items()
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _hashed_files(getattr(value, field.name))


class NotBuiltError(Exception):
    """A stage asked for the result of another, which is not there yet."""


class Results:
    """Results by name of the step; asking for one that is not there is a NotBuiltError."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._found:
            raise NotBuiltError(name)
        return self._found[name]

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def get(self, name: str) -> Any:
        """The result of the step `name`; None where there is no such step, or it had nothing to do."""
        return self._found.get(name)

    def add(self, name: str, result: Any) -> None:
        """Keep the result of the step `name`."""
        self._found[name] = result


@dataclass(frozen=True)
class Step:
    """A step of a build: its name among the results, what `--until` calls it, and the stage it comes to after what came before.

    `make` gives None where there is nothing to do. Asking `results` for what is not there ends a dry run of this step.
    """

    name: str
    part: str
    make: Callable[[Results], Stage[Any, Any] | None]


def run_steps(cache: StageCache, steps: Iterable[Step], results: Results, until: str | None = None) -> None:
    """Run `steps` in order, with `until` up to the last of that part, adding to `results`."""
    for step in up_to(steps, until):
        stage = step.make(results)
        results.add(step.name, None if stage is None else run(cache, stage))


def up_to(steps: Iterable[Step], until: str | None) -> list[Step]:
    """`steps` up to the last of the part `until`; all of them where it is None or names none of theirs."""
    listed = list(steps)
    last = max((at for at, step in enumerate(listed) if step.part == until), default=len(listed) - 1)
    return listed[: last + 1]


def count_steps(steps: Iterable[Step]) -> int:
    """How many of `steps` have something to do, as far as that is known before any of them was run."""
    results, count = Results(), 0
    for step in steps:
        with suppress(NotBuiltError):
            if step.make(results) is None:
                results.add(step.name, None)
                continue
        count += 1
    return count


def plan_steps(cache: StageCache, steps: Iterable[Step]) -> list[tuple[Step, str]]:
    """What running `steps` would do, in words for each: "cached", "to run", or "nothing to do". Runs and writes no result."""
    results, found = Results(), []
    for step in steps:
        try:
            stage = step.make(results)
            folder = None if stage is None else cache.find(folder_of(cache, stage, cache.known_digest))
        except (NotBuiltError, UnknownDigestError):
            found.append((step, "to run"))
            continue
        if stage is None:
            results.add(step.name, None)
            found.append((step, "nothing to do"))
        elif folder is None:
            found.append((step, "to run"))
        else:
            results.add(step.name, stage.load(folder))
            found.append((step, "cached"))
    return found
