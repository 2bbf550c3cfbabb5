"""The memory that processes hold, what is free for this one, where the system says it (Linux), and which way of holding a model
fits.

`staged`: text encoder, transformer and decoder are loaded, used and freed in turn. `resident`: all of them stay.
"""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ENOUGH = 1 << 60
"""A limit of so many bytes is none: cgroup v1 writes the largest number it has."""

Memory = Literal["auto", "staged", "resident"]
MODES: tuple[Memory, ...] = ("auto", "staged", "resident")

ENCODE, DENOISE, DECODE = ("text_encoder",), ("prologue", "signal", "body", "epilogue"), ("vae_decoder", "vae_blend")
"""The graphs of each stage of a request."""
STAGES = (ENCODE, DENOISE, DECODE)

ROOM = 0.9
"""The part of the free memory that a model may be predicted to take: what libraries take for themselves is not predicted."""


_IS_REPEATABLE = ContextVar("is_repeatable", default=False)


@contextmanager
def repeatable() -> Iterator[None]:
    """Within it nothing that is computed depends on how much memory is free: a build's figures are the same on any machine."""
    token = _IS_REPEATABLE.set(True)
    try:
        yield
    finally:
        _IS_REPEATABLE.reset(token)


def is_repeatable() -> bool:
    """Whether `repeatable` is in force here."""
    return _IS_REPEATABLE.get()


@dataclass(frozen=True)
class Need:
    """Bytes that a model is predicted to take with everything loaded, and those that it may take; None where nothing says it.

    `where` names the memory, as in "of the GPU's memory".
    """

    resident: int
    free: int | None
    where: str


def choose(need: Need | None) -> tuple[bool, str]:
    """Whether components must take turns for `need` to be met, and why, as half a sentence."""
    if need is None:
        return False, "this backend does not say what it needs"
    if need.free is None:
        return False, f"how much {need.where} is free is not known here"
    takes = f"everything at once takes {_gib(need.resident)} of {need.where}, and {_gib(need.free)} are free"
    return need.resident > ROOM * need.free, takes


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def resident(processes: Iterable[int] = ()) -> int:
    """Bytes that this process and `processes` hold in memory; what several may share, mapped weights above all, counts once."""
    alone, shared = 0, 0
    for process in ("self", *processes):
        try:
            fields = Path(f"/proc/{process}/statm").read_text().split()
        except OSError:
            continue
        alone += int(fields[1]) - int(fields[2])
        shared = max(shared, int(fields[2]))
    return (alone + shared) * os.sysconf("SC_PAGE_SIZE")


def available_memory(system: Path = Path("/")) -> int:
    """Bytes that this process can still take without being killed: the least of what these leave.

    1. The machine: MemAvailable; where the system has no /proc/meminfo, all its memory.
    2. The control group of the process and every group around it, cgroup v2 and v1. What a group holds of files counts as
       free, since the kernel takes it back first.
    3. Limits of the process: RLIMIT_AS and RLIMIT_DATA.

    `system` is the root of /proc and /sys.
    """
    free = [_free_here(system), *_free_in_groups(system), *_free_in_limits(system)]
    return max(0, min(free))


def _free_here(system: Path) -> int:
    found = re.search(r"^MemAvailable: +(\d+) kB$", _read(system / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_in_groups(system: Path) -> Iterator[int]:
    """What each control group with a limit leaves; /proc/self/cgroup has a line "number:controllers:path" for a hierarchy."""
    mounts = system / "sys/fs/cgroup"
    limits: tuple[str, ...]
    for line in _read(system / "proc/self/cgroup").splitlines() or ["0::/"]:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            mount, limits, used, files = (
                mounts,
                ("memory.max", "memory.high"),
                "memory.current",
                ("active_file", "inactive_file"),
            )
        elif "memory" in controllers.split(","):
            mount, limits, used = mounts / "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes"
            files = ("total_active_file", "total_inactive_file")
        else:
            continue
        # A container may see its own group as the root while the path is the host's.
        for part in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = mount / str(part).lstrip("/")
            limit = min((found for name in limits if (found := _number(folder / name)) is not None), default=ENOUGH)
            holds = _number(folder / used)
            if limit < ENOUGH and holds is not None:
                yield limit - holds + sum(_fields(folder / "memory.stat").get(name, 0) for name in files)


def _free_in_limits(system: Path) -> Iterator[int]:
    sizes = _read(system / "proc/self/statm").split()
    if len(sizes) < 6:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    for name, holds in (("Max address space", int(sizes[0])), ("Max data size", int(sizes[5]))):
        found = re.search(rf"^{name} +(\d+) ", _read(system / "proc/self/limits"), re.MULTILINE)
        if found:
            yield int(found[1]) - holds * page


def _fields(file: Path) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", _read(file), re.MULTILINE)}


def _number(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if text.isdecimal() else None


def return_memory() -> None:
    """Give memory that was freed back to the system, which glibc else keeps for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
