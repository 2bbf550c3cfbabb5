"""What calibration records of one Linear's inputs, and how records of several prompts become one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Bins of |x| are the exponent and the first five mantissa bits of its bfloat16, so counts of any two runs can be added.
MANTISSA_BITS = 5
BINS = 1 << (8 + MANTISSA_BITS)
ROWS = 64
"""Rows kept of a layer's inputs over a whole calibration."""


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of one Linear over the calibration pass.

    `amax`: the largest magnitude (NaN if there was one). `histogram` int64 [BINS]: how many inputs had each magnitude, on
    the grid of `bin_edges`. `channel_amax` float32 [in]: the largest magnitude of each channel. `rows` float32
    [n, in]: a sample of inputs, spread over prompts, steps and tokens, rounded to bfloat16.
    """

    amax: float
    histogram: np.ndarray
    channel_amax: np.ndarray
    rows: np.ndarray


def merge(records: list[LayerInputs]) -> LayerInputs:
    """The record of all the passes that `records` are of; their rows follow one another."""
    amaxes = [record.amax for record in records]
    return LayerInputs(
        # max() may drop a NaN; it must be reported.
        amax=math.nan if any(map(math.isnan, amaxes)) else max(amaxes),
        histogram=np.sum([record.histogram for record in records], axis=0),
        channel_amax=np.max([record.channel_amax for record in records], axis=0),
        rows=np.concatenate([record.rows for record in records]),
    )


def bin_edges() -> np.ndarray:
    """The magnitude each bin starts at, float64 [BINS + 1]; bin i holds edges[i] <= |x| < edges[i + 1] before rounding."""
    patterns = np.minimum(np.arange(BINS, dtype=np.uint32) << np.uint32(23 - MANTISSA_BITS), np.uint32(0x7F800000))
    return np.append(patterns.view(np.float32).astype(np.float64), np.inf)
