"""NVFP4: E2M1 values in blocks of 16 along in_features, an E4M3 scale a block, an FP32 scale a tensor.

value = E2M1 code * E4M3 block scale * tensor scale. Layout and rounding are ModelOpt's (nvfp4_tensor.py, 0.47): the LOW
nibble holds the even column, block scales lie row-major, and codes are bit-identical to modelopt's own. Tensors on the
CPU go through the compiled kernels (fluxc.formats.cpu), tensors elsewhere through torch operators; the results are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fluxc.formats import cpu, gptq
from fluxc.formats.base import Format, GraphBuilder, Matrix, Parts
from fluxc.formats.bf16 import BF16
from fluxc.formats.constants import BLOCK, E2M1_MAX, E2M1_VALUES, E4M3_MAX, E4M3_TINY
from fluxc.formats.forms import e2m1_blocks, scaled_blocks
from fluxc.formats.tensors import patterns_of, refuse_non_finite
from fluxc.recipe.structs import Scales

if TYPE_CHECKING:
    import torch


class Quantized(NamedTuple):
    """`codes` uint8 [out, in/2], `block_scales` float8_e4m3fn [out, in/16], `tensor_scale` float32 ()."""

    codes: torch.Tensor
    block_scales: torch.Tensor
    tensor_scale: torch.Tensor


def empty(rows: int, columns: int, device: torch.device | str = "cpu") -> Quantized:
    """Room for a quantized weight [rows, columns], to be given to `quantize` as `out`."""
    import torch

    return Quantized(
        torch.empty(rows, columns // 2, dtype=torch.uint8, device=device),
        torch.empty(rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device=device),
        torch.empty((), device=device),
    )


def tensor_scale(amax: torch.Tensor) -> torch.Tensor:
    """The FP32 scale () that maps `amax` to the largest value E2M1 times E4M3 can hold; 1 for an all-zero tensor."""
    import torch

    amax = amax.float()
    return torch.where(amax > 0, amax / (E2M1_MAX * E4M3_MAX), torch.ones_like(amax))


def quantize(
    weight: torch.Tensor, scale: torch.Tensor | None = None, scales: Scales = "max", out: Quantized | None = None
) -> Quantized:
    """Quantize `weight` [out, in] (bf16, fp16 or fp32), into `out` where it is given.

    `scale` (fp32, ()) is the tensor scale, by default the one for this weight alone. `scales` says how block scales are
    chosen, see cpu.nvfp4_scales. Values are divided by the ROUNDED block scale; a negative value that rounds to zero keeps
    its sign bit, as ModelOpt's does. Raises ValueError when in is not a multiple of 16, NotFiniteError (a ValueError)
    with the position of a NaN or infinity.
    """
    import torch

    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"NVFP4 needs in_features divisible by {BLOCK}, got {columns}")
    out = out or empty(rows, columns, weight.device)
    if weight.device.type != "cpu":
        codes, block_scales, used = quantize_by_torch(weight, scale, scales)
        for target, result in zip(out, (codes, block_scales, used), strict=True):
            target.copy_(result)
        return out
    patterns, dtype = patterns_of(weight)
    amax = cpu.block_amax(patterns, dtype)
    if scale is None:
        scale = torch.tensor(cpu.joint_tensor_scale([(patterns, dtype)], cpu.largest(amax, dtype), "nvfp4", scales))
    out.tensor_scale.copy_(scale)
    arrays = cpu.Quantized(out.codes.numpy(), out.block_scales.view(torch.uint8).numpy())
    cpu.nvfp4(patterns, dtype, amax, np.float32(out.tensor_scale.item()), scales, arrays)
    return out


def quantize_by_torch(weight: torch.Tensor, scale: torch.Tensor | None = None, scales: Scales = "max") -> Quantized:
    """`quantize` in torch operators: what runs on a GPU, and what the kernels are compared with."""
    import torch

    refuse_non_finite(weight)
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows, columns // BLOCK, BLOCK)
    if scale is None:
        scale = _best_tensor_scale(weight, scales)
    exact = blocks.abs().amax(-1) / (E2M1_MAX * scale)
    exact = torch.where(exact == 0, torch.ones_like(exact), exact)
    chosen = exact.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
    if scales != "max":
        chosen = _search_scales(blocks, chosen, scale, scales)
    scaled = blocks / (chosen.float() * scale).unsqueeze(-1)
    rounded = round_to_e2m1(scaled.abs())
    # 0 .5 1 1.5 | 2 3 | 4 6 have codes 0 1 2 3 | 4 5 | 6 7
    code = torch.where(rounded < 2, rounded * 2, torch.where(rounded < 4, rounded + 2, rounded / 2 + 4))
    code = code.to(torch.uint8) | ((scaled < 0).to(torch.uint8) << 3)
    code = code.reshape(rows, columns)
    return Quantized((code[:, 1::2] << 4) | code[:, 0::2], chosen, scale)


def _best_tensor_scale(weight: torch.Tensor, scales: Scales) -> torch.Tensor:
    """The tensor scale of one weight alone; the candidates and the sample of cpu.joint_tensor_scale."""
    exact = tensor_scale(weight.abs().amax())
    if scales == "max":
        return exact
    sample = weight[:: cpu.sample_step(weight.numel())]
    candidates = [exact * factor for factor in cpu.TENSOR_SCALE_FACTORS]
    errors = [
        (dequantize(*quantize_by_torch(sample, candidate, scales)) - sample.float()).double().square().sum().item()
        for candidate in candidates
    ]
    return candidates[errors.index(min(errors))]


def _search_scales(blocks: torch.Tensor, first: torch.Tensor, scale: torch.Tensor, scales: Scales) -> torch.Tensor:
    """The E4M3 scale of least squared error for every block [rows, blocks, 16], from the candidates of cpu.nvfp4_scales."""
    import torch

    codes = first.view(torch.uint8).int()
    if scales == "mse":
        offsets = range(-cpu.MSE_BELOW, cpu.MSE_ABOVE + 1)
        candidates = [(codes + offset).clamp(1, 126).to(torch.uint8) for offset in offsets]
    else:
        candidates = [(first.float() * 1.5).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)]
    best = first.view(torch.uint8)
    least = block_error(blocks, first.float() * scale)
    for candidate in candidates:
        error = block_error(blocks, candidate.view(torch.float8_e4m3fn).float() * scale)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best.view(torch.float8_e4m3fn)


def block_error(blocks: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Squared error of every block under `step` [rows, blocks], added in the kernel's order so that ties fall the same way."""
    magnitude, step = blocks.abs(), step.unsqueeze(-1)
    error = (magnitude - round_to_e2m1(magnitude * (1 / step)) * step).square()
    while error.shape[-1] > 1:
        half = error.shape[-1] // 2
        error = error[..., :half] + error[..., half:]
    return error.squeeze(-1)


