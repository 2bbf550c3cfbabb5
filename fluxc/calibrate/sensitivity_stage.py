"""The sensitivity stage: what `exclude: auto` measured and chose, see sensitivity.measure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxc.base.numbers import as_json
from fluxc.base.progress import Report
from fluxc.checkpoint.files import CheckpointFiles
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.structs import Budget, Calibration, Scales

RESULT = "sensitivity.json"


@dataclass(frozen=True)
class SensitivityInputs:
    """The model and the prompts it is measured on, the plan without the choice, and how quantized layers compute."""

    files: CheckpointFiles
    request: dict[str, Any]
    rows: int
    text_layers: tuple[int, ...]
    dtype: str
    plan: list[LayerPlan]
    calibration: Path
    settings: Calibration
    scales: Scales
    round_inputs: bool
    budget: Budget


def run(inputs: SensitivityInputs, folder: Path, report: Report) -> None:
    """Write what was measured as JSON."""
    import torch

    from fluxc.calibrate.amax import input_amax
    from fluxc.calibrate.file import read_calibration
    from fluxc.calibrate.sensitivity import Simulation, measure
    from fluxc.calibrate.stage import generation_of

    checkpoint = inputs.files.checkpoint
    records = read_calibration(inputs.calibration).records["transformer"]
    amax = input_amax(records, inputs.plan, inputs.settings)
    tensors = checkpoint.components["transformer"].tensors
    measured = measure(
        checkpoint,
        inputs.request["prompts"],
        generation_of(inputs.request, inputs.text_layers),
        inputs.rows,
        getattr(torch, inputs.dtype),
        inputs.plan,
        Simulation(tensors, amax, inputs.scales, inputs.round_inputs),
        inputs.budget,
        report,
    )
    (folder / RESULT).write_text(as_json(measured, "sensitivity", indent=1) + "\n")


def load(folder: Path) -> dict[str, Any]:
    """What was measured."""
    measured: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return measured
