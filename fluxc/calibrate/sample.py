"""Which rows of a Linear's input are kept: spread evenly over prompts, calls and tokens, decided prompt by prompt.

1. The prompts share ROWS rows as evenly as whole numbers allow; with more prompts than rows, some keep none.
2. A prompt's rows divide its calls (steps times guidance branches) evenly, from an offset that moves from prompt to prompt,
   so that no branch and no step is left out for good.
3. The token moves from row to row.
Offsets are multiples of an irrational number modulo 1 (Weyl's low-discrepancy sequence): even for any number of rows, and
the same in every run.
"""

from __future__ import annotations

import math

from fluxc.calibrate.records import ROWS

GOLDEN = (math.sqrt(5) - 1) / 2
SILVER = math.sqrt(2) - 1


def sample_points(prompt: int, prompts: int, calls: int) -> dict[int, list[float]]:
    """{call: positions in 0..1 along its tokens} to keep of prompt number `prompt` of `prompts`, with `calls` calls."""
    first, last = prompt * ROWS // prompts, (prompt + 1) * ROWS // prompts
    points: dict[int, list[float]] = {}
    for row in range(first, last):
        call = int((row - first + prompt * GOLDEN % 1) / (last - first) * calls)
        points.setdefault(call, []).append(row * SILVER % 1)
    return points
