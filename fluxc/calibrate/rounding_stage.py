"""The rounding stage: weights solved against the calls that calibration kept, for the weights stage to write."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fluxc.base.cache import Made, key_of, library_versions
from fluxc.base.errors import BuildError
from fluxc.base.imports import code_digest
from fluxc.base.progress import Report
from fluxc.calibrate.stage import asked_of
from fluxc.checkpoint.files import Aside, CheckpointFiles
from fluxc.checkpoint.needs import Asked
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.structs import Calibration, RoundingMethod, Scales

if TYPE_CHECKING:
    from fluxc.base.safetensors import TensorRef


@dataclass(frozen=True)
class RoundingInputs:
    """The layers of `plan` whose format can be solved are, from the component's `tensors`; `scales` and `rounding` are a
    recipe's, `rows` those of a CFG batch. Where layers may be smoothed, `settings` say how ranges of inputs are found."""

    component: str
    files: CheckpointFiles
    tensors: dict[str, TensorRef]
    plan: list[LayerPlan]
    calibration: Path
    scales: Scales
    rounding: RoundingMethod
    rows: int
    text_layers: tuple[int, ...]
    aside: Aside
    settings: Calibration | None = None


def run(inputs: RoundingInputs, folder: Path, report: Report) -> None:
    """Write the solved weights, part by part; finished parts are kept aside meanwhile."""
    import torch

    from fluxc.calibrate.file import read_calibration, read_calls
    from fluxc.calibrate.smoothing import Ranges
    from fluxc.calibrate.solve import Problem, solve_component
    from fluxc.running.model import ReferenceModel
    from fluxc.running.placement import find_placement

    calls, measured = read_calls(inputs.calibration).get(inputs.component), read_calibration(inputs.calibration)
    if not calls:
        raise BuildError(
            f"{inputs.calibration}: holds no calls of the {inputs.component}, which weights are solved against (rounding: "
            "gptq, low_rank); `fluxc calibrate` makes a file that does"
        )
    checkpoint, asked = inputs.files.checkpoint, asked_of(measured.origin.request, inputs.rows)
    placement = replace(find_placement(checkpoint, "auto", torch.bfloat16, asked), pieces="layer")
    layers = [(entry.layer.name, entry.layer.group, entry.format, entry.low_rank) for entry in inputs.plan]
    asked_for = (inputs.component, inputs.files.hashes(), layers, inputs.scales, inputs.rounding, calls.calls)
    smoothing = (str(inputs.settings), measured.origin.request) if inputs.settings else ()
    made_by = key_of(*asked_for, *smoothing, str(placement), library_versions(), code_digest(__name__))
    work = inputs.aside.folder.with_name(f"{inputs.aside.folder.name}-{made_by}")
    work.mkdir(parents=True, exist_ok=True)
    ranges = Ranges(measured.records[inputs.component], inputs.settings) if inputs.settings else None
    problem = Problem(inputs.component, inputs.plan, inputs.tensors, calls, inputs.scales, inputs.rounding, ranges)
    with ReferenceModel(checkpoint, placement).component(inputs.component, inputs.text_layers) as placed:
        solve_component(placed, problem, work, report)
    for path in sorted(work.glob("*.safetensors")):
        shutil.move(path, folder / path.name)
    shutil.rmtree(work)


def load(folder: Path) -> Made:
    """The folder of solved weights (fluxc.quantize.solved)."""
    return Made(folder)


def at_once(asked: Asked) -> Asked:
    """`asked` of the calls that go through the component together: all that calibration kept."""
    from fluxc.calibrate.records import ROWS

    calls = min(ROWS, asked.prompts * asked.rows * asked.steps)
    return replace(asked, prompts=calls, together=calls, rows=1)
