"""Files of what was measured on a model: safetensors with one metadata entry, `fluxc`, that says on what and how.

The entry is JSON: format, format version, hashes of the checkpoint's files, the request (prompts, steps, guidance, size, seed,
text length), how the model ran, and the tools. The same measurements give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from fluxc.base.errors import BuildError, CheckpointError
from fluxc.base.safetensors import read_header
from fluxrt.safetensors import raw_header

CHECKPOINT_PARTS = ("", "transformer", "text_encoder", "tokenizer", "scheduler")
"""The parts of a checkpoint that measurements depend on."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: its format's name and version, what messages call it, and the verb that makes one."""

    format: str
    version: int
    noun: str
    verb: str

    @property
    def advice(self) -> str:
        return f"`fluxc {self.verb} RECIPE --out FILE` makes one"


@dataclass(frozen=True)
class Origin:
    """What was measured: {component: {file: SHA-256}}, the request, where and how the model ran, tool versions."""

    checkpoint: dict[str, dict[str, str]]
    request: dict[str, Any]
    ran: str
    tools: dict[str, str]


class Measured(Protocol):
    """A file that was read, with its origin."""

    @property
    def path(self) -> Path: ...
    @property
    def origin(self) -> Origin: ...


def write_measured(path: Path, kind: Kind, origin: Origin, tensors: dict[str, np.ndarray]) -> None:
    """Write `path`; it appears when complete."""
    from safetensors.numpy import save

    about = {"format": kind.format, "format_version": kind.version, **origin.__dict__}
    data = save(tensors, metadata={"fluxc": json.dumps(about, sort_keys=True, allow_nan=False)})
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_measured(
    path: Path, kind: Kind, is_wanted: Callable[[str], bool] = lambda _: True
) -> tuple[Origin, dict[str, np.ndarray]]:
    """Origin of `path`, and those of its tensors whose names are wanted. Raises CheckpointError if it is damaged or of another
    kind, BuildError if it is of another version."""
    from safetensors import safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such {kind.noun}; {kind.advice}")
    try:
        read_header(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: damaged, or not a {kind.noun} ({error}); {kind.advice}") from error
    try:
        about = json.loads(raw_header(path)[0]["__metadata__"]["fluxc"])
        known = about.pop("format") == kind.format
        version = about.pop("format_version")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        known = False
    if not known:
        raise CheckpointError(f"{path}: not a {kind.noun}; {kind.advice}")
    if version != kind.version:
        raise BuildError(
            f"{path}: {kind.noun.removesuffix(' file')} format {version}, this fluxc reads {kind.version}; "
            f"`fluxc {kind.verb}` again with this version"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if is_wanted(name)}  # noqa: SIM118
        return msgspec.convert(about, Origin), tensors
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: damaged: {error}; {kind.advice}") from error


def check_origin(file: Measured, checkpoint: dict[str, dict[str, str]], request: dict[str, Any]) -> None:
    """Refuse a file made from another checkpoint or for another request, naming what differs (BuildError)."""
    for part in CHECKPOINT_PARTS:
        theirs, ours = file.origin.checkpoint.get(part, {}), checkpoint.get(part, {})
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                raise BuildError(
                    f"{file.path}: made from another checkpoint: {'/'.join(filter(None, (part, name)))} is a different "
                    "file there; measure this checkpoint, or point the recipe at the other one"
                )
    check_request(file, request)


def check_request(file: Measured, request: dict[str, Any]) -> None:
    """Refuse a file made for another request, naming what differs (BuildError)."""
    for name, asked in request.items():
        measured = file.origin.request.get(name)
        if measured != asked:
            shown = "" if name in ("prompts", "precision") else f" ({measured} there, {asked} in the recipe)"
            raise BuildError(
                f"{file.path}: made with other {name}{shown}; measure again, or set the recipe back to what it was"
            )
