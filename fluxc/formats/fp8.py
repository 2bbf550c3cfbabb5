"""FP8 E4M3: value = code * scale with an FP32 scale a tensor (ModelOpt's FP8 layout) or a row, scale = amax / 448."""

from __future__ import annotations

import torch

from fluxc.formats import cpu
from fluxc.formats.constants import E4M3_MAX
from fluxc.formats.tensors import patterns_of, refuse_non_finite


def tensor_scale(amax: torch.Tensor) -> torch.Tensor:
    """The FP32 scale that maps `amax` (any shape) to 448; 1 where it is zero."""
    amax = amax.float()
    return torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))


def row_scales(weight: torch.Tensor) -> torch.Tensor:
    """FP32 scales [out, 1], one a row of `weight` [out, in]."""
    return tensor_scale(weight.abs().amax(1, keepdim=True))


def quantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`weight` [out, in] (bf16, fp16 or fp32) divided by `scale`, rounded to float8_e4m3fn, half to even, saturating.

    `scale` is fp32, () for the whole tensor or [out, 1] for its rows. Raises NotFiniteError (a ValueError) with the position
    of a NaN or infinity.
    """
    refuse_non_finite(weight)
    if weight.device.type == "cpu":
        patterns, dtype = patterns_of(weight)
        codes = cpu.fp8(patterns, dtype, scale.float().reshape(-1).numpy())
        return torch.from_numpy(codes).view(torch.float8_e4m3fn)
    return (weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 values of `codes` float8_e4m3fn [out, in] under `scale` () or [out, 1]."""
    return codes.float() * scale


def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What an FP8 GPU makes of activations `x` [..., in] under the static `scale` (fp32, ()): fp32 of the same shape."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
