"""The processes of a sharded target as a group: collectives over memory that all of them map.

1. Each rank writes into a region of its own and reads those of others; nobody copies through a pipe.
2. Every two ranks have a socket between them. A rank that has written says so to every other with 16 bytes, and waits to hear
   the same. So nothing spins, and a rank that is gone is known at once: its end of the socket is closed.
3. A region has two halves, used in turn: who writes the next one has heard everyone write this one, and so, since they read
   before they write, read the last one.
"""

from __future__ import annotations

import math
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fluxrt.errors import BackendError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np

TURN = struct.Struct("<QQ")
SENTENCE = 1024
"""Bytes of what a rank says to the others in words."""


class PeerError(BackendError):
    """Another rank is gone, or does not come to where this one waits for it."""


class Group:
    """Rank `rank` of the group. `peers` are the sockets to the others, `memory` holds ranks * 2 halves of `half` bytes.

    Every rank must call the same methods in the same order. A rank that others have waited for longer than `timeout` seconds
    is a PeerError. `announce(what, seconds)` tells whoever watches this rank that it gives no sign of life for so long at most,
    and with 0 seconds that this is over.
    """

    def __init__(
        self,
        rank: int,
        peers: Mapping[int, socket.socket],
        memory: mmap.mmap,
        half: int,
        timeout: float,
        announce: Callable[[str, float], None] | None = None,
    ) -> None:
        self.rank, self.ranks = rank, len(peers) + 1
        self._announce = announce
        self._peers, self._memory, self._half, self._timeout = dict(peers), memory, half, timeout
        self._turn = 0
        for peer in self._peers.values():
            peer.settimeout(timeout)

    def all_to_all(self, array: np.ndarray) -> np.ndarray:
        """`array` [ranks, ...] of this rank to [ranks, ...], of which part i is what rank i had for this one."""
        import numpy as np

        self._barrier(array)
        part = array.nbytes // self.ranks
        got = np.empty_like(array)
        for rank in range(self.ranks):
            got[rank] = self._read(rank, self.rank * part, array.shape[1:], array.dtype)
        return got

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        """Every rank's `array`, all of one shape, in order of rank."""
        self._barrier(array)
        return [self._read(rank, 0, array.shape, array.dtype).copy() for rank in range(self.ranks)]

    def scatter(self, parts: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        """Rank 0's `parts` fp32 [ranks, *shape]: the one for this rank. The other ranks give None."""
        import numpy as np

        self._barrier(np.empty(0, np.float32) if parts is None else parts)
        part = 4 * math.prod(shape)
        return self._read(0, self.rank * part, shape, np.dtype(np.float32)).copy()

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over ranks in float64, the same to the bit on all of them."""
        import numpy as np

        total: np.ndarray = np.sum(np.stack(self.gather(values.astype(np.float64))), axis=0)
        return total

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's `data`, at most 4 KiB; the other ranks give None."""
        import numpy as np

        size = 4096
        filled = np.frombuffer((data or b"").ljust(size, b"\0"), np.uint8)
        return self.gather(filled)[0].tobytes()

    def agree(self, why: str) -> str:
        """The first of the ranks' sentences, with its rank, the same on all; empty when every rank gives an empty one."""
        import numpy as np

        filled = np.frombuffer(why.encode()[:SENTENCE].ljust(SENTENCE, b"\0"), np.uint8)
        for rank, heard in enumerate(self.gather(filled)):
            text = heard.tobytes().rstrip(b"\0").decode(errors="ignore")
            if text:
                return f"rank {rank}: {text}"
        return ""

    @contextmanager
    def together(self, what: str, seconds: float) -> Iterator[None]:
        """Around a call that returns when all ranks have made it, and lets no other thread of this process run meanwhile."""
        import numpy as np

        self._barrier(np.empty(0, np.uint8))
        if self._announce:
            self._announce(what, seconds)
        try:
            yield
        finally:
            if self._announce:
                self._announce(what, 0.0)

    def _barrier(self, array: np.ndarray) -> None:
        """Write `array` where the other ranks find it, and wait until they have written theirs."""
        import numpy as np

        if array.nbytes > self._half:
            raise BackendError(
                f"{array.nbytes} bytes to exchange, {self._half} were set aside; this is a fault of fluxrt"
            )
        if array.nbytes:
            view = np.frombuffer(self._memory, array.dtype, array.size, self._offset(self.rank, self._turn))
            view.reshape(array.shape)[...] = array
        said = TURN.pack(self._turn, array.nbytes)
        for rank, peer in self._peers.items():
            try:
                peer.sendall(said)
            except OSError:
                raise self._gone(rank) from None
        for rank, peer in self._peers.items():
            turn, _ = TURN.unpack(self._hear(rank, peer))
            if turn != self._turn:
                raise PeerError(f"rank {rank} is at exchange {turn}, rank {self.rank} at {self._turn}")
        self._turn += 1

    def _hear(self, rank: int, peer: socket.socket) -> bytes:
        heard = b""
        while len(heard) < TURN.size:
            try:
                more = peer.recv(TURN.size - len(heard))
            except TimeoutError:
                raise PeerError(
                    f"rank {rank} did not come to exchange {self._turn} within {self._timeout:g} s"
                ) from None
            except OSError:
                raise self._gone(rank) from None
            if not more:
                raise self._gone(rank)
            heard += more
        return heard

    def _gone(self, rank: int) -> PeerError:
        return PeerError(f"rank {rank} is gone, at exchange {self._turn}")

    def _offset(self, rank: int, turn: int) -> int:
        return (2 * rank + turn % 2) * self._half

    def _read(self, rank: int, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A part of what `rank` wrote last, in place."""
        import numpy as np

        # _barrier has gone on to the next turn.
        offset = self._offset(rank, self._turn - 1) + start
        return np.frombuffer(self._memory, dtype, math.prod(shape), offset).reshape(shape)
