"""JSON objects of a checkpoint: read, and taken as structs whose fields have types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fluxc.base.errors import CheckpointError

Struct = TypeVar("Struct", bound=msgspec.Struct)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        # An escape may stand for half a surrogate pair, which no text may hold.
        json.dumps(value, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}; use the file as published") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, not an object; use the file as published")
    return value


def as_struct(kind: type[Struct], value: Any, file: Path) -> Struct:
    """`value`, which `file` holds, as a `kind`; fields it does not have are left alone.

    Raises CheckpointError naming the field that is missing, of another type or out of its range.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        said = str(error).replace("Object missing required field", "it lacks").replace("$.", "")
        raise CheckpointError(f"{file}: {said}; use the file as published") from error
