"""Makes of a layer's stored weight what a graph multiplies by, once when it is loaded: int8 rows, or the values in fp32.

Values are stored as E2M1 pairs (the low nibble first), E4M3, bf16, fp16 or fp32, and stand for themselves times their scales:
one of the tensor, one a row, or one a block of values of a row. All is elementwise IEEE arithmetic in fp32, so that the
result is the same to the bit on any machine. Work goes by pieces that fit a core's cache, on all threads: numpy lets go of the
interpreter while it computes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from fluxrt.cores import usable_cores
from fluxrt.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import numpy as np

    from fluxrt.manifest import Unfold
    from fluxrt.weights import StoredTensor

INT8 = 127
"""The largest magnitude of an int8 row."""
ZERO_POINT = 128
"""What stands for 0 in a uint8 row."""
PIECE = 1 << 17
"""Values that are worked on at once: half a megabyte in fp32."""
TURNED = 128
"""Rows that are transposed at once: two cache lines of bytes."""
INPUTS = {"int8": ("int8", "row_scale"), "float32": ("float32",)}
"""What the inputs of a graph are called after the weight, by form."""


def unfold(
    wanted: Iterable[Unfold], stored: Mapping[str, StoredTensor], threads: int | None = None, *, signed: bool = True
) -> dict[str, np.ndarray]:
    """The arrays of `wanted` by input name.

    `int8`: rows [in, out] int8, or with `signed` false uint8 with zero point 128, and what a value of a row of the weight
    stands for, fp32 [out]: its largest magnitude / 127, 1 for a row of zeros. `float32`: [out, in].
    BundleError names a tensor that is missing or has another size than the manifest says.
    """
    entries = list(wanted)
    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        made = pool.map(lambda entry: _unfold_one(entry, stored, signed), entries)
        return {name: array for arrays in made for name, array in arrays.items()}


def unfolded_bytes(wanted: Iterable[Unfold]) -> int:
    """Bytes of the arrays of `wanted`."""
    total = 0
    for entry in wanted:
        rows, columns = entry.part[1] - entry.part[0], entry.shape[1]
        total += rows * columns + 4 * rows if entry.form == "int8" else 4 * rows * columns
    return total


def input_names(entry: Unfold) -> list[str]:
    """The inputs of a graph that take what is made for `entry`."""
    first, last = entry.part
    rows = "" if (first, last) == (0, entry.shape[0]) else f"[{first}:{last}]"
    return [f"{entry.layer}.weight{rows}/{part}" for part in INPUTS[entry.form]]


def _unfold_one(entry: Unfold, stored: Mapping[str, StoredTensor], signed: bool) -> dict[str, np.ndarray]:
    codes, scales = _read(entry, stored)
    dense = entry.form == "float32"
    arrays = (_dense(entry, codes, scales),) if dense else _int8_rows(entry, codes, scales, signed)
    return dict(zip(input_names(entry), arrays, strict=True))


def _read(entry: Unfold, stored: Mapping[str, StoredTensor]) -> tuple[np.ndarray, np.ndarray]:
    """Codes [out, in], of E2M1 bytes [out, in / 2], and scales fp32: [] of the tensor, [out, 1] of rows, [out, blocks]; of the
    rows that are unfolded."""
    import numpy as np

    rows, columns = entry.shape
    width = columns // 2 if entry.values == "e2m1" else columns
    codes = _tensor(f"{entry.layer}.weight", stored, rows * width * CODE_BYTES[entry.values])
    codes = codes.view(f"<u{CODE_BYTES[entry.values]}").reshape(rows, width)
    scales: np.ndarray = np.ones((), np.float32)
    for part in entry.scales:
        name = f"{entry.layer}.{part}"
        values = _scale_values(_tensor(name, stored), stored[name].dtype)
        scales = scales * (values.reshape(rows, -1) if values.size > 1 else values.reshape(()))
    if entry.block and scales.size == rows * (columns // entry.block):
        scales = scales.reshape(rows, -1)
    if entry.block and scales.shape != (rows, columns // entry.block):
        raise BundleError(
            f"the block scales of {entry.layer!r} have shape {list(scales.shape)}, not {[rows, columns // entry.block]}; "
            "the bundle is damaged: copy it again or rebuild it"
        )
    first, last = entry.part
    return codes[first:last], scales[first:last] if scales.ndim else scales


CODE_BYTES = {"e2m1": 1, "e4m3": 1, "bfloat16": 2, "float16": 2, "float32": 4}


def _tensor(name: str, stored: Mapping[str, StoredTensor], nbytes: int | None = None) -> np.ndarray:
    tensor = stored.get(name)
    if tensor is None or nbytes not in (None, tensor.nbytes):
        found = "is missing" if tensor is None else f"has {tensor.nbytes} bytes, not {nbytes}"
        raise BundleError(
            f"the tensor {name!r} of the weights file {found}; the bundle is damaged: copy it or rebuild it"
        )
    raw: np.ndarray = tensor.read()
    return raw


def _scale_values(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Scales as fp32: E4M3, E8M0 (stored as U8), or numbers."""
    import numpy as np

    values: np.ndarray
    if dtype == "F32":
        values = raw.view("<f4")
    elif dtype == "BF16":
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype in ("F8_E4M3", "U8"):
        values = (e4m3_table() if dtype == "F8_E4M3" else _e8m0_table())[raw]
    else:
        raise BundleError(f"scales of type {dtype} are not known; bring fluxrt up to date, or rebuild the bundle")
    return values


