"""The header of a safetensors file: 8 bytes of its length, little-endian, JSON, then data.

The safetensors library hides byte offsets, which graphs and engines need. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

MAX_HEADER = 100_000_000
"""The safetensors library's own limit."""
MAX_NUMBER = 1 << 62


class HeaderError(ValueError):
    """What is wrong with a header, as a clause for a message that names the file and says what to do."""


@dataclass(frozen=True)
class HeaderEntry:
    """What a header says of a tensor: dtype and shape, and its bytes `start:stop` in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def raw_header(file: Path) -> tuple[dict[str, Any], int]:
    """The entries of `file`'s header, `__metadata__` among them where there is one, and where its data begin.

    Raises HeaderError, or OSError if there is no such file.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            raise HeaderError(f"truncated: {size} bytes, too short for its own header")
        if length > MAX_HEADER:
            raise HeaderError(f"not a safetensors file: a header of {length} bytes, more than {MAX_HEADER}")
        try:
            header = json.loads(opened.read(length).decode(), object_pairs_hook=_without_repeats)
        except HeaderError:
            raise
        except (ValueError, RecursionError) as error:
            raise HeaderError(f"not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise HeaderError("not a safetensors file: its header is no JSON object")
    return header, 8 + length


def header_entries(file: Path) -> tuple[dict[str, HeaderEntry], int]:
    """The tensors of `file` by name, in the header's order, and where its data begin; each lies within the file.

    Errors as raw_header's.
    """
    header, start = raw_header(file)
    size = file.stat().st_size
    entries = {name: _entry(name, said, start) for name, said in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        if entry.stop > size:
            raise HeaderError(f"truncated: tensor {name!r} ends at byte {entry.stop} of {size}")
    return entries, start


def _entry(name: str, said: Any, start: int) -> HeaderEntry:
    if not isinstance(said, Mapping):
        raise HeaderError(f"not a safetensors file: the entry of tensor {name!r} is no JSON object")
    dtype, shape, offsets = said.get("dtype"), said.get("shape"), said.get("data_offsets")
    if not isinstance(dtype, str):
        raise HeaderError(f"not a safetensors file: the dtype of tensor {name!r} is {dtype!r}")
    if not _is_counts(shape):
        raise HeaderError(f"not a safetensors file: the shape of tensor {name!r} is {shape!r}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"not a safetensors file: the data_offsets of tensor {name!r} are {offsets!r}")
    return HeaderEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < MAX_NUMBER for value in values)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a name that is there twice, readers would take different entries."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise HeaderError(
            f"not a safetensors file: {next(n for n in names if names.count(n) > 1)!r} is in its header twice"
        )
    for name in found:
        name.encode()
    return found
