"""Signals of a command."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def a_command(name: str) -> Iterator[Callable[[], None]]:
    """Around a whole command: until what it gives is called, and when it is done, an interrupt shows no traceback.

    Before, Python still reads the program, nothing has been begun, and the process ends at once with 130; after, nothing is
    left to be stopped. Who started the process so that interrupts are ignored, or handles them, keeps that.
    """

    def end(*_: object) -> None:
        os.write(2, f"{name}: interrupted\n".encode())
        os._exit(INTERRUPTED)

    def begun() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield begun
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


INTERRUPTED = 128 + signal.SIGINT


class Terminated(SystemExit):
    """SIGTERM came."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def ended_by_signal(error: BaseException | None) -> int | None:
    """The exit code if an interrupt or SIGTERM is behind `error`, else None: a library that is being loaded makes an error of
    its own out of either."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt | Terminated):
            return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 128 + signal.SIGTERM
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as an interrupt does, so that what is half written is removed and ranks are ended."""

    def end(*_: object) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