@cache
def e4m3_table() -> np.ndarray:
    """The value of every E4M3 code, fp32 [256]."""
    import numpy as np

    code = np.arange(256)
    low, exponent = code & 7, (code >> 3) & 15
    values = np.where(exponent == 0, low * 2.0**-9, (8 + low) * 2.0 ** (exponent - 10.0))
    values[(code & 127) == 127] = np.nan
    return np.where(code < 128, values, -values).astype(np.float32)


@cache
def _e8m0_table() -> np.ndarray:
    """The value of every E8M0 code, fp32 [256]: powers of two, the last no number."""
    import numpy as np

    with np.errstate(over="ignore"):
        values = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
    values[255] = np.nan
    return values


@cache
def e2m1_pairs() -> np.ndarray:
    """The two values of every byte, fp32 pairs as complex64 [256]."""
    import numpy as np

    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([values, -values])
    byte = np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], axis=1).copy().view(np.complex64)[:, 0]


@cache
def _byte_pairs(values: str) -> np.ndarray:
    """What two bytes that follow each other stand for, of e2m1 or e4m3: complex128 or complex64 [65536], so that one lookup
    gives four values or two."""
    import numpy as np

    each = e2m1_pairs() if values == "e2m1" else e4m3_table()
    both = np.stack([np.tile(each, 256), np.repeat(each, 256)], axis=1)
    return both.view(np.complex128 if values == "e2m1" else np.complex64)[:, 0]


