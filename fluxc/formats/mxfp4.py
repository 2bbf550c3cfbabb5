"""MXFP4: E2M1 values in blocks of 32 along in_features, an E8M0 scale (a power of two) a block, nothing else.

The open format of the OCP Microscaling Formats specification, version 1.0 (sections 5.3.3 and 6.3): scale = 2^(floor(log2
amax) - 2), 2 being the exponent of E2M1's largest power of two; values are divided by it, rounded half to even on the
grid and saturate at 6. The layout is that of NVFP4's codes: the LOW nibble holds the even column.

Under that scale the largest value of a block is 4 to 8. Other tools take twice the scale where it is above 6 (ModelOpt, and
torchao's RCEIL: 2^ceil(log2(amax / 6))) or at least 7 (compressed-tensors, and torchao's EVEN). Where a recipe's `scales` is
not `max`, it is whichever of the two has less squared error, so that no block is worse than by any of these rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fluxc.formats import cpu
from fluxc.formats.base import Format, GraphBuilder, Parts
from fluxc.formats.constants import E2M1_VALUES, MX_BLOCK
from fluxc.formats.forms import e2m1_blocks, e8m0_scales, scaled_blocks
from fluxc.formats.nvfp4 import block_error, round_to_e2m1
from fluxc.formats.tensors import patterns_of, refuse_non_finite
from fluxc.recipe.structs import Scales

if TYPE_CHECKING:
    import torch


class Quantized(NamedTuple):
    """`codes` uint8 [out, in/2], `scales` uint8 [out, in/32] holding E8M0: code e is 2^(e - 127)."""

    codes: torch.Tensor
    scales: torch.Tensor


def quantize(weight: torch.Tensor, scales: Scales = "max") -> Quantized:
    """Quantize `weight` [out, in] (bf16, fp16 or fp32); `scales` other than `max` searches.

    A block of zeros, or of values under 2^-124, gets the smallest scale, 2^-127. Raises ValueError when in is not a multiple
    of 32, NotFiniteError (a ValueError) with the position of a NaN or infinity.
    """
    import torch

    if weight.shape[1] % MX_BLOCK:
        raise ValueError(f"MXFP4 needs in_features divisible by {MX_BLOCK}, got {weight.shape[1]}")
    if weight.device.type == "cpu":
        return Quantized(*map(torch.from_numpy, cpu.mxfp4(*patterns_of(weight), scales)))
    return quantize_by_torch(weight, scales)


def quantize_by_torch(weight: torch.Tensor, scales: Scales = "max") -> Quantized:
    """`quantize` in torch operators: what runs on a GPU, and what the kernel is compared with."""
    import torch

    refuse_non_finite(weight)
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows, columns // MX_BLOCK, MX_BLOCK)
    exponent = blocks.abs().amax(-1).view(torch.int32) >> 23
    chosen = (exponent - 2).clamp(min=0)
    if scales != "max":
        above = (chosen + 1).clamp(max=254)
        chosen = torch.where(_error(blocks, above) < _error(blocks, chosen), above, chosen)
    # In two exact halves, because 2^127, the reciprocal of the smallest scale, times a value may overflow fp32.
    power = 127 - chosen.unsqueeze(-1)
    scaled = torch.ldexp(torch.ldexp(blocks, power // 2), power - power // 2)
    rounded = round_to_e2m1(scaled.abs())
    code = torch.where(rounded < 2, rounded * 2, torch.where(rounded < 4, rounded + 2, rounded / 2 + 4))
    code = (code.to(torch.uint8) | ((scaled < 0).to(torch.uint8) << 3)).reshape(rows, columns)
    return Quantized((code[:, 1::2] << 4) | code[:, 0::2], chosen.to(torch.uint8))


def _error(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Squared error of every block [rows, blocks, 32] under E8M0 `codes` [rows, blocks], added in the kernel's order."""
    import torch

    halves = blocks.reshape(*codes.shape, 2, MX_BLOCK // 2)
    errors = block_error(halves, torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes - 127).unsqueeze(-1))
    return errors[..., 0] + errors[..., 1]


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32 [out, in] from `codes` uint8 [out, in/2] and E8M0 `scales` uint8 [out, in/32]."""
    import torch

    if codes.device.type == "cpu":
        return torch.from_numpy(cpu.mxfp4_values(cpu.Quantized(codes.numpy(), scales.numpy())))
    values = torch.tensor(E2M1_VALUES, device=codes.device)
    unpacked = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(codes.shape[0], -1, MX_BLOCK)
    return torch.ldexp(values[unpacked.long()], scales.int().unsqueeze(-1) - 127).reshape(codes.shape[0], -1)


class MXFP4(Format):
    """The format: codes and E8M0 block scales, nothing else; inputs are not rounded and need no calibration."""

    name = "mxfp4"
    values = "e2m1"
    block = MX_BLOCK
    bits = 4
    algorithm = "MXFP4"
    group_size = MX_BLOCK
    calibrated = False
    searches_scales = True

    def parts(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See Format."""
        return {"weight": ("U8", (rows, columns // 2)), "weight_scale": ("U8", (rows, columns // MX_BLOCK))}

    def amaxes(self, patterns: np.ndarray, dtype: str) -> np.ndarray:
        """See Format."""
        return cpu.block_amax(patterns, dtype, MX_BLOCK)

    def encode(self, patterns: np.ndarray, dtype: str, amax: np.ndarray, scale: np.float32, scales: Scales) -> Parts:
        """See Format."""
        coded = cpu.mxfp4(patterns, dtype, scales)
        return {"weight_scale": coded.block_scales, "weight": coded.codes}

    def decode(self, parts: Parts, scale: np.float32) -> np.ndarray:
        """See Format."""
        return cpu.mxfp4_values(cpu.Quantized(parts["weight"], parts["weight_scale"]))

    def error(self, patterns: np.ndarray, dtype: str, parts: Parts, scale: np.float32) -> tuple[float, float]:
        """See Format."""
        return cpu.squared_sums(cpu.values(patterns, dtype), self.decode(parts, scale))

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See Format."""
        return dequantize(parts["weight"], parts["weight_scale"])

    def reference_form(self, graph: GraphBuilder, layer: str, rows: int, columns: int) -> str:
        """Powers of two from a table, the codes from another."""
        scales = e8m0_scales(graph, layer)
        blocks = e2m1_blocks(graph, layer, rows, columns, MX_BLOCK)
        return scaled_blocks(graph, layer, blocks, scales, (rows, columns))
