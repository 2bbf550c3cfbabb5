"""The memory that processes hold and may still take, where the system says it (Linux), and which way of holding a model fits.

`staged`: text encoder, transformer and decoder are loaded, used and freed in turn. `resident`: all of them stay.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Memory = Literal["auto", "staged", "resident"]
MODES: tuple[Memory, ...] = ("auto", "staged", "resident")

ENCODE, DENOISE, DECODE = ("text_encoder",), ("prologue", "signal", "body", "epilogue"), ("vae_decoder",)
"""The graphs of each stage of a request."""
STAGES = (ENCODE, DENOISE, DECODE)

ROOM = 0.9
"""The part of the free memory that a model may be predicted to take: what libraries take for themselves is not predicted."""


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


def available_memory(system: Path = Path("/")) -> int | None:
    """Bytes that this process can still take: what the system has available, or less where a limit of its control group
    (cgroup v2), of a group around that, or of its address space (ulimit -v) says so. None where the system does not say."""
    found = [*_of_system(system), *_of_groups(system), *_of_address_space(system)]
    return max(0, min(found)) if found else None


def return_memory() -> None:
    """Give memory that was freed back to the system, which glibc else keeps for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def _of_system(system: Path) -> Iterator[int]:
    found = re.search(r"^MemAvailable: +(\d+) kB$", _read(system / "proc/meminfo"), re.MULTILINE)
    if found:
        yield int(found[1]) * 1024


def _of_groups(system: Path) -> Iterator[int]:
    """What the own group and those around it leave. The page cache of files that nothing uses is no use of memory."""
    own = re.search(r"^0::/(.*)$", _read(system / "proc/self/cgroup"), re.MULTILINE)
    top = system / "sys/fs/cgroup"
    # Inside a container the path may be that of the host, and only the group at the top is visible.
    group = top / (own[1] if own else "")
    for folder in {top, group, *(parent for parent in group.parents if parent.is_relative_to(top))}:
        try:
            limit, used = (int(_read(folder / name)) for name in ("memory.max", "memory.current"))
        except ValueError:
            continue
        cached = re.search(r"^inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
        yield limit - used + (int(cached[1]) if cached else 0)


def _of_address_space(system: Path) -> Iterator[int]:
    limit = re.search(r"^Max address space +(\d+) ", _read(system / "proc/self/limits"), re.MULTILINE)
    used = _read(system / "proc/self/statm").split()
    if limit and used:
        yield int(limit[1]) - int(used[0]) * os.sysconf("SC_PAGE_SIZE")


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
