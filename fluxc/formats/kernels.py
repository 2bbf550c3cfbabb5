"""Compiled CPU kernels of the 4-bit formats: numba over rows, the inner sixteen elements as one LLVM vector.

Weights are read as they lie on disk: the bit patterns of bf16, fp16 (uint16) or fp32 (uint32). The magnitude of a pattern
grows with the pattern itself, so the E2M1 code of an element under a given scale is the number of seven thresholds its
pattern exceeds: no element is converted or divided (`solve_columns` alone divides, since what it rounds is computed).
`threshold_table` finds the thresholds of every scale by bisection on the division itself, so codes are those of
round(w / scale), bit for bit.

All of it is one file, because numba's cache on disk only looks at the file a compiled function is in.
"""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
from llvmlite import ir
from numba import get_num_threads, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from fluxc.formats.kernel_cache import kernel_folder

LANES = 16
# What a quotient must exceed to get the next E2M1 code, and last to have a sign at all. Ties go to the even code, so a
# midpoint above an odd code need only be reached.
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.0], np.float32)
REACHED = np.array([False, True, False, True, False, True, False, False])
# Up to here an fp32 quotient underflows to zero.
UNDERFLOW = 2.0**-150
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}

kernel = partial(njit, parallel=True, nogil=True, cache=kernel_folder()[0] is not None)

# numba's OpenMP layer starts by setting how many threads OpenMP gives the thread it starts in. In the main thread that number
# would be torch's too from the first kernel on, and torch rounds by it: images would depend on what ran before them.
_starter = threading.Thread(target=get_num_threads)
_starter.start()
_starter.join()


