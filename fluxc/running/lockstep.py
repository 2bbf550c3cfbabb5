"""Runs calls of one module side by side: all of them go through a part of it before any goes on to the next.

A call is unmodified code of diffusers or transformers. It runs in a greenlet, which a hook before each part switches away
from; so one thread does the work, call after call, and what a call computes does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

T = TypeVar("T")

CALL: ContextVar[int] = ContextVar("CALL")
"""The number, in its list, of the call that runs; greenlets have contexts of their own."""


class Row(greenlet):
    """A call on its way: the part it waits for, or the row it waits for."""

    part: str | None = None
    awaited: Row | None = None
    result: Any = None

    def __init__(self, hub: Lockstep, order: tuple[int, int], work: Callable[[], Any]) -> None:
        def run() -> None:
            CALL.set(order[0])
            self.result = work()

        super().__init__(run)
        self.hub, self.order = hub, order


class Lockstep:
    """`run` takes calls of a module through its parts together: `load(part)` before the first, `done(part)` after the last, and
    then, or after an exception, `free(part)`."""

    def __init__(
        self, load: Callable[[str], None], free: Callable[[str], None], done: Callable[[str], None] = lambda _: None
    ) -> None:
        self._load, self._free, self._done = load, free, done
        self._rows: list[Row] = []

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results of `calls`, in order. Where one raises, the others end where they are, and its exception is raised."""
        rows = self._rows = [Row(self, (number, 0), call) for number, call in enumerate(calls)]
        started = list(rows)
        try:
            while self._rows:
                self._go_on()
        finally:
            for row in self._rows:
                row.throw(GreenletExit)
            self._rows = []
        return [row.result for row in started]

    def _go_on(self) -> None:
        """Everything that does not wait for a part; if all do, the part that the first one waits for, with all that wait for
        it."""
        ready = [row for row in self._rows if self._is_ready(row)]
        for row in ready:
            self._switch(row)
        if ready:
            return
        # The first row of all may wait for a row that itself waits for a part.
        part = next(row.part for row in self._rows if row.part is not None)
        self._load(part)
        try:
            for row in [row for row in self._rows if row.part == part]:
                row.part = None
                self._switch(row)
            self._done(part)
        finally:
            self._free(part)

    @staticmethod
    def _is_ready(row: Row) -> bool:
        return row.part is None and (row.awaited is None or row.awaited.dead)

    def _switch(self, row: Row) -> None:
        row.parent = getcurrent()
        row.switch()
        if row.dead:
            self._rows.remove(row)

    def beside(self, work: Callable[[], Any]) -> Row:
        """A row of the same call, which runs `work` beside the one that asks for it, right after it at every part."""
        asking = current_row()
        assert asking is not None
        row = Row(self, (asking.order[0], asking.order[1] + 1), work)
        self._rows = sorted([*self._rows, row], key=lambda row: row.order)
        return row


def current_row() -> Row | None:
    """The row that is running; None outside of `Lockstep.run`."""
    running = getcurrent()
    return running if isinstance(running, Row) else None


def wait_for_part(part: str) -> None:
    """Called by a row before it enters `part`: returns when the part is there."""
    row = current_row()
    assert row is not None, f"{part} was called outside of Lockstep.run"
    row.part = part
    _hand_over(row)


def result_of(awaited: Row) -> Any:
    """Called by a row: the result of another, when it has one."""
    row = current_row()
    assert row is not None
    row.awaited = awaited
    if not awaited.dead:
        _hand_over(row)
    row.awaited = None
    return awaited.result


def _hand_over(row: Row) -> None:
    assert row.parent is not None
    row.parent.switch()
