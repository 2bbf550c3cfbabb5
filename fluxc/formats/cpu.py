"""Quantizing on the CPU, on numpy arrays of bit patterns as they lie in a checkpoint; no torch is imported here.

Patterns are uint16 [rows, columns] for safetensors dtypes BF16 and F16, uint32 for F32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fluxc.base.errors import CheckpointError
from fluxc.base.safetensors import TensorRef
from fluxc.formats.constants import BLOCK, E2M1_MAX, E2M1_VALUES, E4M3_MAX, MX_BLOCK
from fluxc.recipe.structs import Scales

if TYPE_CHECKING:
    from fluxc.formats import kernels
else:

    class _Kernels:
        """The module, imported when its first kernel is called: numba takes a second, and a plan calls none."""

        def __getattr__(self, name: str) -> Any:
            from fluxc.formats import kernels

            return getattr(kernels, name)

    kernels = _Kernels()

PATTERNS: dict[str, np.dtype] = {"BF16": np.dtype(np.uint16), "F16": np.dtype(np.uint16), "F32": np.dtype(np.uint32)}
E2M1 = np.array(E2M1_VALUES, np.float32)
_codes = np.arange(127)
E4M3_VALUES = np.where(_codes < 8, _codes * 2.0**-9, (8 + _codes % 8) * 2.0 ** (_codes // 8 - 10.0)).astype(np.float32)

# Codes around that of amax / 6 which hold the best scale of any Gaussian block: further ones changed nothing when tried.
MSE_BELOW, MSE_ABOVE = 2, 6
# Factors on the tensor scale for searched block scales: above 1, the largest block too has room to map its amax to 4.
TENSOR_SCALE_FACTORS = (1.0, 1.25, 1.5, 1.75)


class Quantized(NamedTuple):
    """`codes` uint8 [rows, columns/2], the low nibble the even column; `block_scales` uint8 [rows, columns/block]."""

    codes: np.ndarray
    block_scales: np.ndarray


class NotFiniteError(ValueError):
    """A NaN or infinity at `position`, the index of the first one."""

    def __init__(self, position: tuple[int, ...]) -> None:
        super().__init__(f"not finite (NaN or infinity) at {list(position)}")
        self.position = position


def patterns_in(ref: TensorRef, first: int = 0, last: int | None = None) -> np.ndarray:
    """Rows first:last of the matrix `ref` in a checkpoint, a memory map unless the file holds them unaligned.

    Raises CheckpointError if its dtype is not a floating one that can be quantized.
    """
    if ref.dtype not in PATTERNS:
        raise CheckpointError(
            f"{ref.file}: tensor {ref.name!r} is {ref.dtype}; only bf16, fp16 and fp32 can be quantized"
        )
    last = ref.shape[0] if last is None else last
    row_bytes = ref.nbytes // ref.shape[0]
    view = ref.bytes_view(first * row_bytes, last * row_bytes)
    dtype = PATTERNS[ref.dtype]
    if view.ctypes.data % dtype.itemsize:
        view = view.copy()
    return np.asarray(view).view(dtype).reshape(last - first, *ref.shape[1:])


def block_amax(patterns: np.ndarray, dtype: str, block: int = BLOCK) -> np.ndarray:
    """The largest magnitude of every `block` elements, as patterns [rows, columns/block].

    Raises ValueError when columns is not a multiple of `block`, NotFiniteError at the first NaN or infinity.
    """
    rows, columns = patterns.shape
    if columns % block:
        raise ValueError(f"blocks of {block} need in_features divisible by {block}, got {columns}")
    out = np.empty((rows, columns // block), patterns.dtype)
    kernels.block_amax(patterns, block, out)
    _refuse_non_finite(patterns, dtype, out)
    return out


def row_amax(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """The largest magnitude of every row, as patterns [rows]. Raises NotFiniteError at the first NaN or infinity."""
    out = np.empty(len(patterns), patterns.dtype)
    kernels.row_amax(patterns, _magnitude_mask(patterns), out)
    _refuse_non_finite(patterns, dtype, out)
    return out


def _magnitude_mask(patterns: np.ndarray) -> np.unsignedinteger:
    return patterns.dtype.type(np.iinfo(patterns.dtype).max >> 1)


def _refuse_non_finite(patterns: np.ndarray, dtype: str, amax: np.ndarray) -> None:
    if amax.max(initial=0) >= kernels.INFINITY[dtype]:
        raise NotFiniteError(first_non_finite(patterns, dtype) or ())


def first_non_finite(patterns: np.ndarray, dtype: str) -> tuple[int, ...] | None:
    """The index of the first NaN or infinity in `patterns` of any shape, or None."""
    mask = _magnitude_mask(patterns)
    width = 4096 if patterns.size >= 4096 else max(1, patterns.size)
    flat = patterns.reshape(-1)
    whole = flat[: flat.size // width * width].reshape(-1, width)
    amax = np.empty(len(whole), patterns.dtype)
    kernels.row_amax(whole, mask, amax)
    bad = amax >= kernels.INFINITY[dtype]
    start = int(bad.argmax()) * width if bad.any() else whole.size
    beyond = np.flatnonzero((flat[start : start + width] & mask) >= kernels.INFINITY[dtype])
    if not len(beyond):
        return None
    return tuple(int(i) for i in np.unravel_index(start + int(beyond[0]), patterns.shape))


def largest(amax: np.ndarray, dtype: str) -> np.float32:
    """The largest magnitude in `amax` (patterns, see block_amax) as an fp32 number; 0 of an empty array."""
    return kernels.values_of(amax.max(initial=0).reshape(1), dtype)[0]


def values(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 [rows, columns] of `patterns`."""
    if dtype != "BF16":
        return kernels.values_of(patterns, dtype)
    out = np.empty(patterns.shape, np.float32)
    kernels.widen(patterns, out)
    return out


