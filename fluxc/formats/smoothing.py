"""Smoothing: every input channel is multiplied by p and the weight's column divided by it, as SVDQuant and AWQ have it.

Xiao et al. 2022 (arXiv 2211.10438, equation 4), Li et al. 2024 (arXiv 2411.05007). y = q(x p) (W / p)^T. With an exponent e,
p = |W|^(1 - e) / |x|^e over a channel: at 0.5 its inputs and its weights come out of equal size. What is hard to round moves
from inputs into the weight, and from there into factors of low rank. Sizes are root mean squares, not the largest values as in
these papers, which gain half as much in NVFP4 (docs/performance.md).
"""

from __future__ import annotations

import numpy as np

from fluxc.formats.bf16 import in_bf16

PRE_QUANT_SCALE = "pre_quant_scale"
"""ModelOpt's name for p [in], which is stored in bf16."""
EXPONENT = 0.5
LARGEST = 2.0**10
"""p lies between this and its inverse."""
ONE = np.uint16(0x3F80)
"""1 in bf16."""


def smoothing_bytes(columns: int) -> int:
    """Bytes of p, in bf16."""
    return 2 * columns


def fit(inputs: np.ndarray, weights: np.ndarray, exponent: float = EXPONENT) -> np.ndarray:
    """p, bf16 patterns uint16 [in], of the sizes fp32 [in] of every channel's `inputs` and `weights`, in any unit.

    Its geometric mean over channels is 1. A channel without any input, or without any weight, has 1; so have all where a
    size is not finite.
    """
    live = (inputs > 0) & (weights > 0)
    logarithms = np.zeros(len(inputs))
    if live.any() and np.isfinite(inputs).all() and np.isfinite(weights).all():
        powers = (1 - exponent) * np.log2(weights[live].astype(np.float64))
        powers -= exponent * np.log2(inputs[live].astype(np.float64))
        logarithms[live] = powers - powers.mean()
    most = np.log2(LARGEST)
    values = np.exp2(np.clip(logarithms, -most, most)).astype(np.float32)
    return in_bf16(values.view(np.uint32))


def values_of(patterns: np.ndarray) -> np.ndarray:
    """p fp32 of its bf16 patterns."""
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)
