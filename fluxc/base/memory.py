"""How much memory this process uses, and how much it may."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxrt.checks import shown
from fluxrt.errors import RequestError
from fluxrt.memory import available_memory, resident

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LEAST_BYTES, MOST_BYTES = 1 << 20, 1 << 50
WRITTEN = "write a number and a unit: 12GiB, 12GB or 12288MiB"

_chosen: int | None = None


def memory_now() -> int | None:
    """Bytes of this process in RAM (its resident set, with mapped files); None where the system does not say."""
    return resident() or None


def memory_peak() -> int:
    """The most it used so far, in bytes: on Linux the kernel's own count of this program.

    getrusage's starts at what the process held that started this one.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@contextmanager
def limited_to(most: int) -> Iterator[None]:
    """What is measured and built in the body may take at most `most` bytes of memory, with all that the process holds."""
    global _chosen
    before, _chosen = _chosen, most
    try:
        yield
    finally:
        _chosen = before


def chosen_memory() -> int | None:
    """The most that this process may take, in bytes, as the user said it; None where what is free decides."""
    return _chosen


def memory_limit() -> int:
    """The most that this process may take, in bytes, with what it holds now: what is free, or less where the user said so."""
    here = available_memory() + _own()
    return here if _chosen is None else min(_chosen, here)


def _own() -> int:
    """Bytes that this process holds and no file does, which are free already where a file does."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize()


def read_bytes(text: str) -> int:
    """Bytes of "12GiB" (powers of 1024), "12GB" (of 1000), "1.5 GiB"; RequestError for anything else, a plain number too."""
    found = re.fullmatch(r"([0-9]{1,16}(?:\.[0-9]{1,3})?) ?([A-Za-z]{0,3})", text.strip(), re.ASCII)
    shown_text = shown(text)
    if found is None:
        raise RequestError(f"{shown_text} is no amount of memory; {WRITTEN}")
    number, unit = found[1], found[2].upper()
    if unit == "":
        raise RequestError(f"{shown_text} has no unit; {WRITTEN}")
    if unit not in UNITS:
        raise RequestError(f"{shown_text}: the units are KB, MB, GB, TB and KiB, MiB, GiB, TiB; {WRITTEN}")
    size = int(float(number) * UNITS[unit])
    if not LEAST_BYTES <= size <= MOST_BYTES:
        raise RequestError(f"{shown_text} is not between 1MiB and 1024TiB")
    return size


def bytes_in_words(size: int) -> str:
    """Bytes as people read them: "820 MiB", "1.4 GiB"."""
    return f"{size / 2**20:.0f} MiB" if size < 1000 * 2**20 else f"{size / 2**30:.1f} GiB"
