"""The gates of a build as a report shows them: each with the worst value, its limit and the margin.

They pass where fluxc.fidelity.gates raises nothing, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fluxc.base.numbers import significant
from fluxc.fidelity.gates import STAGES, Bound
from fluxc.recipe.structs import Gates
from fluxc.report.structs import Gate, Verdict

MEANINGS = {
    "layer_snr_db": "signal-to-noise ratio of a quantized weight; of a solved one, of its output",
    "step_cosine": "cosine between the target's velocity and the reference's, worst step of the worst prompt",
    "image_psnr_db": "PSNR of the target's images against the reference's, mean over the prompts",
    "compute_error": "relative error of velocities against the same target computing exactly, over steps and prompts",
    "step_cache_psnr_db": "PSNR of images with the step cache against those with every step computed, mean over the prompts",
}


def verdict(
    gates: Gates,
    layer_snr_db: Mapping[str, float],
    targets: Mapping[str, Mapping[str, Any]],
    bounds: Mapping[str, Mapping[str, Bound]],
    cached: Mapping[str, Any] | None,
    failure: str = "",
) -> Verdict:
    """Every gate that applies, failed ones first; the arguments are those of check_gates and check_stages."""
    found = [*_of_layers(gates, layer_snr_db), *_of_targets(gates, targets), *_of_computing(gates, targets)]
    found += _of_step_cache(gates, cached)
    found += [_rounding(name, figures, bounds[name]) for name, figures in targets.items()]
    return Verdict(
        passed=all(gate.passed for gate in found) and not failure,
        gates=tuple(sorted(found, key=lambda gate: gate.passed)),
        failure=failure,
    )


def _of_layers(gates: Gates, layer_snr_db: Mapping[str, float]) -> Iterator[Gate]:
    limit = gates.layer_snr_db
    if limit is None or not layer_snr_db:
        return
    missed = [name for name, snr in layer_snr_db.items() if not snr >= limit]
    worst = min(layer_snr_db, key=lambda name: _worst_first(layer_snr_db[name]))
    yield _gate("layer_snr_db", f"layer {worst}", layer_snr_db[worst], limit, "dB", (len(layer_snr_db), len(missed)))


def _of_targets(gates: Gates, targets: Mapping[str, Mapping[str, Any]]) -> Iterator[Gate]:
    for field, unit in (("step_cosine", ""), ("image_psnr_db", "dB")):
        limit = getattr(gates, field)
        for name, figures in targets.items() if limit is not None else ():
            missed = 0 if figures[field] >= limit else 1
            yield _gate(field, f"target {name}", figures[field], limit, unit, (1, missed))


def _of_computing(gates: Gates, targets: Mapping[str, Mapping[str, Any]]) -> Iterator[Gate]:
    limit = gates.compute_error
    for name, figures in targets.items() if limit is not None else ():
        apart = figures.get("against_exact")
        if limit is None or not apart:
            continue
        value = apart["velocity_error"]
        finite, passed = math.isfinite(value), value <= limit
        yield Gate(
            name="compute_error",
            about=f"target {name}",
            meaning=MEANINGS["compute_error"],
            value=value if finite else None,
            limit=limit,
            unit="",
            at_least=False,
            margin=significant(limit - value) if finite else None,
            passed=passed,
            checked=1,
            missed=0 if passed else 1,
        )


def _of_step_cache(gates: Gates, cached: Mapping[str, Any] | None) -> Iterator[Gate]:
    limit = gates.step_cache_psnr_db
    if limit is not None:
        value = cached["psnr_db"] if cached else math.nan
        missed = 0 if value >= limit else 1
        yield _gate("step_cache_psnr_db", "step cache", value, limit, "dB", (1, missed))


def _rounding(target: str, figures: Mapping[str, Any], bounds: Mapping[str, Bound]) -> Gate:
    """The stage of `target` that comes nearest to the largest error which rounding explains, or is beyond it."""
    missed = [figure for figure in STAGES if not figures[figure] <= bounds[figure].error]
    worst = max(STAGES, key=lambda figure: -_worst_first(-figures[figure] / bounds[figure].error))
    value, limit = figures[worst], bounds[worst].error
    finite = math.isfinite(value)
    return Gate(
        name="rounding",
        about=f"target {target}, {STAGES[worst]}",
        meaning=f"relative error on the reference's own input; rounding to {bounds[worst].of} explains the limit",
        value=value if finite else None,
        limit=limit,
        unit="",
        at_least=False,
        margin=significant(limit - value) if finite else None,
        passed=not missed,
        checked=len(STAGES),
        missed=len(missed),
    )


def _gate(name: str, about: str, value: float, limit: float, unit: str, counts: tuple[int, int]) -> Gate:
    """A gate that a value at or above `limit` passes; `counts` are how many values were checked, and missed it."""
    finite = math.isfinite(value)
    return Gate(
        name=name,
        about=about,
        meaning=MEANINGS[name],
        value=value if finite else None,
        limit=limit,
        unit=unit,
        at_least=True,
        margin=significant(value - limit) if finite else None,
        passed=counts[1] == 0,
        checked=counts[0],
        missed=counts[1],
    )


def _worst_first(value: float) -> float:
    """A key by which the smallest value comes first, and a NaN before it."""
    return -math.inf if math.isnan(value) else value
