"""Signals of a command."""

from __future__ import annotations

import os
import signal
import sys
import threading
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
AGAIN = 0.5
"""Seconds after which a signal that was lost is raised again."""


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
def ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the command as an interrupt does, so that what is half written is removed and ranks are ended.

    Either is raised again for as long as a library has lost it: an import that fails because of it may pass for a package that
    is not installed. Who ignores interrupts, or handles them, keeps that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = [End(signal.SIGTERM, Terminated)]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        ends.append(End(signal.SIGINT, KeyboardInterrupt))
    before = [(end, signal.signal(end.number, end.came)) for end in ends]
    try:
        yield
    finally:
        for end, handler in before:
            end.over()
            signal.signal(end.number, handler)


class End:
    """A signal that ends the command by raising `raised`: when it comes, and each `AGAIN` seconds in which it is lost."""

    def __init__(self, number: signal.Signals, raised: type[BaseException]) -> None:
        self.number = number
        self._raised, self._asks = raised, False
        self._over, self._lock = threading.Event(), threading.Lock()
        self._asking: threading.Thread | None = None

    def came(self, *_: object) -> None:
        """The handler of the signal."""
        asks, self._asks = self._asks, False
        if asks and (self._over.is_set() or ended_by_signal(sys.exc_info()[1]) is not None):
            return
        if self._asking is None:
            self._asking = threading.Thread(target=self._ask, name=f"{self.number.name} again", daemon=True)
            self._asking.start()
        raise self._raised

    def over(self) -> None:
        """The command has ended."""
        with self._lock:
            self._over.set()

    def _ask(self) -> None:
        main = threading.main_thread().ident
        while not self._over.wait(AGAIN):
            with self._lock:
                if main is not None and not self._over.is_set():
                    self._asks = True
                    signal.pthread_kill(main, self.number)