def values_of(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 values of the bit patterns of safetensors dtype BF16, F16 (uint16) or F32 (uint32); of F32 a view."""
    if dtype == "BF16":
        return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return patterns.view(np.float16).astype(np.float32) if dtype == "F16" else patterns.view(np.float32)


def _patterns_near(values: np.ndarray, dtype: str) -> np.ndarray:
    """Patterns of `dtype` at most one away from non-negative fp32 `values`."""
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return values.view(np.uint32) >> np.uint32(16 if dtype == "BF16" else 0)


def threshold_table(scales: np.ndarray, dtype: str) -> np.ndarray:
    """For each of `scales` fp32 [n], the largest pattern whose code is still i, for i = 0..6, and the largest whose quotient
    is zero, and with it the sign: [n, 8] of the pattern's type.

    An element has code i or less when round-to-nearest-even(w / scale) on the E2M1 grid does, the quotient rounded to fp32
    first, as ModelOpt computes it. Each threshold is bisected on that very division, around midpoint * scale.
    """
    unsigned = np.uint32 if dtype == "F32" else np.uint16
    with np.errstate(over="ignore"):
        bounds = np.where(MIDPOINTS > 0, MIDPOINTS.astype(np.float64), UNDERFLOW)
        guess = _patterns_near((scales[:, None] * bounds).astype(np.float32), dtype).astype(np.int64)
        low, high = np.maximum(guess - 2, -1), np.minimum(guess + 2, INFINITY[dtype])
        while (high - low > 1).any():
            middle = (low + high) // 2
            quotient = values_of(middle.astype(unsigned), dtype) / scales[:, None]
            above = np.where(REACHED, quotient >= MIDPOINTS, quotient > MIDPOINTS)
            low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.maximum(low, 0).astype(unsigned)


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def _constant(element: ir.Type, value: float, lanes: int = LANES) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    one = builder.insert_element(ir.Constant(_vector(value.type), ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, _constant(ir.IntType(32), 0))


def _pointer(context, builder: ir.IRBuilder, kind, array: ir.Value, index: ir.Value, to: ir.Type) -> ir.Value:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _load_magnitudes(context, builder: ir.IRBuilder, kind, array: ir.Value, index: ir.Value):
    """(patterns, patterns without sign, element type) of the sixteen elements from `index` on."""
    element = ir.IntType(kind.dtype.bitwidth)
    at = _pointer(context, builder, kind, array, index, _vector(element))
    patterns = builder.load(at, align=element.width // 8)
    return patterns, builder.and_(patterns, _constant(element, (1 << (element.width - 1)) - 1)), element


@intrinsic
def _largest_pattern(typing, weights, at):
    """The largest magnitude pattern among sixteen elements of the flat array `weights` from `at` on."""

    def generate(context, builder, signature, arguments):
        _, magnitude, element = _load_magnitudes(context, builder, signature.args[0], *arguments)
        reduce = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(element, [_vector(element)]),
            f"llvm.vector.reduce.umax.v{LANES}i{element.width}",
        )
        return builder.call(reduce, [magnitude])

    return weights.dtype(weights, types.int64), generate


@intrinsic
def _store_codes(typing, weights, at, table, row, codes, to):
    """Encode sixteen elements of `weights` from `at` on under thresholds table[row : row + 8] into eight bytes of `codes`."""

    def generate(context, builder, signature, arguments):
        weights, at, table, row, codes, to = arguments
        patterns, magnitude, element = _load_magnitudes(context, builder, signature.args[0], weights, at)
        width = element.width
        thresholds = context.make_array(signature.args[2])(context, builder, table).data

        def above(i: int) -> ir.Value:
            """-1 in the lanes that exceed threshold i."""
            index = builder.add(row, ir.Constant(ir.IntType(64), i))
            limit = _splat(builder, builder.load(builder.gep(thresholds, [index]), align=width // 8))
            return builder.sext(builder.icmp_signed(">", magnitude, limit), _vector(element))

        exceeded = above(0)
        for i in range(1, 7):
            exceeded = builder.add(exceeded, above(i))
        negative = builder.and_(builder.ashr(patterns, _constant(element, width - 1)), above(7))
        code = builder.sub(builder.and_(negative, _constant(element, 8)), exceeded)
        double = ir.IntType(2 * width)
        pairs = builder.bitcast(code, ir.VectorType(double, LANES // 2))
        pairs = builder.or_(pairs, builder.lshr(pairs, _constant(double, width - 4, LANES // 2)))
        packed = builder.trunc(pairs, ir.VectorType(ir.IntType(8), LANES // 2))
        builder.store(packed, _pointer(context, builder, signature.args[4], codes, to, packed.type), align=1)
        return context.get_dummy_value()

    return types.void(weights, types.int64, table, types.int64, codes, types.int64), generate


def _sum_lanes(builder: ir.IRBuilder, total: ir.Value) -> ir.Value:
    """The sum of a vector's lanes, halving it four times: the same order, so the same bits, on every machine."""
    integer, lanes = ir.IntType(32), LANES
    while lanes > 1:
        lanes //= 2
        halves = [
            builder.shuffle_vector(
                total, total, ir.Constant(ir.VectorType(integer, lanes), list(range(first, first + lanes)))
            )
            for first in (0, lanes)
        ]
        total = builder.fadd(*halves)
    return builder.extract_element(total, ir.Constant(integer, 0))


def _load_absolute(context, builder: ir.IRBuilder, kind, array: ir.Value, index: ir.Value) -> ir.Value:
    """|v| of the sixteen elements from `index` on: fp32, or patterns of bf16 (uint16)."""
    integer = ir.IntType(32)
    bits = builder.load(
        _pointer(context, builder, kind, array, index, _vector(ir.IntType(kind.dtype.bitwidth))), align=1
    )
    if kind.dtype.bitwidth == 16:
        bits = builder.shl(builder.zext(bits, _vector(integer)), _constant(integer, 16))
    return builder.bitcast(builder.and_(bits, _constant(integer, 0x7FFFFFFF)), _vector(ir.FloatType()))


@intrinsic
def _energy(typing, values, at):
    """fp32 sum of v^2 over sixteen `values`, fp32 or patterns of bf16, from `at` on."""

    def generate(context, builder, signature, arguments):
        magnitude = _load_absolute(context, builder, signature.args[0], *arguments)
        return _sum_lanes(builder, builder.fmul(magnitude, magnitude))

    return types.float32(values, types.int64), generate


@intrinsic
def _stored_error(typing, values, at, codes, first, step):
    """fp32 sum of (v - code * step)^2 over sixteen `values`, as in _energy; their codes are the eight bytes from `first` on."""

    def generate(context, builder, signature, arguments):
        values, at, codes, first, step = arguments
        integer, byte = ir.IntType(32), ir.IntType(8)
        magnitude = _load_absolute(context, builder, signature.args[0], values, at)
        packed = ir.VectorType(byte, LANES // 2)
        bytes_ = builder.load(_pointer(context, builder, signature.args[2], codes, first, packed), align=1)
        low = builder.and_(bytes_, _constant(byte, 7, LANES // 2))
        high = builder.and_(builder.lshr(bytes_, _constant(byte, 4, LANES // 2)), _constant(byte, 7, LANES // 2))
        order = [lane // 2 + (lane % 2) * (LANES // 2) for lane in range(LANES)]
        code = builder.shuffle_vector(low, high, ir.Constant(_vector(integer), order))
        # 0 .5 1 1.5 2 3 4 6 doubled are 0 1 2 3 4 6 8 12: the code, plus what it exceeds 4 by, plus twice what it exceeds 6 by.
        code = builder.zext(code, _vector(integer))

        def excess(over: int) -> ir.Value:
            more = builder.sub(code, _constant(integer, over))
            return builder.select(builder.icmp_signed(">", more, _constant(integer, 0)), more, _constant(integer, 0))

        doubled = builder.add(builder.add(code, excess(4)), builder.shl(excess(6), _constant(integer, 1)))
        half = builder.fmul(step, ir.Constant(ir.FloatType(), 0.5))
        restored = builder.fmul(builder.sitofp(doubled, _vector(ir.FloatType())), _splat(builder, half))
        difference = builder.fsub(magnitude, restored)
        return _sum_lanes(builder, builder.fmul(difference, difference))

    return types.float32(values, types.int64, codes, types.int64, types.float32), generate


@intrinsic
def _squared_error(typing, values, at, scale):
    """fp32 sum of (|v| - round(|v| / scale) * scale)^2 over sixteen `values`, as in _energy, rounded on the E2M1 grid.

    The quotient is |v| times the fp32 reciprocal.
    """

    def generate(context, builder, signature, arguments):
        values, at, scale = arguments
        single = ir.FloatType()
        magnitude = _load_absolute(context, builder, signature.args[0], values, at)
        reciprocal = builder.fdiv(ir.Constant(single, 1.0), scale)
        quotient = builder.fmul(magnitude, _splat(builder, reciprocal))
        quotient = builder.select(
            builder.fcmp_ordered("<", quotient, _constant(single, 6.0)), quotient, _constant(single, 6.0)
        )
        under_two = builder.fcmp_ordered("<", quotient, _constant(single, 2.0))
        under_four = builder.fcmp_ordered("<", quotient, _constant(single, 4.0))

        def by_range(low: float, middle: float, high: float) -> ir.Value:
            rest = builder.select(under_four, _constant(single, middle), _constant(single, high))
            return builder.select(under_two, _constant(single, low), rest)

        rint = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_vector(single), [_vector(single)]), f"llvm.rint.v{LANES}f32"
        )
        whole = builder.call(rint, [builder.fmul(quotient, by_range(2.0, 1.0, 0.5))])
        rounded = builder.fmul(builder.fmul(whole, by_range(0.5, 1.0, 2.0)), _splat(builder, scale))
        difference = builder.fsub(magnitude, rounded)
        return _sum_lanes(builder, builder.fmul(difference, difference))

    return types.float32(values, types.int64, types.float32), generate


@intrinsic
def _bits(typing, value):
    """The bit pattern of an fp32 value."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _float(typing, bits):
    """The fp32 value of a bit pattern."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@njit(inline="always")
def _to_e4m3(value):
    """E4M3 code of an fp32 value in 0..448, round half to even."""
    bits = _bits(value)
    normal = ((bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(960)
    # The last place of an fp32 in [2^14, 2^15) is 2^-9, E4M3's own: the addition rounds.
    subnormal = _bits(value + np.float32(16384)) & np.uint32(15)
    return np.uint8(subnormal) if value < np.float32(0.015625) else np.uint8(normal)


@njit(inline="always")
def _from_e4m3(code):
    """fp32 value of a non-negative E4M3 code."""
    wide = np.uint32(code)
    normal = _float((wide + np.uint32(960)) << np.uint32(20))
    return np.float32(wide) * np.float32(0.001953125) if wide < np.uint32(8) else normal


@kernel()
def block_amax(weights, block, out):
    """Largest magnitude pattern of every `block` elements of `weights` uint [rows, columns], into `out` [rows, blocks]."""
    rows, columns = weights.shape
    flat = weights.reshape(-1)
    for row in prange(rows):
        for k in range(columns // block):
            largest = _largest_pattern(flat, row * columns + k * block)
            for part in range(1, block // LANES):
                largest = max(largest, _largest_pattern(flat, row * columns + k * block + part * LANES))
            out[row, k] = largest


@intrinsic
def _value(typing, pattern):
    """The fp32 value of a bf16 pattern (uint16), or of an fp32 itself."""

    def generate(context, builder, signature, arguments):
        if signature.args[0] == types.float32:
            return arguments[0]
        wide = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(pattern), generate


@njit(inline="always")
def _first_scale(exact):
    """E4M3 code of amax / (6 * tensor_scale): zero becomes 1, the rest lies in 2^-9..448."""
    exact = np.float32(1) if exact == np.float32(0) else exact
    return _to_e4m3(min(max(exact, np.float32(0.001953125)), np.float32(448)))


@kernel(error_model="numpy")
def e4m3_scales(amax, tensor_scale, out):
    """E4M3 codes of amax / (6 * tensor_scale): zero becomes 1, the rest lies in 2^-9..448.

    `amax` [rows, blocks] is fp32, or uint16 patterns of bf16.
    """
    rows, blocks = amax.shape
    whole = np.float32(6) * tensor_scale
    for row in prange(rows):
        for k in range(blocks):
            out[row, k] = _first_scale(_value(amax[row, k]) / whole)


@kernel()
def encode(weights, scales, table, codes):
    """E2M1 codes of `weights` uint [rows, columns] into `codes` uint8 [rows, columns/2], the low nibble the even column.

    `scales` uint8 [rows, blocks] picks a row of `table` (see threshold_table) for every columns/blocks elements.
    """
    rows, columns = weights.shape
    blocks = scales.shape[1]
    block = columns // blocks
    flat_weights, flat_table, flat_codes = weights.reshape(-1), table.reshape(-1), codes.reshape(-1)
    for row in prange(rows):
        for k in range(blocks):
            limits = np.int64(scales[row, k]) * 8
            first = row * columns + k * block
            for at in range(first, first + block, LANES):
                _store_codes(flat_weights, at, flat_table, limits, flat_codes, at // 2)


@kernel()
def decode(codes, steps, values, out):
    """fp32 `out` [rows, columns] = values[code] * step.

    `codes` uint8 [rows, columns/2], `steps` fp32 [rows, blocks], `values` fp32 [16].
    """
    rows, columns = out.shape
    block = columns // steps.shape[1]
    for row in prange(rows):
        for k in range(steps.shape[1]):
            step = steps[row, k]
            for j in range(k * block // 2, (k + 1) * block // 2):
                byte = codes[row, j]
                out[row, 2 * j] = values[byte & 15] * step
                out[row, 2 * j + 1] = values[byte >> 4] * step


@njit(inline="always", error_model="numpy")
def _best_scale(flat, at, start, tensor_scale, below, above, fixed):
    """The E4M3 code of least squared error for sixteen values of `flat` from `at` on, of the candidates of search_scales."""
    best = start
    least = _squared_error(flat, at, _from_e4m3(start) * tensor_scale)
    if fixed > 0:
        code = np.int64(_to_e4m3(min(_from_e4m3(start) * np.float32(fixed), np.float32(448))))
        error = _squared_error(flat, at, _from_e4m3(code) * tensor_scale)
        if error < least:
            best, least = code, error
    for offset in range(-below, above + 1):
        code = min(max(start + offset, np.int64(1)), np.int64(126))
        error = _squared_error(flat, at, _from_e4m3(code) * tensor_scale)
        if error < least:
            best, least = code, error
    return best


@kernel(error_model="numpy")
def search_scales(values, first, tensor_scale, below, above, fixed, out):
    """The E4M3 code of least squared error for every 16 elements, into `out` uint8 [rows, columns/16].

    `values` [rows, columns] is fp32 or bf16 patterns.
    Candidates are the codes from `first` - below to `first` + above, and E4M3(fixed * value of `first`) when `fixed` > 0.
    `first` uint8 [rows, columns/16] itself is tried first and wins ties, then the rest in the order given.
    """
    rows, columns = values.shape
    flat = values.reshape(-1)
    for row in prange(rows):
        for k in range(columns // LANES):
            at = row * columns + k * LANES
            out[row, k] = _best_scale(flat, at, np.int64(first[row, k]), tensor_scale, below, above, fixed)


@njit(inline="always")
def _e2m1_code(quotient):
    """Code of a non-negative fp32 quotient, ties to the even code; what threshold_table decides by."""
    code = np.uint8(quotient > np.float32(0.25)) + np.uint8(quotient >= np.float32(0.75))
    code += np.uint8(quotient > np.float32(1.25)) + np.uint8(quotient >= np.float32(1.75))
    code += np.uint8(quotient > np.float32(2.5)) + np.uint8(quotient >= np.float32(3.5))
    return code + np.uint8(quotient > np.float32(5))


@kernel(error_model="numpy")
def solve_columns(work, upper, grid, tensor_scale, search, out):
    """Round the columns of `work` fp32 [rows, columns] in order, each with what those before it lost; see fluxc.formats.gptq.

    `upper` fp32 [columns, columns] is the part of the factor for these columns. When a block of sixteen begins, its scale is
    chosen from what it has become, as in e4m3_scales and search_scales, of which `search` are below, above and fixed. `grid`
    fp32 [8] are the E2M1 magnitudes. `out` are the scales uint8 [rows, columns/16], codes uint8 [rows, columns], and fp32
    [rows, columns] what each column lost, over the diagonal of `upper`. `work` is used up.
    """
    (below, above, fixed), (scales, codes, errors) = search, out
    rows, columns = work.shape
    flat, whole = work.reshape(-1), np.float32(6) * tensor_scale
    for row in prange(rows):
        for k in range(columns // LANES):
            at = row * columns + k * LANES
            amax = np.float32(0)
            for column in range(at, at + LANES):
                amax = max(amax, abs(flat[column]))
            start = np.int64(_first_scale(amax / whole))
            best = _best_scale(flat, at, start, tensor_scale, below, above, fixed)
            scales[row, k] = best
            step = _from_e4m3(best) * tensor_scale
            for j in range(LANES):
                column = k * LANES + j
                value = work[row, column]
                quotient = value / step
                code = _e2m1_code(abs(quotient))
                restored = grid[code] * step
                if value < 0:
                    restored = -restored
                error = (value - restored) / upper[column, column]
                errors[row, column] = error
                for later in range(column + 1, columns):
                    work[row, later] -= error * upper[column, later]
                codes[row, column] = code | np.uint8(8) if quotient < 0 else code


@kernel()
def search_powers(values, first, steps, out):
    """`first` or the E8M0 code above it, whichever has less squared error, for every 32 elements, into `out` uint8.

    `values` [rows, columns] is fp32 or bf16 patterns, `first` uint8 [rows, columns/32], which wins ties, `steps` fp32 [255]
    the value of every code.
    """
    rows, columns = values.shape
    flat = values.reshape(-1)
    for row in prange(rows):
        for k in range(columns // (2 * LANES)):
            at = row * columns + k * 2 * LANES
            low = np.int64(first[row, k])
            high = min(low + 1, np.int64(254))
            error = _squared_error(flat, at, steps[low]) + _squared_error(flat, at + LANES, steps[low])
            above = _squared_error(flat, at, steps[high]) + _squared_error(flat, at + LANES, steps[high])
            out[row, k] = high if above < error else low


@kernel()
def widen(patterns, out):
    """fp32 `out` [rows, columns] of bf16 `patterns` uint16 [rows, columns]."""
    rows, columns = patterns.shape
    for row in prange(rows):
        for column in range(columns):
            out[row, column] = _value(patterns[row, column])


@kernel(error_model="numpy")
def to_e4m3(values, scales, out):
    """E4M3 codes of values / scale, saturating at 448: `values` fp32 [rows, columns], `scales` fp32 [rows or 1]."""
    rows, columns = values.shape
    for row in prange(rows):
        scale = scales[row] if len(scales) > 1 else scales[0]
        for column in range(columns):
            quotient = values[row, column] / scale
            code = _to_e4m3(min(abs(quotient), np.float32(448)))
            out[row, column] = code | np.uint8((_bits(quotient) >> np.uint32(24)) & np.uint32(0x80))


@kernel()
def from_e4m3(codes, scales, out):
    """fp32 `out` = E4M3 `codes` uint8 [rows, columns] times `scales` fp32 [rows or 1]."""
    rows, columns = codes.shape
    for row in prange(rows):
        scale = scales[row] if len(scales) > 1 else scales[0]
        for column in range(columns):
            code = codes[row, column]
            magnitude = _from_e4m3(code & np.uint8(0x7F)) * scale
            out[row, column] = -magnitude if code & np.uint8(0x80) else magnitude


@kernel()
def row_amax(patterns, mask, out):
    """The largest of `patterns & mask` in every row of `patterns` uint [rows, columns], into `out` [rows]."""
    rows, columns = patterns.shape
    for row in prange(rows):
        largest = patterns[row, 0] & mask
        for column in range(1, columns):
            largest = max(largest, patterns[row, column] & mask)
        out[row] = largest


@kernel()
def coded_sums(values, codes, steps, sums):
    """Row by row into float64 `sums` [rows, 2]: the sum of v^2 and of (v - code * step)^2.

    `values` [rows, columns] is fp32 or bf16 patterns, `codes` uint8 [rows, columns/2] E2M1, `steps` fp32 [rows, columns/16].
    """
    rows, columns = values.shape
    flat_values, flat_codes = values.reshape(-1), codes.reshape(-1)
    for row in prange(rows):
        signal = noise = 0.0
        for k in range(columns // LANES):
            at = row * columns + k * LANES
            signal += _energy(flat_values, at)
            noise += _stored_error(flat_values, at, flat_codes, at // 2, steps[row, k])
        sums[row, 0], sums[row, 1] = signal, noise


@kernel()
def squared_sums(values, restored):
    """float64 (sum of values^2, sum of (values - restored)^2) of two fp32 arrays [rows, columns], row by row."""
    rows, columns = values.shape
    signal, noise = np.zeros(rows), np.zeros(rows)
    for row in prange(rows):
        for column in range(columns):
            value = np.float64(values[row, column])
            difference = value - np.float64(restored[row, column])
            signal[row] += value * value
            noise[row] += difference * difference
    return signal.sum(), noise.sum()