def _numbers(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """What kernels read as numbers: patterns of bf16 as they are, else fp32 values."""
    return patterns if dtype == "BF16" else kernels.values_of(patterns, dtype)


def nvfp4_scales(
    patterns: np.ndarray,
    dtype: str,
    amax: np.ndarray,
    tensor_scale: np.float32,
    scales: Scales,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """E4M3 codes uint8 [rows, columns/16] of the block scales; `amax` as block_amax gives it.

    `max`: amax / 6 (ModelOpt's). `four-over-six`: amax / 6 or amax / 4, whichever reproduces the block with the smaller
    squared error (Cook et al. 2025, "Four Over Six"). `mse`: the best of the E4M3 codes from 2 below to 6 above amax / 6.
    """
    exact = amax if dtype == "BF16" else kernels.values_of(amax, dtype)
    first = np.empty(amax.shape, np.uint8) if out is None else out
    kernels.e4m3_scales(exact, tensor_scale, first)
    if scales == "max":
        return first
    below, above, fixed = search_range(scales)
    kernels.search_scales(_numbers(patterns, dtype), first.copy(), tensor_scale, below, above, fixed, first)
    return first


def search_range(scales: Scales) -> tuple[int, int, float]:
    """The candidates of search_scales: how many codes below and above the first one, and a factor on its value or 0."""
    if scales == "max":
        return 0, 0, 0.0
    return (MSE_BELOW, MSE_ABOVE, 0.0) if scales == "mse" else (0, 0, E2M1_MAX / 4)


def nvfp4(
    patterns: np.ndarray,
    dtype: str,
    amax: np.ndarray,
    tensor_scale: np.float32,
    scales: Scales = "max",
    out: Quantized | None = None,
) -> Quantized:
    """NVFP4 codes and E4M3 block scales of `patterns` under `tensor_scale`, into `out` where it is given."""
    rows, columns = patterns.shape
    out = out or Quantized(np.empty((rows, columns // 2), np.uint8), np.empty((rows, columns // BLOCK), np.uint8))
    nvfp4_scales(patterns, dtype, amax, tensor_scale, scales, out.block_scales)
    steps = E4M3_VALUES * tensor_scale
    steps[0] = 1
    kernels.encode(patterns, out.block_scales, kernels.threshold_table(steps, dtype), out.codes)
    return out


def nvfp4_values(quantized: Quantized, tensor_scale: np.float32) -> np.ndarray:
    """fp32 [rows, columns]: code * (block scale * tensor scale)."""
    rows, half = quantized.codes.shape
    out = np.empty((rows, 2 * half), np.float32)
    kernels.decode(quantized.codes, (E4M3_VALUES * tensor_scale)[quantized.block_scales], E2M1, out)
    return out


def nvfp4_error(
    patterns: np.ndarray, dtype: str, quantized: Quantized, tensor_scale: np.float32
) -> tuple[float, float]:
    """(sum of w^2, sum of (w - restored)^2) in float64, blocks of 16 summed in fp32."""
    sums = np.empty((len(patterns), 2))
    steps = (E4M3_VALUES * tensor_scale)[quantized.block_scales]
    kernels.coded_sums(_numbers(patterns, dtype), quantized.codes, steps, sums)
    return float(sums[:, 0].sum()), float(sums[:, 1].sum())


def tensor_scale(amax: float | np.float32, format: str) -> np.float32:
    """The FP32 scale that maps `amax` to the largest number of `format` (nvfp4: amax / 2688, fp8: amax / 448); 1 for 0."""
    largest_number = E2M1_MAX * E4M3_MAX if format == "nvfp4" else E4M3_MAX
    return np.float32(amax) / np.float32(largest_number) if amax > 0 else np.float32(1)


def sample_step(elements: int) -> int:
    """Every which row of a weight is looked at when its tensor scale is chosen: about 2^18 elements in all."""
    return max(1, elements >> 18)


def joint_tensor_scale(
    members: list[tuple[np.ndarray, str]], amax: np.float32, format: str, scales: Scales
) -> np.float32:
    """The tensor scale a fusion group shares: tensor_scale, for nvfp4 times the factor of least squared error over all members.

    `members` are (patterns, dtype) of each weight, `amax` the largest magnitude among them. For `max` the factor is 1, as in
    ModelOpt. Otherwise each of TENSOR_SCALE_FACTORS is tried on evenly spaced rows of each member (see sample_step).
    """
    exact = tensor_scale(amax, format)
    if format != "nvfp4" or scales == "max" or amax == 0:
        return exact
    best, least = exact, np.inf
    samples = []
    for patterns, dtype in members:
        part = np.ascontiguousarray(patterns[:: sample_step(patterns.size)])
        samples.append((part, dtype, block_amax(part, dtype)))
    for factor in TENSOR_SCALE_FACTORS:
        candidate = exact * np.float32(factor)
        error = 0.0
        for part, dtype, part_amax in samples:
            quantized = nvfp4(part, dtype, part_amax, candidate, scales)
            error += nvfp4_error(part, dtype, quantized, candidate)[1]
        if error < least:
            best, least = candidate, error
    return best


def mxfp4(patterns: np.ndarray, dtype: str, scales: Scales = "max") -> Quantized:
    """E2M1 codes and E8M0 scales uint8 [rows, columns/32]; see fluxc.formats.mxfp4."""
    amax = kernels.values_of(block_amax(patterns, dtype, MX_BLOCK), dtype)
    exponent = (amax.view(np.uint32) >> np.uint32(23)).astype(np.int32)
    chosen = np.maximum(exponent - 2, 0).astype(np.uint8)
    steps = np.ldexp(np.float32(1), np.arange(255) - 127)
    if scales != "max":
        kernels.search_powers(_numbers(patterns, dtype), chosen.copy(), steps, chosen)
    codes = np.empty((patterns.shape[0], patterns.shape[1] // 2), np.uint8)
    kernels.encode(patterns, chosen, kernels.threshold_table(steps, dtype), codes)
    return Quantized(codes, chosen)


def mxfp4_values(quantized: Quantized) -> np.ndarray:
    """fp32 [rows, columns] of MXFP4 codes and scales."""
    rows, half = quantized.codes.shape
    out = np.empty((rows, 2 * half), np.float32)
    kernels.decode(quantized.codes, np.ldexp(np.float32(1), quantized.block_scales.astype(np.int32) - 127), E2M1, out)
    return out


def fp8(patterns: np.ndarray, dtype: str, scale: np.ndarray | np.float32) -> np.ndarray:
    """E4M3 codes uint8 [rows, columns] of `patterns` / `scale`, fp32 () or [rows]."""
    out = np.empty(patterns.shape, np.uint8)
    kernels.to_e4m3(values(patterns, dtype), np.atleast_1d(scale), out)
    return out


def fp8_values(codes: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """fp32 [rows, columns] of E4M3 `codes` under `scale` fp32 () or [rows]."""
    out = np.empty(codes.shape, np.float32)
    kernels.from_e4m3(codes, np.atleast_1d(scale), out)
    return out


def squared_sums(exact: np.ndarray, restored: np.ndarray) -> tuple[float, float]:
    """(sum of exact^2, sum of (exact - restored)^2) in float64, of fp32 arrays [rows, columns]."""
    return kernels.squared_sums(exact, restored)
