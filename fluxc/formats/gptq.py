"""GPTQ in NVFP4: columns are rounded in order, and those to come make up for what was lost, as the layer's inputs weigh it.

Frantar et al. 2022 (arXiv 2210.17323). A weight W [out, in] is to keep x W^T over calibration's inputs x. With their second
moments H = sum x x^T, and U upper triangular with H^-1 = U^T U, column c is rounded, and what it lost, over U[c, c], times
U[c, c+1:] is taken from the columns behind it.

1. The tensor scale is fixed first. The scale of a block of 16 is chosen when its first column comes, from the values that the
   block has by then; one chosen for the values as published could be too small for them.
2. Columns go by FEW at a time, in which the kernel does the work, a row at a time; what they lost is taken from the rest of
   COLUMNS in a matrix product, and what all of these lost from the rest of the weight in another.
3. `order_of` puts the blocks whose inputs weigh most first, and so in each block its columns: what is rounded early is made up
   for by all that follow. A block stays what it is; only the order in which its columns are fixed differs.
4. `factor` dampens H by a share of its mean diagonal. A channel whose inputs were all zero is rounded to the nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fluxc.formats import cpu
from fluxc.formats.constants import BLOCK

if TYPE_CHECKING:
    import torch

    from fluxc.recipe.structs import Scales

DAMPING = 0.01
"""Of the mean diagonal of H, added to it: GPTQ's own."""
MORE_DAMPING = (1.0, 10.0, 100.0)
"""Times DAMPING, tried in turn until H can be factorized."""
COLUMNS, FEW = 128, 32
PANEL, LEAF = 512, 32
"""Columns of `factor` that are eliminated at a time, and at most by LAPACK."""


class SingularError(ValueError):
    """Second moments that cannot be factorized, however they are dampened."""


def order_of(energy: np.ndarray) -> np.ndarray:
    """The order in which columns are rounded, int64 [in]: blocks of 16 by what the `energy` [in] of their columns, the diagonal
    of the second moments, adds up to, the largest first, and so the columns of each."""
    by_block = energy.astype(np.float64).reshape(-1, BLOCK)
    blocks = np.argsort(-by_block.sum(1), kind="stable")
    inside = np.argsort(-by_block, axis=1, kind="stable")
    found: np.ndarray = (BLOCK * blocks[:, None] + inside[blocks]).ravel()
    return found


def factor(moments: np.ndarray | torch.Tensor, damping: float = DAMPING, order: np.ndarray | None = None) -> np.ndarray:
    """U fp32 [in, in], upper triangular, U^T U the inverse of the dampened second `moments` [in, in], columns in `order`.

    Of `moments`, fp32 or fp64, without an order the upper triangle is read. Computed is in fp64, where they are (a tensor may
    be on a GPU), in panels whose products do not depend on the number of threads. Raises SingularError where they are not
    finite, or not positive definite even with a hundred times the damping.
    """
    import torch

    given = torch.as_tensor(moments)
    diagonal = given.diagonal().double()
    if not bool(torch.isfinite(given.sum(dtype=torch.float64))) or bool((diagonal < 0).any()):
        raise SingularError("the second moments of its inputs are not finite, or negative")
    dead = diagonal == 0
    if bool(dead.all()):
        return np.eye(len(moments), dtype=np.float32)
    share = float(diagonal[~dead].mean())
    diagonal = torch.where(dead, share, diagonal)
    turned = torch.arange(len(given)).flip(0) if order is None else torch.from_numpy(order[::-1].copy())
    turned = turned.to(given.device)
    for more in MORE_DAMPING:
        # Of H turned end for end the lower factor is the upper one of H.
        lower = _picked(given, turned)
        lower.diagonal().copy_(diagonal[turned] + damping * more * share)
        if _invert_factor(lower):
            return np.ascontiguousarray(lower.float().flip(0, 1).cpu().numpy())
    raise SingularError("the second moments of its inputs are not positive definite")


