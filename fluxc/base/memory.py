"""How much memory this process uses."""

from __future__ import annotations

import resource
import sys

from fluxrt.memory import resident


def memory_now() -> int | None:
    """Bytes of this process in RAM (its resident set, with mapped files); None where the system does not say."""
    return resident() or None


def memory_peak() -> int:
    """The most it used so far, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def bytes_in_words(size: int) -> str:
    """Bytes as people read them: "820 MiB", "1.4 GiB"."""
    return f"{size / 2**20:.0f} MiB" if size < 1000 * 2**20 else f"{size / 2**30:.1f} GiB"
