"""bf16 on the host: numpy has no such type. For feeding and reading buffers, never inside the step loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def to_bf16(array: np.ndarray) -> np.ndarray:
    """fp32 as bf16 bit patterns, uint16, rounded to nearest even; every NaN becomes the quiet one."""
    import numpy as np

    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(patterns: np.ndarray) -> np.ndarray:
    """bf16 bit patterns, uint16, as fp32."""
    import numpy as np

    return (patterns.astype(np.uint32) << 16).view(np.float32)
