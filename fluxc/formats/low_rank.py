"""Factors b a of low rank beside a quantized weight, as SVDQuant has them: what they leave of the weight is rounded.

Li et al. 2024 (arXiv 2411.05007). y = q(x) Q^T + (x a^T) b^T, and x is not rounded in the second term. Under second moments G
of inputs, the b a of rank r that leaves least of a matrix E is U U^T E, with U [out, r] the first eigenvectors of E G E^T. They
are fitted twice:

1. E is the weight, and G the diagonal of what rounding makes wrong of x: what b a takes from Q is free of that error.
2. E is the weight less Q, and G the second moments of x: b a makes up for what rounding the weight lost.

U comes from a block power iteration (Halko et al. 2011, arXiv 0909.4061) whose start is always the same. Sums are added up in
the same order with any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

A, B = "svdquant_lora_a", "svdquant_lora_b"
"""ModelOpt's names for the factors [rank, in] and [out, rank]."""
OVERSAMPLED = 16
"""Directions that are followed besides those that are kept."""
ITERATIONS = 2
"""On flux2-nano's layers this comes within 0.03 dB of a singular value decomposition."""
PANEL = 512
"""A sum over rows or columns is taken so many at a time, which threads do not part."""
SEED = 0


def factors_bytes(rank: int, rows: int, columns: int) -> int:
    """Bytes of both factors, in bf16, beside a weight [rows, columns]."""
    return 2 * rank * (rows + columns)


def fit(
    weight: torch.Tensor, moments: torch.Tensor, rank: int, damping: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(b [out, rank], a [rank, in]) in bf16, whose product leaves least of `weight` fp32 [out, in] under `moments`.

    `moments`, fp32: [in, in] and symmetric, or [in], a diagonal; `damping`, a share of their mean diagonal, is added to it, so
    that what no input showed is kept too. a is fitted to b as rounded. On the CPU. ValueError where `rank` is more than in or
    out.
    """
    import torch

    rows, columns = weight.shape
    if rank > min(rows, columns):
        raise ValueError(f"factors of rank {rank} need at least as many rows and columns, got {rows} x {columns}")
    diagonal = moments if moments.ndim == 1 else moments.diagonal()
    # Only ratios count; products of large moments would overflow.
    share = 1 / float(diagonal.max()) if float(diagonal.max()) > 0 else 1.0
    added = damping * float(diagonal.double().mean())

    def weighed(columns: torch.Tensor) -> torch.Tensor:
        found = moments[:, None] * columns if moments.ndim == 1 else _times(moments, columns)
        return (found + added * columns) * share

    width = min(rank + OVERSAMPLED, rows, columns)
    start = np.random.Generator(np.random.Philox(SEED)).standard_normal((rows, width), dtype=np.float32)
    basis = torch.from_numpy(start)
    for _ in range(1 + ITERATIONS):
        basis = _orthonormal(_times(weight, weighed(_turned(weight, basis))))
    inside = _turned(weight, basis)
    with _one_thread():
        _, vectors = torch.linalg.eigh(_turned(inside, weighed(inside)).double())
    b = _times(basis, vectors[:, -rank:].flip(1).float()).bfloat16()
    rounded = b.float()
    with _one_thread():
        inverse = torch.linalg.inv(_turned(rounded, rounded).double()).float()
    return b, _times(_turned(weight, rounded), inverse).T.contiguous().bfloat16()


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what `columns` [rows, width] span, or of more."""
    import torch

    with _one_thread():
        basis, _ = torch.linalg.qr(columns)
    return basis


def _times(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left` @ `right`."""
    found = left.new_zeros(left.shape[0], right.shape[1])
    for first in range(0, left.shape[1], PANEL):
        found.addmm_(left[:, first : first + PANEL], right[first : first + PANEL])
    return found


def _turned(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left`.T @ `right`."""
    found = left.new_zeros(left.shape[1], right.shape[1])
    for first in range(0, left.shape[0], PANEL):
        found.addmm_(left[first : first + PANEL].T, right[first : first + PANEL])
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK parts its sums between threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
