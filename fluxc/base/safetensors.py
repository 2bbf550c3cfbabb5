"""Reads safetensors files lazily: the header first, then only the bytes asked for, by memory map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluxc.base.errors import CheckpointError
from fluxrt.safetensors import HeaderError, header_entries

FLOATS = ("BF16", "F16", "F32")
"""Types of weights that are not quantized."""
ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies: dtype as safetensors names it, shape, file, byte offset from the file's start, bytes.

    The tensor begins `begins_at` bytes into those bytes, and what is before that place follows at its end: 0, but where a file
    holds the halves of a tensor in the other order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    begins_at: int = 0

    def bytes_view(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes `start:stop` of the tensor as uint8, writing to which does not reach the file: a memory map, or, where they do
        not lie together, a copy."""
        stop = self.nbytes if stop is None else stop
        first, last = start + self.begins_at, stop + self.begins_at
        if last <= self.nbytes:
            return self._stored(first, last)
        if first >= self.nbytes:
            return self._stored(first - self.nbytes, last - self.nbytes)
        return np.concatenate([self._stored(first, self.nbytes), self._stored(0, last - self.nbytes)])

    def _stored(self, start: int, stop: int) -> np.ndarray:
        if stop == start:
            return np.empty(0, dtype=np.uint8)
        return np.memmap(self.file, dtype=np.uint8, mode="c", offset=self.offset + start, shape=(stop - start,))


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of `path` by name, in file order.

    Raises CheckpointError for a file that is truncated, has gaps or overlaps, or is not safetensors.
    """
    try:
        entries, start = header_entries(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; download the file again") from error
    except HeaderError as error:
        raise CheckpointError(f"{path}: {error}; download the file again") from error
    tensors = {
        name: TensorRef(name, entry.dtype, entry.shape, path, entry.start, entry.stop - entry.start)
        for name, entry in entries.items()
    }
    size, position = path.stat().st_size, start
    for ref in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if ref.dtype not in ITEM_BITS:
            raise CheckpointError(f"{path}: tensor {ref.name!r} has dtype {ref.dtype}, which fluxc does not read")
        if ref.offset != position or ref.nbytes * 8 != math.prod(ref.shape) * ITEM_BITS[ref.dtype]:
            raise CheckpointError(f"{path}: tensor {ref.name!r} does not lie where its shape says; the file is damaged")
        position += ref.nbytes
    if position != size:
        raise CheckpointError(
            f"{path}: truncated or padded: {size} bytes, but its header describes {position}; download the file again"
        )
    return tensors
