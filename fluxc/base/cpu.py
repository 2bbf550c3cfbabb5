"""What this CPU computes in hardware."""

from __future__ import annotations

import os
import re
from pathlib import Path

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of /proc/cpuinfo: products of bfloat16 in hardware, on x86 and on Arm."""
WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX2_VNNI_2"}
"""Values of ONEDNN_MAX_CPU_ISA under which oneDNN, which torch multiplies bfloat16 with, has none."""


def multiplies_bf16(system: Path = Path("/")) -> bool:
    """Whether this CPU multiplies bfloat16 in hardware and oneDNN may use that; in software it is many times slower than
    float32. `system` is the root of /proc.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BF16:
        return False
    try:
        listed = (system / "proc/cpuinfo").read_text()
    except OSError:
        return False
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", listed, re.MULTILINE)
    return bool(found and BF16_FLAGS & set(found[1].split()))
