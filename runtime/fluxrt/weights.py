"""Reads weights files: where each tensor lies, and its bytes by memory map."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxrt.errors import BundleError
from fluxrt.safetensors import HeaderError, header_entries

if TYPE_CHECKING:
    import numpy as np

    from fluxrt.bundle import Bundle

BITS = {
    "float4_e2m1": 4,
    "bool": 8,
    "float8_e4m3fn": 8,
    "bfloat16": 16,
    "float16": 16,
    "float32": 32,
    "int64": 64,
}
STORED_AS = {
    "float4_e2m1": "U8",
    "float8_e4m3fn": "F8_E4M3",
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "int64": "I64",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: dtype as safetensors names it, file, offset and bytes."""

    dtype: str
    file: Path
    offset: int
    nbytes: int

    def read(self) -> np.ndarray:
        """Its bytes as a read-only memory map, uint8."""
        import numpy as np

        if not self.nbytes:
            return np.empty(0, np.uint8)
        return np.memmap(self.file, np.uint8, "r", offset=self.offset, shape=(self.nbytes,))


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * BITS[dtype] // 8


def read_weights(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; BundleError when its header is not in order."""
    try:
        entries, _ = header_entries(file)
    except HeaderError as error:
        raise BundleError(f"{file}: {error}; copy the bundle again or rebuild it") from error
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror}; copy the bundle again or rebuild it") from error
    return {
        name: StoredTensor(entry.dtype, file, entry.start, entry.stop - entry.start) for name, entry in entries.items()
    }


def component_weights(bundle: Bundle, entry: str) -> dict[str, StoredTensor]:
    """Every tensor of a component, from its weights file or the files of its index."""
    return {name: tensor for file in weights_files(bundle, entry) for name, tensor in read_weights(file).items()}


def weights_files(bundle: Bundle, entry: str) -> list[Path]:
    """The safetensors files of a component, from its one file or its index."""
    path = bundle.path(entry)
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [(Path(entry).parent / name).as_posix() for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: the index is damaged ({error}); copy the bundle again or rebuild it") from error
    return [bundle.path(file) for file in files]
