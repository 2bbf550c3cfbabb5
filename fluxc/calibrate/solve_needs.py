"""What solving the weights of a plan takes, counted from its layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fluxc.checkpoint.needs import PART
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, to_quantize

MOMENT_BYTES, FACTOR_BYTES = 4, 16
"""For each pair of a layer's inputs: of its second moment, and besides of what is computed with while it is factorized."""
CHUNK, CHUNK_BYTES = 1 << 24, 24
"""Values of a weight that are solved at a time; for each, bytes of what it is computed with and compared with."""


@dataclass(frozen=True)
class Solving:
    """`weights` that are solved; FLOP of the second moments for one row of inputs, of all factors, and of the products between
    blocks of columns; bytes of `memory` for the moments of the largest part of the model and one factor."""

    weights: int
    moments: float
    factors: float
    products: float
    memory: int


def solving(plan: list[LayerPlan]) -> Solving:
    """Of the layers of `plan` that can be solved; layers of a fusion group share their inputs."""
    entries = [entry for entry in to_quantize(plan) if FORMATS[entry.format].solves]
    inputs = {entry.layer.group or entry.layer.name: entry.layer for entry in entries}
    parts: Counter[str] = Counter()
    for layer in inputs.values():
        found = PART.match(f"{layer.name}.")
        parts[found[1] if found else layer.name] += MOMENT_BYTES * layer.in_features**2
    widths = [layer.in_features for layer in inputs.values()]
    chunk = min(CHUNK, max((entry.parameters for entry in entries), default=0))
    return Solving(
        weights=sum(entry.parameters for entry in entries),
        moments=sum(1.1 * width**2 for width in widths),
        factors=sum(2 / 3 * width**3 for width in widths),
        products=float(sum(entry.parameters * entry.layer.in_features for entry in entries)),
        memory=max(parts.values(), default=0) + FACTOR_BYTES * max(widths, default=0) ** 2 + CHUNK_BYTES * chunk,
    )
