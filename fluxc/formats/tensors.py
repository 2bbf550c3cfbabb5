"""Torch tensors as bit patterns, and the check that a tensor is finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fluxc.formats.cpu import PATTERNS, NotFiniteError

if TYPE_CHECKING:
    import torch

_DTYPES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}


def patterns_of(weight: torch.Tensor) -> tuple[np.ndarray, str]:
    """(bit patterns uint [rows, columns], safetensors dtype) of a bf16, fp16 or fp32 CPU tensor; a view if contiguous."""
    import torch

    if str(weight.dtype) not in _DTYPES:
        raise ValueError(f"only bf16, fp16 and fp32 can be quantized, got {weight.dtype}")
    dtype = _DTYPES[str(weight.dtype)]
    signed = torch.int32 if weight.dtype == torch.float32 else torch.int16
    return weight.detach().contiguous().view(signed).numpy().view(PATTERNS[dtype]), dtype


def refuse_non_finite(weight: torch.Tensor) -> None:
    """Raise NotFiniteError at the first NaN or infinity of `weight` [rows, columns]."""
    import torch

    if not torch.isfinite(weight.abs().amax()):
        row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise NotFiniteError((row, column))
