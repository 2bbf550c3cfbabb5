"""Constants of the number formats, and how many bytes a layer takes in each; no torch is imported here."""

from __future__ import annotations

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MX_BLOCK = 32


def stored_bytes(format: str, parameters: int) -> int:
    """Bytes of a quantized Linear's tensors in the weights file: values, scales, and its FP32 scalars."""
    if format == "nvfp4":
        return parameters // 2 + parameters // BLOCK + 8
    if format == "fp8":
        return parameters + 8
    raise ValueError(f"{format!r} is not a quantized format")
