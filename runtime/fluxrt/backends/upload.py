"""Brings a program's weights to the GPU: while it copies one part, the next is read from disk."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from fluxrt.cuda import OutOfMemoryError
from fluxrt.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from io import FileIO
    from pathlib import Path

    import numpy as np

    from fluxrt.backends.buffers import Arena
    from fluxrt.cuda import Driver
    from fluxrt.weights import StoredTensor

PART = 64 << 20
"""Bytes that are copied at a time."""


def upload(driver: Driver, address: int, arena: Arena, stored: Mapping[str, StoredTensor]) -> None:
    """Fill the GPU's memory from `address` on with the tensors of `arena`, which is there when this returns.

    BundleError, naming the file, where one ends before a tensor does.
    """
    size = min(PART, arena.nbytes)
    with ExitStack() as stack:
        halves = _host_memory(driver, size, stack)
        # The copies first: memory that one still reads must not be given back.
        stack.callback(driver.synchronize)
        files = _Files(stack)
        marks: list[int | None] = [None, None]
        pieces = sorted(arena.pieces, key=lambda piece: piece.offset)
        first = 0
        for number, start in enumerate(range(0, arena.nbytes, size)):
            half, mark = halves[number % 2], marks[number % 2]
            if mark is not None:
                driver.wait(mark)
            stop = min(start + size, arena.nbytes)
            while first < len(pieces) and pieces[first].offset + stored[pieces[first].name].nbytes <= start:
                first += 1
            for piece in pieces[first:]:
                if piece.offset >= stop:
                    break
                tensor = stored[piece.name]
                begin, end = max(piece.offset, start), min(piece.offset + tensor.nbytes, stop)
                files.read(tensor.file, tensor.offset + begin - piece.offset, half[begin - start : end - start])
            driver.upload(address + start, half[: stop - start])
            marks[number % 2] = driver.mark()
        for mark in marks:
            if mark is not None:
                driver.wait(mark)


def _host_memory(driver: Driver, nbytes: int, stack: ExitStack) -> list[np.ndarray]:
    """Two pieces of page-locked memory, of ordinary memory where there is not enough that can be locked."""
    import numpy as np

    halves: list[np.ndarray] = []
    try:
        for _ in range(2):
            halves.append(driver.pin(nbytes))
            stack.callback(driver.unpin, halves[-1])
    except OutOfMemoryError:
        halves += [np.empty(nbytes, np.uint8) for _ in range(2 - len(halves))]
    return halves


class _Files:
    """Weights files, opened once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, FileIO] = {}

    def read(self, path: Path, offset: int, into: np.ndarray) -> None:
        if path not in self._open:
            self._open[path] = self._stack.enter_context(path.open("rb", buffering=0))
        file, left = self._open[path], into.data
        file.seek(offset)
        while left:
            count = file.readinto(left)
            if not count:
                raise BundleError(f"{path}: ends before its tensors do; copy the bundle again or rebuild it")
            left = left[count:]
