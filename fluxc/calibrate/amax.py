"""Which largest input magnitude an `input_scale` stands for: the largest seen, a percentile, or the one of least error, each
times a margin for inputs that calibration never saw."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fluxc.calibrate.records import LayerInputs, bin_edges, merge
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, fusion_groups, to_quantize
from fluxc.recipe.structs import Calibration

CANDIDATES = 17
UNSEEN_MARGIN = 8.0
"""On a published range, which is of another model, other inputs, or both."""


def input_amax(
    records: Mapping[str, LayerInputs],
    plan: list[LayerPlan],
    calibration: Calibration,
    smoothing: Mapping[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """{layer: amax} for the quantized layers of `plan`; members of a fusion group share one.

    `smoothing` holds by layer the fp32 [in] that its inputs are multiplied by where it is smoothed: the range is then that of
    the products, which the largest input of every channel tells.

    `max`: the largest magnitude seen. `percentile`: the smallest bin edge that `calibration.percentile` percent of the
    magnitudes do not exceed. `mse`: see least_error. Each is multiplied by margin_of the format. Layers that calibration never
    saw are left out.
    """
    found: dict[str, float] = {}
    seen = (e for e in to_quantize(plan) if e.layer.name in records and FORMATS[e.format].calibrated)
    for members in fusion_groups(seen):
        inputs, first = [records[entry.layer.name] for entry in members], members[0]
        factor = (smoothing or {}).get(first.layer.name) if first.is_smoothed else None
        if factor is not None:
            amax = max(float((record.channel_amax * factor).max()) for record in inputs)
        elif calibration.amax == "max":
            amax = max(record.amax for record in inputs)
        elif calibration.amax == "percentile":
            amax = max(percentile(record, calibration.percentile) for record in inputs)
        else:
            amax = least_error(inputs, first.format)
        amax *= margin_of(first.format, calibration)
        found |= {entry.layer.name: amax for entry in members}
    return found


def margin_of(format: str, calibration: Calibration) -> float:
    """How many times the range that was found an `input_scale` of `format` stands for.

    Where the recipe leaves it out: 1 where it asked for another range than the largest input; otherwise the format's own, and
    8 for any format where the range was not found on this model.
    """
    if calibration.margin is not None:
        return calibration.margin
    if calibration.engine == "none":
        return UNSEEN_MARGIN
    return FORMATS[format].margin if calibration.amax == "max" else 1.0


def percentile(record: LayerInputs, percent: float) -> float:
    """The smallest bin edge that at least `percent` percent of the magnitudes lie below; at most the largest seen."""
    counts = np.cumsum(record.histogram)
    bin_ = int(np.searchsorted(counts, counts[-1] * percent / 100))
    return float(min(bin_edges()[bin_ + 1], record.amax))


def least_error(inputs: list[LayerInputs], format: str) -> float:
    """The candidate amax * 2^(-k/4), k = 0..16, under which rounding the inputs of a fusion group costs least.

    The cost is an estimate of the squared error over all inputs; none is counted twice. What lies above the candidate becomes
    the candidate itself, so its error follows from the histogram, a bin standing for its middle. (For NVFP4 too: a block that
    reaches above amax gets the largest block scale, 448, under which E2M1 ends at 6 * 448 * amax / 2688.) What lies within
    is rounded, which depends on its neighbours in the block: measured on the sampled rows, times how many there were.
    """
    import torch

    record = merge(inputs)
    rows = torch.from_numpy(record.rows)
    filled = record.histogram > 0
    counts, edges = record.histogram[filled], bin_edges()
    middles = (edges[:-1][filled] + edges[1:][filled]) / 2
    how = FORMATS[format]
    best, least = record.amax, np.inf
    for step in range(CANDIDATES):
        amax = record.amax * 2.0 ** (-step / 4)
        within = rows.abs() <= amax
        error = (how.fake_quantize(rows, how.tensor_scale(torch.tensor(amax))) - rows)[within].double()
        above = middles > amax
        rounding = error.square().mean().item() * int(counts[~above].sum()) if error.numel() else 0.0
        cost = rounding + float((counts[above] * (middles[above] - amax) ** 2).sum())
        if cost < least:
            best, least = amax, cost
    return float(best)
