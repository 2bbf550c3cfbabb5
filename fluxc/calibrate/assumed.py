"""Ranges of `calibration.engine: none`: of a layer's kind, as published, or a constant; no model is run."""

from __future__ import annotations

from fluxc.calibrate.amax import margin_of
from fluxc.families.ranges import ANY_INPUT, published_range
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxc.recipe.structs import Calibration


def assumed_amax(plan: list[LayerPlan], width: int, calibration: Calibration) -> dict[str, float]:
    """{layer: amax} for the layers of `plan` whose format has an input scale.

    A layer of the transformer (`width`: of its hidden states) gets what the published table has for its kind, times the
    margin; every other layer gets ANY_INPUT, which has its room built in and no margin.
    """
    found = {}
    for entry in to_quantize(plan):
        if FORMATS[entry.format].calibrated:
            published = published_range(entry.layer.name, width) if entry.component == "transformer" else None
            margin = margin_of(entry.format, calibration)
            found[entry.layer.name] = ANY_INPUT if published is None else published * margin
    return found