def _dense(entry: Unfold, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """fp32 [out, in]."""
    import numpy as np

    rows, columns = len(codes), entry.shape[1]
    out = np.empty((rows, columns), np.float32)
    pieces = _Pieces(entry, codes, scales)
    for part in pieces.of(slice(0, rows)):
        pieces.values_into(out[part], part)
    return out


class _Pieces:
    """Pieces of a weight, of so many `rows` that they stay in a core's cache; what is worked in is allocated once."""

    def __init__(self, entry: Unfold, codes: np.ndarray, scales: np.ndarray) -> None:
        import numpy as np

        self._entry, self._codes, self._scales = entry, codes, scales
        rows, columns = len(codes), entry.shape[1]
        self.rows = min(rows, max(1, PIECE // columns))
        self._looks_up = entry.values in ("e2m1", "e4m3")
        # Bytes are looked up two at a time where rows have an even number.
        self._pairs = self._looks_up and codes.shape[1] % 2 == 0
        self._table: np.ndarray = np.empty(0)
        if self._looks_up:
            bytewise = e2m1_pairs if entry.values == "e2m1" else e4m3_table
            self._table = _byte_pairs(entry.values) if self._pairs else bytewise()
        width = codes.shape[1] // 2 if self._pairs else codes.shape[1]
        self._index = np.empty((self.rows, width) if self._looks_up else 0, np.intp)
        self._spread = np.empty((self.rows, columns) if entry.block else 0, np.float32)

    def of(self, rows: slice) -> Iterator[slice]:
        """The pieces of `rows`."""
        return (slice(at, min(at + self.rows, rows.stop)) for at in range(rows.start, rows.stop, self.rows))

    def values_into(self, out: np.ndarray, rows: slice) -> None:
        """The values of one piece, with their scales, as fp32."""
        import numpy as np

        entry, codes = self._entry, self._codes[rows]
        if self._looks_up:
            index = self._index[: len(codes)]
            np.copyto(index, codes.view("<u2") if self._pairs else codes)
            # "clip" spares numpy a copy; no index is out of range.
            np.take(self._table, index, out=out.view(self._table.dtype), mode="clip")
        elif entry.values == "bfloat16":
            np.left_shift(codes, 16, out=out.view(np.uint32), dtype=np.uint32)
        else:
            np.copyto(out, codes.view("<f2" if entry.values == "float16" else "<f4"))
        if not entry.scales:
            return
        spread = self._scales[rows] if self._scales.ndim else self._scales
        if entry.block:
            # One long product is faster than many of a block each.
            wide = self._spread[: len(codes)]
            np.copyto(wide.reshape(len(codes), -1, entry.block), spread[:, :, None])
            spread = wide
        np.multiply(out, spread, out=out)


def _int8_rows(entry: Unfold, codes: np.ndarray, scales: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows int8 or uint8 [in, out], and the scale of each."""
    import numpy as np

    rows, columns = len(codes), entry.shape[1]
    out = np.empty((columns, rows), np.int8 if signed else np.uint8)
    largest = np.empty(rows, np.float32)
    pieces = _Pieces(entry, codes, scales)
    narrow = np.empty((min(TURNED, rows), columns), out.dtype)
    values = np.empty((pieces.rows, columns), np.float32)
    for first in range(0, rows, TURNED):
        last = min(first + TURNED, rows)
        for part in pieces.of(slice(first, last)):
            own = values[: part.stop - part.start]
            pieces.values_into(own, part)
            largest[part] = round_rows(own, narrow[part.start - first : part.stop - first])
        _turn(narrow[: last - first], out[:, first:last])
    return out, row_scales(largest)


def round_rows(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Fill `out`, int8, or uint8 with zero point 128, with rows of `values` fp32, which is written over; their largest
    magnitudes, fp32 [rows]."""
    import numpy as np

    largest: np.ndarray = np.maximum(values.max(axis=1), -values.min(axis=1))
    factor = np.divide(np.float32(INT8), largest, out=np.zeros_like(largest), where=largest > 0)
    np.multiply(values, factor[:, None], out=values)
    np.rint(values, out=values)
    if out.dtype == np.uint8:
        values += np.float32(ZERO_POINT)
    np.copyto(out, values, casting="unsafe")
    return largest


def row_scales(largest: np.ndarray) -> np.ndarray:
    """What a value of an int8 row with this largest magnitude stands for; 1 for a row of zeros."""
    import numpy as np

    return np.where(largest > 0, largest / np.float32(INT8), np.float32(1))


def _turn(narrow: np.ndarray, out: np.ndarray) -> None:
    """`out` [columns, rows] = `narrow` [rows, columns] transposed; by eight bytes first, twice as fast as a byte at a time."""
    import numpy as np

    rows, columns = narrow.shape
    if columns % 8:
        np.copyto(out, narrow.T)
        return
    eights = np.ascontiguousarray(narrow.view(np.uint64).T).view(narrow.dtype).reshape(-1, rows, 8)
    np.copyto(out, np.ascontiguousarray(eights.transpose(0, 2, 1)).reshape(columns, rows))