def round_to_e2m1(magnitude: torch.Tensor) -> torch.Tensor:
    """Non-negative fp32 values rounded to the E2M1 grid, ties to the even code, saturating at 6.

    The grid's step is 0.5 below 2, 1 below 4 and 2 above, so half-to-even on value/step is half-to-even on codes.
    """
    import torch

    magnitude = magnitude.clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.round(magnitude / step) * step


def dequantize(codes: torch.Tensor, block_scales: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 [out, in] from `codes` uint8 [out, in/2], `block_scales` E4M3 [out, in/16] and the tensor scale ()."""
    import torch

    if codes.device.type == "cpu":
        arrays = cpu.Quantized(codes.contiguous().numpy(), block_scales.contiguous().view(torch.uint8).numpy())
        return torch.from_numpy(cpu.nvfp4_values(arrays, np.float32(scale.item())))
    values = torch.tensor(E2M1_VALUES, device=codes.device)
    unpacked = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(codes.shape[0], -1)
    blocks = values[unpacked.long()].reshape(codes.shape[0], -1, BLOCK)
    return (blocks * (block_scales.float() * scale).unsqueeze(-1)).reshape(codes.shape[0], -1)


def fake_quantize(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """What an FP4 GPU makes of activations `x` [..., in]: E4M3 block scales under `input_scale` (fp32, ()), E2M1 values.

    Returns fp32 of the same shape. TensorRT's FP4 dynamic quantization: scale = E4M3(clip(amax/6/input_scale)). Raises
    ValueError when in is not a multiple of 16. A NaN stays a NaN.
    """
    import torch

    if x.shape[-1] % BLOCK:
        raise ValueError(f"NVFP4 needs in_features divisible by {BLOCK}, got {x.shape[-1]}")
    blocks = x.float().reshape(*x.shape[:-1], -1, BLOCK)
    exact = blocks.abs().amax(-1, keepdim=True) / E2M1_MAX / input_scale
    step = exact.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn).float() * input_scale
    return (torch.sign(blocks) * round_to_e2m1(blocks.abs() / step) * step).reshape(x.shape)


class NVFP4(Format):
    """The format in ModelOpt's layout: codes, E4M3 block scales, an FP32 tensor scale and input scale."""

    name = "nvfp4"
    values = "e2m1"
    block = BLOCK
    bits = 4
    algorithm = "NVFP4"
    variants = MappingProxyType({"pre_quant_scale": "NVFP4_AWQ", "svdquant_lora_a": "NVFP4_SVD"})
    group_size = BLOCK
    scalars: tuple[str, ...] = ("input_scale", "weight_scale_2")
    searches_scales = True
    solves = "nvfp4"
    weights_alone = "nvfp4-w4a16"
    # A block whose scale would exceed 448 is clipped whole, while E4M3 scales stay precise for 14 octaves below.
    margin = 8.0

    def parts(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See Format."""
        return {
            "input_scale": ("F32", ()),
            "weight_scale_2": ("F32", ()),
            "weight": ("U8", (rows, columns // 2)),
            "weight_scale": ("F8_E4M3", (rows, columns // BLOCK)),
        }

    def amaxes(self, patterns: np.ndarray, dtype: str) -> np.ndarray:
        """See Format."""
        return cpu.block_amax(patterns, dtype)

    def group_scale(self, members: list[Matrix], amax: np.float32, scales: Scales) -> np.float32:
        """See cpu.joint_tensor_scale."""
        return cpu.joint_tensor_scale(members, amax, "nvfp4", scales)

    def input_scale(self, amax: float) -> np.float32:
        """See Format."""
        return cpu.tensor_scale(amax, "nvfp4")

    def encode(self, patterns: np.ndarray, dtype: str, amax: np.ndarray, scale: np.float32, scales: Scales) -> Parts:
        """See Format."""
        coded = cpu.nvfp4(patterns, dtype, amax, scale, scales)
        return {"weight_scale": coded.block_scales, "weight": coded.codes}

    def solve(
        self, weight: np.ndarray, factor: tuple[np.ndarray, np.ndarray], scale: np.float32, scales: Scales
    ) -> Parts:
        """See Format."""
        upper, order = factor
        coded = gptq.solve(weight, upper, scale, scales, order)
        return {"weight_scale": coded.block_scales, "weight": coded.codes}

    def decode(self, parts: Parts, scale: np.float32) -> np.ndarray:
        """See Format."""
        return cpu.nvfp4_values(cpu.Quantized(parts["weight"], parts["weight_scale"]), scale)

    def error(self, patterns: np.ndarray, dtype: str, parts: Parts, scale: np.float32) -> tuple[float, float]:
        """See Format."""
        return cpu.nvfp4_error(patterns, dtype, cpu.Quantized(parts["weight"], parts["weight_scale"]), scale)

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See Format."""
        return dequantize(parts["weight"], parts["weight_scale"], parts["weight_scale_2"].reshape(()))

    def fake_quantize(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """See Format."""
        return fake_quantize(x, scale)

    def tensor_scale(self, amax: torch.Tensor) -> torch.Tensor:
        """See Format."""
        return tensor_scale(amax)

    def reference_form(self, graph: GraphBuilder, layer: str, rows: int, columns: int) -> str:
        """Both scales dequantized, then the codes."""
        scales = graph.node(
            "DequantizeLinear",
            [graph.tensor(f"{layer}.weight_scale"), graph.tensor(f"{layer}.weight_scale_2")],
            f"{layer}/block_scales",
        )
        blocks = e2m1_blocks(graph, layer, rows, columns, BLOCK)
        return scaled_blocks(graph, layer, blocks, scales, (rows, columns))


class NVFP4W4A16(NVFP4):
    """NVFP4 weights alone: no input scale, and inputs stay as they are; a GPU dequantizes the weight and multiplies in bf16."""

    name = "nvfp4-w4a16"
    algorithm = "W4A16_NVFP4"
    variants = MappingProxyType({})
    scalars = ("weight_scale_2",)
    calibrated = False
    weights_alone = ""
    multiplies = BF16
    margin = 1.0

    def parts(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See Format."""
        return {name: part for name, part in super().parts(rows, columns).items() if name != "input_scale"}

    def input_scale(self, amax: float) -> np.float32:
        """See Format."""
        return np.float32(1)

    def fake_quantize(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """See Format."""
        return x

    def tensor_scale(self, amax: torch.Tensor) -> torch.Tensor:
        """See Format."""
        import torch

        return torch.ones_like(amax)
