"""FP8 E4M3, one FP32 scale a tensor: value = code * scale, scale = amax / 448 (ModelOpt's FP8 layout)."""

from __future__ import annotations

import torch

from fluxc.quantize.formats import E4M3_MAX


def tensor_scale(amax: torch.Tensor) -> torch.Tensor:
    """The FP32 scale () that maps `amax` to 448; 1 for an all-zero tensor."""
    amax = amax.float()
    return torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))


def quantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`weight` (bf16, fp16 or fp32, finite) divided by `scale` and rounded to float8_e4m3fn, half to even, saturating."""
    return (weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 values of `codes` float8_e4m3fn under `scale` ()."""
    return codes.float() * scale
