"""The weights stage: a component's weights file, quantized under the precision plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fluxc.base.cache import Made
from fluxc.base.numbers import as_json
from fluxc.base.progress import Report
from fluxc.base.safetensors import TensorRef
from fluxc.checkpoint.components import WEIGHTS_FILE
from fluxc.checkpoint.files import ComponentFiles
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.structs import Calibration, Scales

LAYERS = "layers.json"


@dataclass(frozen=True)
class WeightsInputs:
    """`files` hold the component's `tensors`; `apart` names those that get a file of their own.

    `calibration` and its `settings` are there where a layer is quantized under a measured range; ranges that were not measured
    are in `assumed`, by layer. Tensors that are rounded from fp32 to bf16 are in `narrow`. `solved`: the folder of weights that
    were solved, where some were.
    """

    component: str
    files: ComponentFiles | Made
    tensors: dict[str, TensorRef]
    plan: list[LayerPlan]
    calibration: Path | None
    settings: Calibration | None
    scales: Scales
    shard_bytes: int | None
    apart: list[str]
    assumed: dict[str, float] = field(default_factory=dict)
    narrow: list[str] = field(default_factory=list)
    solved: Made | None = None


def run(inputs: WeightsInputs, folder: Path, report: Report) -> None:
    """Write the weights, and layers.json: format and errors of every quantized layer."""
    from fluxc.calibrate.amax import input_amax
    from fluxc.calibrate.file import read_calibration
    from fluxc.quantize.solved import Solved
    from fluxc.quantize.writer import write_weights

    solved = Solved(inputs.solved.folder) if inputs.solved else None
    records, amax = {}, inputs.assumed
    if inputs.calibration and inputs.settings:
        records = read_calibration(inputs.calibration).records[inputs.component]
        amax = input_amax(records, inputs.plan, inputs.settings, solved.smoothing if solved else None)
    written = write_weights(
        folder / WEIGHTS_FILE[inputs.component],
        inputs.tensors,
        inputs.plan,
        amax,
        scales=inputs.scales,
        input_rows=lambda layer: records[layer].rows if layer in records else None,
        solved=solved.layers if solved else None,
        shard_bytes=inputs.shard_bytes,
        apart=inputs.apart,
        narrow=frozenset(inputs.narrow),
        on_progress=report,
    )
    layers = [
        {
            "name": r.name,
            "format": r.format,
            "scales": inputs.scales if FORMATS[r.format].searches_scales else "max",
            "snr_db": _finite(r.snr_db, 3),
            "output_snr_db": _finite(r.output_snr_db, 2),
            "rounding": msgspec.to_builtins(solved.roundings.get(r.name))
            if solved and FORMATS[r.format].solves
            else None,
        }
        for r in written
    ]
    # No original to compare with, so their errors are not known.
    layers += [
        {
            "name": e.layer.name,
            "format": e.format,
            "scales": None,
            "snr_db": None,
            "output_snr_db": None,
            "rounding": None,
        }
        for e in inputs.plan
        if e.quantized_in_source
    ]
    (folder / LAYERS).write_text(as_json(layers, f"{inputs.component} weights"))


def _finite(decibels: float | None, digits: int) -> float | None:
    """None too for what was quantized without any error, whose ratio has no bound."""
    return None if decibels is None or decibels == math.inf else round(decibels, digits)


def load(folder: Path) -> Path:
    """The folder with the weights."""
    return folder
