"""The memory that processes hold, where the system says it (Linux)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


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
