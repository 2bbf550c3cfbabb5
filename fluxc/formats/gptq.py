"""GPTQ in NVFP4: columns are rounded in order, and those to come make up for what was lost, as the layer's inputs weigh it.

Frantar et al. 2022 (arXiv 2210.17323). A weight W [out, in] is to keep x W^T over calibration's inputs x. With their second
moments H = sum x x^T, and U upper triangular with H^-1 = U^T U, column c is rounded, and what it lost, over U[c, c], times
U[c, c+1:] is taken from the columns behind it.

1. The tensor scale is fixed first. The scale of a block of 16 is chosen when its first column comes, from the values that the
   block has by then; one chosen for the values as published could be too small for them.
2. Columns go by COLUMNS at a time: inside, the kernel does the work, a row at a time; what all of them lost is taken from the
   rest of the weight in one matrix product.
3. `factor` dampens H by a share of its mean diagonal. A channel whose inputs were all zero is rounded to the nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fluxc.formats import cpu
from fluxc.formats.constants import BLOCK

if TYPE_CHECKING:
    from fluxc.recipe.structs import Scales

DAMPING = 0.01
"""Of the mean diagonal of H, added to it: GPTQ's own."""
MORE_DAMPING = (1.0, 10.0, 100.0)
"""Times DAMPING, tried in turn until H can be factorized."""
COLUMNS = 128


class SingularError(ValueError):
    """Second moments that cannot be factorized, however they are dampened."""


def factor(moments: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """U fp32 [in, in], upper triangular, U^T U the inverse of the dampened second `moments` [in, in], float64.

    Raises SingularError where they are not finite, or not positive definite even with a hundred times the damping.
    """
    import torch

    size = len(moments)
    matrix = torch.from_numpy(np.array(moments, np.float64))
    diagonal = matrix.diagonal()
    if not bool(torch.isfinite(matrix).all()) or bool((diagonal < 0).any()):
        raise SingularError("the second moments of its inputs are not finite, or negative")
    dead = diagonal == 0
    if bool(dead.all()):
        return np.eye(size, dtype=np.float32)
    share = float(diagonal[~dead].mean())
    diagonal[dead] = share
    for more in MORE_DAMPING:
        dampened = matrix + torch.eye(size, dtype=torch.float64) * (damping * more * share)
        # Of H turned end for end the lower factor is the upper one of H.
        lower, failed = torch.linalg.cholesky_ex(dampened.flip(0, 1))
        if not int(failed):
            unit = torch.eye(size, dtype=torch.float64)
            upper: np.ndarray = torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True).float().numpy()
            return upper
    raise SingularError("the second moments of its inputs are not positive definite")


def solve(weight: np.ndarray, upper: np.ndarray, tensor_scale: np.float32, scales: Scales = "max") -> cpu.Quantized:
    """NVFP4 codes and block scales of `weight` fp32 [rows, in], under `upper` of `factor` and a tensor scale.

    `scales` says how block scales are chosen (cpu.nvfp4_scales). Rows do not depend on each other, so that a weight may be
    solved in parts. ValueError when in is not a multiple of 16.
    """
    import torch

    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"NVFP4 needs in_features divisible by {BLOCK}, got {columns}")
    out = cpu.Quantized(np.empty((rows, columns // 2), np.uint8), np.empty((rows, columns // BLOCK), np.uint8))
    search = cpu.search_range(scales)
    work, factors = torch.from_numpy(np.array(weight, np.float32)), torch.from_numpy(upper)
    for first in range(0, columns, COLUMNS):
        last = min(first + COLUMNS, columns)
        own = work[:, first:last].contiguous()
        errors = np.empty((rows, last - first), np.float32)
        block_scales = np.empty((rows, (last - first) // BLOCK), np.uint8)
        codes = np.empty((rows, (last - first) // 2), np.uint8)
        block = np.ascontiguousarray(upper[first:last, first:last])
        outs = (block_scales, codes, errors)
        cpu.kernels.solve_columns(own.numpy(), block, cpu.E2M1[:8], np.float32(tensor_scale), search, outs)
        out.codes[:, first // 2 : last // 2] = codes
        out.block_scales[:, first // BLOCK : last // BLOCK] = block_scales
        work[:, last:].addmm_(torch.from_numpy(errors), factors[first:last, last:], alpha=-1)
    return out
