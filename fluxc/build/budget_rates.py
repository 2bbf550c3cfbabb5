"""How fast this machine computes, hashes, copies and reads: measured in about a second."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

ROWS, INNER, COLUMNS = 256, 3072, 3072
"""Of the product that is timed: tokens and width of a klein 4B's layer."""
FLOP = 2.0 * ROWS * INNER * COLUMNS
SECONDS = 0.1
"""What each measurement takes at least."""
HASHED, COPIED, READ = 16 << 20, 64 << 20, 64 << 20


class Rates:
    """FLOP/s of a large product as this CPU reaches it, bytes/s of the rest; each is measured when it is first asked for.

    `reading` is measured on `file`, of which a stretch is dropped from the page cache.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file

    @cached_property
    def float32(self) -> float:
        """FLOP/s in fp32."""
        one, other = np.ones((ROWS, INNER), np.float32), np.ones((INNER, COLUMNS), np.float32)
        return FLOP / _seconds(lambda: one @ other)

    @cached_property
    def bfloat16(self) -> float:
        """FLOP/s in bfloat16, by torch, which is what runs the model."""
        import torch

        one, other = torch.ones(ROWS, INNER, dtype=torch.bfloat16), torch.ones(COLUMNS, INNER, dtype=torch.bfloat16)
        return FLOP / _seconds(lambda: torch.nn.functional.linear(one, other))

    @cached_property
    def hashing(self) -> float:
        """Bytes/s of SHA-256."""
        buffer = bytes(HASHED)
        return HASHED / _seconds(lambda: hashlib.sha256(buffer))

    @cached_property
    def copying(self) -> float:
        """Bytes/s of a copy in memory."""
        copied = np.zeros(COPIED, np.uint8)
        return COPIED / _seconds(lambda: copied.copy())

    @cached_property
    def reading(self) -> float:
        """Bytes/s of reading what is not in the page cache."""
        return min(self.copying, _reading(self._file) if self._file else self.copying)


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of `work`: the best of as many runs as fit into SECONDS, after one that warms up."""
    work()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while True:
        began = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - began)
        if now >= end:
            return max(best, sys.float_info.epsilon)


def _reading(file: Path) -> float:
    """Bytes/s of a stretch in the middle of `file`, which is first dropped from the page cache."""
    with suppress(OSError), file.open("rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        start, length = size // 2, min(READ, size - size // 2)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), start, length, os.POSIX_FADV_DONTNEED)
        opened.seek(start)
        began = time.perf_counter()
        taken = sum(
            len(piece) for piece in iter(lambda: opened.read(min(1 << 20, start + length - opened.tell())), b"")
        )
        if taken:
            return taken / max(time.perf_counter() - began, 1e-9)
    return float("inf")
