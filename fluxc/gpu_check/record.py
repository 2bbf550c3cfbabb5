"""The file of a GPU check: what ran, the outcome of every check, and a seal that a damaged or shortened file breaks."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import msgspec

from fluxc.base.errors import BuildError
from fluxc.base.numbers import as_json

FORMAT = "fluxc-gpu-check"
FORMAT_VERSION = 1
RAN = "What one GPU did with one bundle, written by `fluxc gpu-check` or `fluxc finish`."
REHEARSED = "REHEARSAL: a made-up GPU on a CPU. No figure in this file means anything."

Status = Literal["passed", "failed", "crashed", "timed out", "skipped"]


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a check ended after so many seconds: `why` it did not pass, what it measured, the end of what its process said."""

    status: Status
    seconds: float = 0.0
    why: str = ""
    figures: dict[str, Any] = {}
    log: str = ""


class Ran(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ran, and on what.

    `bundle` is its digest without evidence, `files` the SHA-256 of every graph, plan and weights file by name, `device` the
    GPUs and their driver, `versions` those of the libraries, fluxc and fluxrt with a digest of their source.
    """

    name: str
    bundle: str
    files: dict[str, str]
    device: dict[str, Any]
    versions: dict[str, str]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that the file holds."""

    notice: str
    format: str
    format_version: int
    rehearsal: bool
    ran: Ran
    checks: dict[str, Outcome]
    seal: str = ""

    @property
    def failed(self) -> list[str]:
        """The checks that neither passed nor were skipped."""
        return [name for name, found in self.checks.items() if found.status not in ("passed", "skipped")]


class _Head(msgspec.Struct):
    """The fields every format version has."""

    format: str = ""
    format_version: int = 0


def new_record(ran: Ran, rehearsal: bool) -> Record:
    """A record without checks."""
    return Record(REHEARSED if rehearsal else RAN, FORMAT, FORMAT_VERSION, rehearsal, ran, {})


def seal_of(record: Record) -> str:
    """SHA-256 of the record's canonical JSON without its seal."""
    plain = msgspec.to_builtins(record)
    plain.pop("seal")
    return hashlib.sha256(msgspec.json.encode(plain, order="deterministic")).hexdigest()


def write_record(path: Path, record: Record) -> None:
    """Write `path` by rename; its first line says what the file is."""
    sealed = msgspec.structs.replace(record, seal=seal_of(record))
    text = as_json(msgspec.to_builtins(sealed), "gpu-check", indent=1)
    write_by_rename(path, (text.replace("{\n ", "{", 1) + "\n").encode())


def write_by_rename(path: Path, data: bytes) -> None:
    """Write a file that is either the old or the new one, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gpu-check-", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def read_record(path: Path) -> Record:
    """The record in `path`; BuildError if it is missing, damaged, or of another format."""
    advice = "`fluxc gpu-check BUNDLE --out FILE` makes one; copy it again, or run the check again"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path}: cannot be read: {error.strerror}; {advice}") from None
    try:
        head = msgspec.json.decode(raw, type=_Head)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BuildError(f"{path}: damaged, or not a file of gpu-check: {error}; {advice}") from None
    if head.format != FORMAT:
        raise BuildError(f"{path}: not a file of gpu-check; {advice}")
    if head.format_version != FORMAT_VERSION:
        raise BuildError(
            f"{path}: gpu-check format {head.format_version}, this fluxc reads {FORMAT_VERSION}; use the fluxc that wrote it, "
            "or run the check again"
        )
    try:
        record = msgspec.json.decode(raw, type=Record)
    except (msgspec.MsgspecError, json.JSONDecodeError) as error:
        raise BuildError(f"{path}: damaged: {error}; {advice}") from None
    if record.seal != seal_of(record):
        raise BuildError(
            f"{path}: damaged or altered: its seal {record.seal[:12] or '(none)'} is not that of what it holds; {advice}"
        )
    return record
