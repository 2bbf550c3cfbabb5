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
    """What the recipe asks of the step cache, the trace file, the size (height, width) it was traced at, and the trace of the
    checkpoint's own model where it is to be compared with."""

    settings: Settings
    trace: Path
    size: tuple[int, int]
    reference: Path | None = None


def run(inputs: FitInputs, folder: Path, report: Report) -> None:
    """Write the manifest's `step_cache`."""
    from fluxc.stepcache.choose import make_step_cache, with_reference
    from fluxc.stepcache.file import read_trace

    trace = read_trace(inputs.trace).trace
    made = make_step_cache(inputs.settings, trace, inputs.size)
    if inputs.reference is not None:
        made = with_reference(made, inputs.settings, trace, read_trace(inputs.reference).trace)
    check_finite(msgspec.to_builtins(made), "step cache")
    (folder / RESULT).write_bytes(msgspec.json.encode(made, order="deterministic"))


def load(folder: Path) -> StepCache:
    """The manifest's `step_cache`."""
    return msgspec.json.decode((folder / RESULT).read_bytes(), type=StepCache)
