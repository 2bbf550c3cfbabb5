"""The step-cache stage: the polynomials, threshold and schedule that a trace comes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from fluxc.base.numbers import check_finite
from fluxc.base.progress import Report
from fluxc.recipe.structs import StepCache as Settings
from fluxrt.manifest import StepCache

RESULT = "step_cache.json"


@dataclass(frozen=True)
class FitInputs:
    """What the recipe asks of the step cache, the trace file, and the size (height, width) it was traced at."""

    settings: Settings
    trace: Path
    size: tuple[int, int]


def run(inputs: FitInputs, folder: Path, report: Report) -> None:
    """Write the manifest's `step_cache`."""
    from fluxc.stepcache.choose import make_step_cache
    from fluxc.stepcache.file import read_trace

    made = make_step_cache(inputs.settings, read_trace(inputs.trace).trace, inputs.size)
    check_finite(msgspec.to_builtins(made), "step cache")
    (folder / RESULT).write_bytes(msgspec.json.encode(made, order="deterministic"))


def load(folder: Path) -> StepCache:
    """The manifest's `step_cache`."""
    return msgspec.json.decode((folder / RESULT).read_bytes(), type=StepCache)
