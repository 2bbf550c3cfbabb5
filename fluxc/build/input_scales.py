"""What the input scales of a build stand for, before it runs: measured how and times what, or the ranges assumed instead."""

from __future__ import annotations

from dataclasses import dataclass

from fluxc.build.job import Job
from fluxc.build.requests import calibration_request
from fluxc.calibrate.amax import margin_of
from fluxc.calibrate.assumed import assumed_amax
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import to_quantize


@dataclass(frozen=True)
class InputScales:
    """`prompts`, `steps` and `size` of the measurement, None where no model is run; `margins` by format.

    `ranges`: by component, then layer, the largest input that is assumed where no model is run, its margin included.
    """

    engine: str
    file: str | None
    amax: str
    prompts: int | None
    steps: int | None
    size: tuple[int, int] | None
    margins: dict[str, float]
    ranges: dict[str, dict[str, float]]


def input_scales(job: Job) -> InputScales | None:
    """Of the layers that a build of `job` quantizes; None where none of them has an input scale."""
    asked, source = job.loaded.recipe.calibration, job.original
    formats = {entry.format for plan in source.plans.values() for entry in to_quantize(plan)}
    margins = {format: margin_of(format, asked) for format in sorted(formats) if FORMATS[format].calibrated}
    if not margins:
        return None
    if asked.engine == "none":
        width = source.transformer.width
        ranges = {name: assumed_amax(plan, width, asked) for name, plan in source.plans.items()}
        ranges = {name: found for name, found in ranges.items() if found}
        return InputScales(asked.engine, None, asked.amax, None, None, None, margins, ranges)
    request = calibration_request(job.loaded, job.is_large)
    height, width = request["size"]
    prompts, steps = len(request["prompts"]), request["steps"]
    return InputScales(asked.engine, asked.file, asked.amax, prompts, steps, (height, width), margins, {})
