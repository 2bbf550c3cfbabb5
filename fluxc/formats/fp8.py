"""FP8 E4M3: value = code * scale with an FP32 scale a tensor (ModelOpt's FP8 layout) or a row, scale = amax / 448."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fluxc.formats import cpu
from fluxc.formats.base import Format, GraphBuilder, Matrix, Parts
from fluxc.formats.constants import E4M3_MAX
from fluxc.formats.tensors import patterns_of, refuse_non_finite
from fluxc.recipe.structs import Scales

if TYPE_CHECKING:
    import torch


def tensor_scale(amax: torch.Tensor) -> torch.Tensor:
    """The FP32 scale that maps `amax` (any shape) to 448; 1 where it is zero."""
    import torch

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
    import torch

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
    import torch

    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


class FP8(Format):
    """The format in ModelOpt's layout: E4M3 codes, an FP32 scale of the tensor and one of the inputs."""

    name = "fp8"
    values = "e4m3"
    algorithm = "FP8"
    scalars = ("input_scale", "weight_scale")

    def parts(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See Format."""
        return {"input_scale": ("F32", ()), "weight_scale": ("F32", ()), "weight": ("F8_E4M3", (rows, columns))}

    def amaxes(self, patterns: np.ndarray, dtype: str) -> np.ndarray:
        """See Format."""
        return cpu.row_amax(patterns, dtype)

    def group_scale(self, members: list[Matrix], amax: np.float32, scales: Scales) -> np.float32:
        """See cpu.tensor_scale."""
        return cpu.tensor_scale(amax, "fp8")

    def input_scale(self, amax: float) -> np.float32:
        """See Format."""
        return cpu.tensor_scale(amax, "fp8")

    def encode(self, patterns: np.ndarray, dtype: str, amax: np.ndarray, scale: np.float32, scales: Scales) -> Parts:
        """See Format."""
        return {"weight": cpu.fp8(patterns, dtype, scale)}

    def decode(self, parts: Parts, scale: np.float32) -> np.ndarray:
        """See Format."""
        return cpu.fp8_values(parts["weight"], scale)

    def error(self, patterns: np.ndarray, dtype: str, parts: Parts, scale: np.float32) -> tuple[float, float]:
        """See Format."""
        return cpu.squared_sums(cpu.values(patterns, dtype), self.decode(parts, scale))

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See Format."""
        return dequantize(parts["weight"], parts["weight_scale"].reshape(()))

    def fake_quantize(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """See Format."""
        return fake_quantize(x, scale)

    def tensor_scale(self, amax: torch.Tensor) -> torch.Tensor:
        """See Format."""
        return tensor_scale(amax)

    def reference_form(self, graph: GraphBuilder, layer: str, rows: int, columns: int) -> str:
        """DequantizeLinear."""
        codes, scale = graph.tensor(f"{layer}.weight"), graph.tensor(f"{layer}.weight_scale")
        return graph.node("DequantizeLinear", [codes, scale], f"{layer}.weight/fp32")
