"""Messages between a command and its ranks: msgpack over a socket, each after its length."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import socket

LENGTH = struct.Struct("<Q")


class Channel:
    """One end of a connected socket; any thread may send, one receives."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send `message`; OSError if nobody is left to read it."""
        data = msgspec.msgpack.encode(message)
        with self._sending:
            self._end.sendall(LENGTH.pack(len(data)) + data)

    def receive(self) -> dict[str, Any] | None:
        """The next message, waiting for it; None when the other end is closed or gone."""
        head = self._exactly(LENGTH.size)
        data = self._exactly(LENGTH.unpack(head)[0]) if head else None
        return None if data is None else msgspec.msgpack.decode(data)

    def close(self) -> None:
        self._end.close()

    def _exactly(self, size: int) -> bytes | None:
        parts, left = [], size
        while left:
            try:
                part = self._end.recv(min(left, 1 << 20))
            except ConnectionError:
                return None
            if not part:
                return None
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
