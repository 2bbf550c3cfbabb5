"""bf16: a layer that stays as it is. It has no parts of its own; what is excluded is copied from the checkpoint."""

from __future__ import annotations

import numpy as np

BF16 = "bf16"


def in_bf16(patterns: np.ndarray) -> np.ndarray:
    """Finite fp32 values, given as their patterns uint32, as the patterns uint16 of bf16: to nearest, ties to even."""
    rounded = patterns + (np.uint32(0x7FFF) + ((patterns >> 16) & 1))
    return (rounded >> 16).astype(np.uint16)
