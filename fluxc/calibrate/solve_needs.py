"""What solving the weights of a plan takes, counted from its layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fluxc.checkpoint.needs import PART
from fluxc.formats.low_rank import ITERATIONS, OVERSAMPLED, factors_bytes
from fluxc.formats.registry import FORMATS
from fluxc.formats.smoothing import smoothing_bytes
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxc.recipe.structs import RoundingMethod

MOMENT_BYTES, FACTOR_BYTES = 4, 16
"""For each pair of a layer's inputs: of its second moment, and besides of what is computed with while it is factorized."""
NOISE_ROWS = 2048
"""Inputs that are rounded, to see what that makes wrong of them."""
CHUNK, CHUNK_BYTES = 1 << 24, 24
"""Values of a weight that are solved at a time; for each, bytes of what it is computed with and compared with."""
LEFT_BYTES = 5
"""For each value of a weight, of what factors of low rank leave of it in fp32, and of what is computed with beside: of all
layers of a fusion group, and again of one."""
SMOOTHED_BYTES, SMOOTHED_ROW_BYTES = 5, 16
"""For each value of a weight, of all layers of a fusion group, divided by its smoothing, and of what was found without; for
each value of an input that is rounded, while that is done."""


@dataclass(frozen=True)
class Solving:
    """`weights` that are solved; FLOP of the second moments for one row of inputs, of all factors, of the products between
    blocks of columns, and of the narrow ones that fit factors of low rank; bytes of `memory` for the moments of the largest
    part of the model, one factor and one layer; bytes of `disk`, of the result."""

    weights: int
    moments: float
    factors: float
    products: float
    low_rank: float
    memory: int
    disk: int


def solving(plan: list[LayerPlan], rounding: RoundingMethod = "gptq") -> Solving:
    """Of the layers of `plan` that can be solved; layers of a fusion group share their inputs. With `nearest` only their
    factors of low rank are. Those that may be smoothed are solved twice, and rows of their inputs are kept in 16 bits."""
    entries = [entry for entry in to_quantize(plan) if FORMATS[entry.format].solves]
    smoothed = any(entry.is_smoothed for entry in entries)
    times = 1 + smoothed
    inputs = {entry.layer.group or entry.layer.name: entry.layer for entry in entries}
    parts: Counter[str] = Counter()
    for layer in inputs.values():
        found = PART.match(f"{layer.name}.")
        parts[found[1] if found else layer.name] += MOMENT_BYTES * layer.in_features**2
        parts[found[1] if found else layer.name] += 2 * NOISE_ROWS * layer.in_features * smoothed
    widths = [layer.in_features for layer in inputs.values()]
    largest = max((entry.parameters for entry in entries), default=0)
    left: Counter[str] = Counter()
    for entry in entries:
        of_value = LEFT_BYTES * (entry.low_rank > 0) + SMOOTHED_BYTES * entry.is_smoothed
        left[entry.layer.group or entry.layer.name] += of_value * entry.parameters
    memory = max(parts.values(), default=0) + CHUNK_BYTES * min(CHUNK, largest)
    if any(left.values()):
        memory += max(left.values()) + LEFT_BYTES * largest * any(entry.low_rank for entry in entries)
    memory += smoothed * SMOOTHED_ROW_BYTES * NOISE_ROWS * max(widths, default=0)
    is_gptq = rounding == "gptq"
    return Solving(
        weights=times * sum(entry.parameters for entry in entries),
        moments=sum(1.1 * width**2 for width in widths),
        factors=times * is_gptq * sum(2 / 3 * width**3 for width in widths),
        products=times * is_gptq * float(sum(entry.parameters * entry.layer.in_features for entry in entries)),
        low_rank=times * sum(_fitting(entry) for entry in entries),
        memory=memory + is_gptq * FACTOR_BYTES * max(widths, default=0) ** 2,
        disk=sum(_stored(entry) for entry in entries),
    )


def _fitting(entry: LayerPlan) -> float:
    """FLOP of both fits of a layer's factors: every iteration multiplies with the weight twice, the second fit's with second
    moments too; at the end of either come two more products."""
    if not entry.low_rank:
        return 0.0
    width, times = entry.low_rank + OVERSAMPLED, 1 + ITERATIONS
    return 2.0 * width * (2 * (2 * times + 2) * entry.parameters + (times + 1) * entry.layer.in_features**2)


def _stored(entry: LayerPlan) -> int:
    rows, columns = entry.layer.out_features, entry.layer.in_features
    beside = factors_bytes(entry.low_rank, rows, columns) + entry.is_smoothed * smoothing_bytes(columns)
    return FORMATS[entry.format].nbytes(rows, columns) + beside
