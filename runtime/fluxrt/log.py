"""What a command says of its work: lines on stderr, and every line with its time in a file where --log-file names one.

Lines come through Python's logging, from the loggers `fluxrt` and `fluxc`, so that who uses these packages as libraries can
send them elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fluxrt.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

KEPT = 10_000
"""Lines kept for the log of an unexpected end."""


class Logs(logging.Handler):
    """The lines of one command of `tool`, while it is used in a `with` statement.

    `threshold` is the least level that stderr shows: WARNING with -q, DEBUG with -v. `write` puts a line on stderr; who draws
    a progress bar there replaces it meanwhile. `as_json` writes lines as JSON, on stderr and in the file.
    """

    def __init__(self, tool: str) -> None:
        super().__init__(logging.DEBUG)
        self.tool = tool
        self.threshold = logging.INFO
        self.as_json = False
        self.write: Callable[[str], None] = write_to_stderr
        self.path: Path | None = None
        self._file: TextIO | None = None
        self._kept: deque[logging.LogRecord] = deque(maxlen=KEPT)
        self._before: list[tuple[logging.Logger, int]] = []

    def __enter__(self) -> Self:
        for name in ("fluxrt", "fluxc"):
            logger = logging.getLogger(name)
            self._before.append((logger, logger.level))
            logger.setLevel(logging.DEBUG)
            logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        for logger, level in self._before:
            logger.removeHandler(self)
            logger.setLevel(level)
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()

    def open(self, path: Path) -> None:
        """Write every line to the file at `path` too, after what is there; OutputError where it cannot be written."""
        try:
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise OutputError(f"--log-file {path}: it cannot be written: {reason}; give another name") from None
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Show and keep a line."""
        self._kept.append(record)
        if record.levelno >= self.threshold:
            self.write(self._as_json(record) if self.as_json else f"{self.tool}: {printable(record.getMessage())}")
        if self._file:
            with contextlib.suppress(OSError):
                self._file.write(self._line(record) + "\n")
                self._file.flush()

    def error(self, text: str) -> None:
        """Say what ended the command."""
        self.handle(logging.makeLogRecord({"name": self.tool, "msg": text, "levelno": 40, "levelname": "ERROR"}))

    def write_report(self, trace: str) -> Path | OSError:
        """Write versions, the command, every line and the traceback of an unexpected end; where, or why that failed.

        It goes to the --log-file, else to a new temporary file.
        """
        head = [
            f"{self.tool} {_version(self.tool)}, Python {platform.python_version()}, {platform.platform()}",
            f"command: {' '.join(ascii(argument) for argument in sys.argv)}",
        ]
        try:
            if self._file and self.path:
                self._file.write("\n".join([*head, trace, ""]))
                self._file.flush()
                return self.path
            number, name = tempfile.mkstemp(prefix=f"{self.tool}-", suffix=".log")
            with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write("\n".join([*head, *(self._line(record) for record in self._kept), trace, ""]))
            return Path(name)
        except OSError as error:
            return error

    def _line(self, record: logging.LogRecord) -> str:
        if self.as_json:
            return self._as_json(record)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{when}.{int(record.msecs):03} {record.levelname.lower():7} {printable(record.getMessage())}"

    def _as_json(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        plain = {
            "time": f"{when}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "tool": self.tool,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return json.dumps(plain, default=str)


def printable(text: str) -> str:
    """`text` with its control characters escaped, but the ends of its lines, so that no path or prompt moves the cursor."""
    return "".join(c if c == "\n" or c.isprintable() or c == " " else ascii(c)[1:-1] for c in text)


def write_to_stderr(text: str) -> None:
    """Print a line on stderr."""
    write(text, sys.stderr)


def write(text: str, stream: TextIO | None, end: str = "\n") -> None:
    """Print a line; who closed the stream, or filled its disk, loses the line and nothing else."""
    if stream is None:
        return
    try:
        try:
            print(text, end=end, file=stream, flush=True)
        except UnicodeEncodeError:
            # A file's name in another encoding than the stream's: its own bytes.
            stream.buffer.write(f"{text}{end}".encode(errors="surrogateescape"))
            stream.flush()
    except (OSError, ValueError):
        silence(stream)


def silence(stream: TextIO | None) -> None:
    """Send a broken stream to /dev/null: what is left in its buffer would fail again when Python ends."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _version(tool: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(tool)
    except PackageNotFoundError:
        return "(not installed)"