def _picked(matrix: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Rows and columns `numbers` of `matrix` in fp64, some rows at a time."""
    import torch

    picked = torch.empty(len(numbers), len(numbers), dtype=torch.float64, device=matrix.device)
    for first in range(0, len(numbers), PANEL):
        rows = numbers[first : first + PANEL]
        picked[first : first + PANEL] = matrix[rows][:, numbers]
    return picked


def _invert_factor(lower: torch.Tensor) -> bool:
    """In place of the lower triangle of a symmetric matrix fp64, the inverse of its Cholesky factor, above it zeros; False, and
    anything, where it is not positive definite."""
    import torch

    size = len(lower)
    panels = [slice(first, min(first + PANEL, size)) for first in range(0, size, PANEL)]
    inverses = []
    for number, panel in enumerate(panels):
        rest = slice(panel.stop, size)
        inverse = _inverted_block(lower[panel, panel])
        if inverse is None:
            return False
        inverses.append(inverse)
        below = lower[rest, panel]
        below.copy_(below @ inverse.T)
        for other in panels[number + 1 :]:
            lower[other.start :, other].addmm_(lower[other.start :, panel], lower[other, panel].T, alpha=-1)
    for number, panel in enumerate(panels):
        # Row by row: those above are inverted already, and each begins at its diagonal.
        row = torch.zeros(panel.stop - panel.start, panel.start, dtype=lower.dtype, device=lower.device)
        for other in panels[:number]:
            # A product over many rows at once would be parted between threads, and added up as there are threads.
            for between in panels[panels.index(other) : number]:
                row[:, other].addmm_(lower[panel, between], lower[between, other])
        lower[panel, : panel.start] = -(inverses[number] @ row)
        lower[panel, panel] = inverses[number]
        lower[panel, panel.stop :] = 0
    return True


def _inverted_block(block: torch.Tensor) -> torch.Tensor | None:
    """The inverse of the Cholesky factor of a block; None where it is not positive definite.

    Halved until LAPACK takes the same path with any number of threads.
    """
    import torch

    size = len(block)
    if size <= LEAF:
        lower, failed = torch.linalg.cholesky_ex(block)
        unit = torch.eye(size, dtype=block.dtype, device=block.device)
        return None if int(failed) else torch.linalg.solve_triangular(lower, unit, upper=False)
    half = size // 2
    first = _inverted_block(block[:half, :half])
    if first is None:
        return None
    below = block[half:, :half] @ first.T
    second = _inverted_block(block[half:, half:] - below @ below.T)
    if second is None:
        return None
    inverse = torch.zeros_like(block)
    inverse[:half, :half], inverse[half:, half:] = first, second
    inverse[half:, :half] = -(second @ (below @ first))
    return inverse


def solve(
    weight: np.ndarray,
    upper: np.ndarray,
    tensor_scale: np.float32,
    scales: Scales = "max",
    order: np.ndarray | None = None,
) -> cpu.Quantized:
    """NVFP4 codes and block scales of `weight` fp32 [rows, in], under `upper` of `factor`, in its `order`, and a tensor scale.

    `scales` says how block scales are chosen (cpu.nvfp4_scales). Rows do not depend on each other, so that a weight may be
    solved in parts. ValueError when in is not a multiple of 16.
    """
    import torch

    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"NVFP4 needs in_features divisible by {BLOCK}, got {columns}")
    order = np.arange(columns) if order is None else order
    codes, block_scales = np.empty((rows, columns), np.uint8), np.empty((rows, columns // BLOCK), np.uint8)
    search = cpu.search_range(scales)
    work, factors = torch.from_numpy(np.asarray(weight, np.float32)[:, order]), torch.from_numpy(upper)
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        block, lost = work[:, start:stop].contiguous(), torch.empty(rows, stop - start)
        for first in range(start, stop, FEW):
            last = min(first + FEW, stop)
            own, errors = block[:, first - start : last - start].contiguous(), torch.empty(rows, last - first)
            found = np.empty((rows, (last - first) // BLOCK), np.uint8), np.empty((rows, last - first), np.uint8)
            triangle = np.ascontiguousarray(upper[first:last, first:last])
            outs = (*found, errors.numpy())
            cpu.kernels.solve_columns(own.numpy(), triangle, cpu.E2M1[:8], np.float32(tensor_scale), search, outs)
            block_scales[:, order[first:last:BLOCK] // BLOCK], codes[:, order[first:last]] = found
            lost[:, first - start : last - start] = errors
            block[:, last - start :].addmm_(errors, factors[first:last, last:stop], alpha=-1)
        work[:, stop:].addmm_(lost, factors[start:stop, stop:], alpha=-1)
    return cpu.Quantized(codes[:, 1::2] << 4 | codes[:, 0::2], block_scales)
