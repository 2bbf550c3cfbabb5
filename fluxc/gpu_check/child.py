"""Runs a function in a process of its own, for so many seconds: what crashes or hangs there ends nothing else."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from fluxrt.errors import FluxError

How = Literal["returned", "failed", "crashed", "timed out"]
LOG_CHARACTERS = 4000
TO_END = 10.0
"""Seconds a process has to end by itself after it gave its result."""


@dataclass(frozen=True)
class Found:
    """What a check measured, every fault it saw, and, where it does not apply to this machine, why."""

    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    skipped: str = ""


@dataclass(frozen=True)
class Ended:
    """How a process ended: with a value, with an error in words, killed by something, or because its time was up."""

    how: How
    seconds: float
    value: Any = None
    why: str = ""
    log: str = ""


def run_limited(work: Callable[..., Any], arguments: tuple[Any, ...], limit: float, own_group: bool = True) -> Ended:
    """What `work(*arguments)`, which can be pickled, comes to in a new process within `limit` seconds.

    `how` is returned, failed (it raised), crashed (the process died) or timed out. With `own_group` the processes it starts end
    with it; a process that is itself such a child starts others without.
    """
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="fluxc-check-") as scratch:
        log = Path(scratch) / "log"
        process = context.Process(target=_child, args=(send, str(log), work, arguments, own_group))
        process.start()
        send.close()
        try:
            how, value, why = _wait(receive, began + limit)
            if how == "returned":
                process.join(TO_END)
        finally:
            _end(process, own_group)
        receive.close()
        if how == "crashed":
            why = _how_it_ended(process.exitcode)
        if how == "timed out":
            why = f"not done after {limit:g} s, and ended"
        said = log.read_text(errors="replace")[-LOG_CHARACTERS:].strip() if log.is_file() else ""
    return Ended(how, time.monotonic() - began, value, why, said)


def _wait(receive: Connection, until: float) -> tuple[How, Any, str]:
    if not receive.poll(max(0.0, until - time.monotonic())):
        return "timed out", None, ""
    try:
        message: tuple[How, Any, str] = receive.recv()
    except EOFError:
        return "crashed", None, ""
    return message


def _end(process: Any, own_group: bool) -> None:
    """End the process and, with a group of its own, all that it started."""
    if own_group:
        # Before it has made its group it has started nothing either.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code} and no result"


def _end_with(parent: int, own_group: bool) -> None:
    """A process whose parent is gone ends with all that it started, whatever it is doing: it would hold the GPU."""
    while os.getppid() == parent:
        time.sleep(0.5)
    if own_group:
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _child(send: Connection, log: str, work: Callable[..., Any], arguments: tuple[Any, ...], own_group: bool) -> None:
    if own_group:
        os.setsid()
    threading.Thread(target=_end_with, args=(os.getppid(), own_group), daemon=True).start()
    # What libraries print, also from C++ and while they abort.
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    try:
        message = ("returned", work(*arguments), "")
    except FluxError as error:
        message = ("failed", None, str(error))
    except Exception as error:
        traceback.print_exc()
        message = ("failed", None, f"{type(error).__name__}: {error}")
    send.send(message)
    send.close()
