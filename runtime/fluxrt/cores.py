"""How many CPU cores this process may use: those it may run on, or fewer where its container has a quota."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def allowed_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(system: Path = Path("/")) -> int | None:
    """The cores that the container grants (`docker run --cpus`), rounded up; None without a limit, or before cgroup v2."""
    with contextlib.suppress(OSError, ValueError):
        granted, _, period = (system / "sys/fs/cgroup/cpu.max").read_text().partition(" ")
        return max(1, -(-int(granted) // int(period)))
    return None


def usable_cores(system: Path = Path("/")) -> int:
    """The cores that this process may keep busy."""
    return min(allowed_cores(), quota(system) or allowed_cores())
