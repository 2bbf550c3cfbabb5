"""MXFP4: E2M1 values in blocks of 32 along in_features, an E8M0 scale (a power of two) a block, nothing else.

The open format of the OCP Microscaling Formats specification, version 1.0 (sections 5.3.3 and 6.3): scale = 2^(floor(log2
amax) - 2), 2 being the exponent of E2M1's largest power of two; values are divided by it, rounded half to even on the
grid and saturate at 6. The layout is that of NVFP4's codes: the LOW nibble holds the even column.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fluxc.formats import cpu
from fluxc.formats.constants import E2M1_VALUES, MX_BLOCK
from fluxc.formats.nvfp4 import round_to_e2m1
from fluxc.formats.tensors import patterns_of, refuse_non_finite


class Quantized(NamedTuple):
    """`codes` uint8 [out, in/2], `scales` uint8 [out, in/32] holding E8M0: code e is 2^(e - 127)."""

    codes: torch.Tensor
    scales: torch.Tensor


def quantize(weight: torch.Tensor) -> Quantized:
    """Quantize `weight` [out, in] (bf16, fp16 or fp32).

    A block of zeros, or of values under 2^-124, gets the smallest scale, 2^-127. Raises ValueError when in is not a multiple
    of 32, NotFiniteError (a ValueError) with the position of a NaN or infinity.
    """
    if weight.shape[1] % MX_BLOCK:
        raise ValueError(f"MXFP4 needs in_features divisible by {MX_BLOCK}, got {weight.shape[1]}")
    if weight.device.type == "cpu":
        return Quantized(*map(torch.from_numpy, cpu.mxfp4(*patterns_of(weight))))
    return quantize_by_torch(weight)


def quantize_by_torch(weight: torch.Tensor) -> Quantized:
    """`quantize` in torch operators: what runs on a GPU, and what the kernel is compared with."""
    refuse_non_finite(weight)
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows, columns // MX_BLOCK, MX_BLOCK)
    exponent = blocks.abs().amax(-1).view(torch.int32) >> 23
    scales = (exponent - 2).clamp(min=0)
    # In two exact halves, because 2^127, the reciprocal of the smallest scale, times a value may overflow fp32.
    power = 127 - scales.unsqueeze(-1)
    scaled = torch.ldexp(torch.ldexp(blocks, power // 2), power - power // 2)
    rounded = round_to_e2m1(scaled.abs())
    code = torch.where(rounded < 2, rounded * 2, torch.where(rounded < 4, rounded + 2, rounded / 2 + 4))
    code = (code.to(torch.uint8) | ((scaled < 0).to(torch.uint8) << 3)).reshape(rows, columns)
    return Quantized((code[:, 1::2] << 4) | code[:, 0::2], scales.to(torch.uint8))


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32 [out, in] from `codes` uint8 [out, in/2] and E8M0 `scales` uint8 [out, in/32]."""
    if codes.device.type == "cpu":
        return torch.from_numpy(cpu.mxfp4_values(cpu.Quantized(codes.numpy(), scales.numpy())))
    values = torch.tensor(E2M1_VALUES, device=codes.device)
    unpacked = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(codes.shape[0], -1, MX_BLOCK)
    return torch.ldexp(values[unpacked.long()], scales.int().unsqueeze(-1) - 127).reshape(codes.shape[0], -1)
