"""The embeddings of prompts that were encoded before, by their tokens: the most recent ones, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

TEXT_CACHE = 64 << 20
"""Bytes that are kept unless `load` is told otherwise: the text of four images by klein 4B in fp32."""

Words = tuple["np.ndarray", "np.ndarray"]
"""(input_ids, attention_mask), int64 [branches, length]: all that the text of an image depends on."""


class Texts:
    """Keeps at most `limit` bytes of embeddings, as a backend saved them; 0 keeps none.

    The prompts of an image's guidance branches are encoded, and kept, together: encoded one by one they could differ in the
    last bit.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(saved.nbytes for saved in self._kept.values())

    def find(self, words: Words) -> np.ndarray | None:
        """What was kept of `words`, None if nothing is."""
        key = key_of(words)
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, words: Words, saved: np.ndarray) -> None:
        """Keep the text of `words`, and forget the ones that were not asked for the longest, until all fit."""
        if saved.nbytes > self.limit:
            return
        self._kept[key_of(words)] = saved
        self._kept.move_to_end(key_of(words))
        while self.nbytes > self.limit:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


def key_of(words: Words) -> bytes:
    """The same for the same tokens alone."""
    return b"".join(part.tobytes() for part in words) + str([part.shape for part in words]).encode()
