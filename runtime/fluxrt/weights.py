"""Reads weights files: where each tensor lies, and its bytes by memory map."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxrt.errors import BundleError
from fluxrt.safetensors import HeaderError, raw_header

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
        header, start = raw_header(file)
    except HeaderError as error:
        raise BundleError(f"{file}: {error}; copy the bundle again or rebuild it") from error
    header.pop("__metadata__", None)
    try:
        tensors = {
            name: StoredTensor(entry["dtype"], file, start + entry["data_offsets"][0], _length(entry))
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BundleError(f"{file}: its header is damaged ({error}); copy the bundle again or rebuild it") from error
    size = file.stat().st_size
    for name, tensor in tensors.items():
        if tensor.nbytes < 0 or tensor.offset < start or tensor.offset + tensor.nbytes > size:
            raise BundleError(f"{file}: tensor {name!r} leaves the file; copy the bundle again or rebuild it")
    return tensors


def component_weights(bundle: Bundle, entry: str) -> dict[str, StoredTensor]:
    """Every tensor of a component, from its weights file or the files of its index."""
    return {name: tensor for file in weights_files(bundle, entry) for name, tensor in read_weights(file).items()}


def weights_files(bundle: Bundle, entry: str) -> list[Path]:
    """The safetensors files of a component, from its one file or its index."""
    path = bundle.path(entry)
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: the index is damaged ({error}); copy the bundle again or rebuild it") from error
    return [bundle.path((Path(entry).parent / name).as_posix()) for name in names]


def _length(entry: dict[str, Any]) -> int:
    start, stop = entry["data_offsets"]
    return int(stop) - int(start)
