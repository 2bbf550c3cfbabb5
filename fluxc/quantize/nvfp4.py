"""NVFP4: E2M1 values in blocks of 16 along in_features, an E4M3 scale a block, an FP32 scale a tensor.

value = E2M1 code * E4M3 block scale * tensor scale. Layout and rounding are ModelOpt's (nvfp4_tensor.py, 0.47): the LOW
nibble holds the even column, block scales lie row-major, and codes are bit-identical to modelopt's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fluxc.quantize.formats import BLOCK, E2M1_MAX, E2M1_VALUES, E4M3_MAX, E4M3_TINY


class Quantized(NamedTuple):
    """`codes` uint8 [out, in/2], `block_scales` float8_e4m3fn [out, in/16]."""

    codes: torch.Tensor
    block_scales: torch.Tensor


def tensor_scale(amax: torch.Tensor) -> torch.Tensor:
    """The FP32 scale () that maps `amax` to the largest value E2M1 times E4M3 can hold; 1 for an all-zero tensor."""
    amax = amax.float()
    return torch.where(amax > 0, amax / (E2M1_MAX * E4M3_MAX), torch.ones_like(amax))


def block_scales(block_amax: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E4M3 scales for blocks of largest magnitude `block_amax` (fp32, any shape) under tensor scale `scale`.

    amax / (6 * scale); all-zero blocks get 1; clamped to [2^-9, 448], so a block never gets scale 0.
    """
    exact = block_amax / (E2M1_MAX * scale)
    exact = torch.where(exact == 0, torch.ones_like(exact), exact)
    return exact.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def round_to_e2m1(magnitude: torch.Tensor) -> torch.Tensor:
    """Non-negative fp32 values rounded to the E2M1 grid, ties to the even code, saturating at 6.

    The grid's step is 0.5 below 2, 1 below 4 and 2 above, so half-to-even on value/step is half-to-even on codes.
    """
    magnitude = magnitude.clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.round(magnitude / step) * step


def quantize(weight: torch.Tensor, scale: torch.Tensor) -> Quantized:
    """Quantize `weight` [out, in] (bf16, fp16 or fp32, finite) under tensor scale `scale` (fp32, ()).

    in must be divisible by 16. Values are divided by the ROUNDED block scale. A negative value that rounds to zero keeps
    its sign bit, as ModelOpt's does.
    """
    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"NVFP4 needs in_features divisible by {BLOCK}, got {columns}")
    blocks = weight.float().reshape(rows, columns // BLOCK, BLOCK)
    scales = block_scales(blocks.abs().amax(-1), scale)
    scaled = blocks / (scales.float() * scale).unsqueeze(-1)
    rounded = round_to_e2m1(scaled.abs())
    # 0 .5 1 1.5 | 2 3 | 4 6 have codes 0 1 2 3 | 4 5 | 6 7
    code = torch.where(rounded < 2, rounded * 2, torch.where(rounded < 4, rounded + 2, rounded / 2 + 4))
    code = code.to(torch.uint8) | ((scaled < 0).to(torch.uint8) << 3)
    code = code.reshape(rows, columns)
    return Quantized((code[:, 1::2] << 4) | code[:, 0::2], scales)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 [out, in] from `codes` uint8 [out, in/2], `scales` E4M3 [out, in/16] and the tensor scale ()."""
    values = torch.tensor(E2M1_VALUES, device=codes.device)
    unpacked = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(codes.shape[0], -1)
    blocks = values[unpacked.long()].reshape(codes.shape[0], -1, BLOCK)
    return (blocks * (scales.float() * scale).unsqueeze(-1)).reshape(codes.shape[0], -1)


def fake_quantize(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """What an FP4 GPU makes of activations `x` [..., in]: E4M3 block scales under `input_scale` (fp32, ()), E2M1 values.

    Returns fp32 of the same shape. TensorRT's FP4 dynamic quantization: scale = E4M3(clip(amax/6/input_scale)).
    """
    blocks = x.float().reshape(*x.shape[:-1], -1, BLOCK)
    exact = blocks.abs().amax(-1, keepdim=True) / E2M1_MAX / input_scale
    step = exact.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn).float() * input_scale
    return (torch.sign(blocks) * round_to_e2m1(blocks.abs() / step) * step).reshape(x.shape)
