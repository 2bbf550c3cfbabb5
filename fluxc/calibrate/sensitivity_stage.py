"""The stages of `exclude: auto`: what every fusion group costs, then what is kept under the budget.

The first takes long and knows no budget, so another budget measures no group again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxc.base.cache import Made
from fluxc.base.numbers import as_json
from fluxc.base.progress import Report
from fluxc.calibrate.simulated import Rounded, simulation_of
from fluxc.checkpoint.files import CheckpointFiles
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.structs import Budget, Calibration, Scales

if TYPE_CHECKING:
    from fluxc.calibrate.sensitivity import ErrorOf, ErrorsOf

COSTS, RESULT = "costs.json", "sensitivity.json"


@dataclass(frozen=True)
class CostInputs:
    """The model and the prompts it is measured on, the plan without the choice, and how quantized layers compute.

    `solved`: the folder of weights that were solved, where some were.
    """

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
    solved: Made | None = None


@dataclass(frozen=True)
class ChoiceInputs:
    """What was measured, the file with the `costs`, and the budget."""

    measured: CostInputs
    costs: Path
    budget: Budget


def run(inputs: CostInputs, folder: Path, report: Report) -> None:
    """Write every group's cost as JSON."""
    from fluxc.calibrate.sensitivity import measure_costs

    with prepared_error(inputs) as error:
        costs = measure_costs(error, inputs.plan, report)
    plain = [{"layers": list(c.layers), "parameters": c.parameters, "cost": c.cost} for c in costs]
    (folder / COSTS).write_text(as_json(plain, "sensitivity", indent=1) + "\n")


def load(folder: Path) -> Path:
    """The file with the costs."""
    return folder / COSTS


def run_choice(inputs: ChoiceInputs, folder: Path, report: Report) -> None:
    """Write what was measured and chosen as JSON."""
    from fluxc.calibrate.sensitivity import GroupCost, choose_layers, measured_on

    measured, request = inputs.measured, inputs.measured.request
    costs = [
        GroupCost(tuple(plain["layers"]), plain["parameters"], plain["cost"])
        for plain in json.loads(inputs.costs.read_text())
    ]
    with prepared_error(measured) as error:
        chosen = choose_layers(error, measured.plan, costs, inputs.budget)
    on = measured_on(len(request["prompts"]), request["steps"])
    found = {**on, "inputs_rounded": measured.round_inputs, **chosen}
    (folder / RESULT).write_text(as_json(found, "sensitivity", indent=1) + "\n")


def load_choice(folder: Path) -> dict[str, Any]:
    """What was measured and chosen."""
    found: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return found


@contextmanager
def prepared_error(inputs: CostInputs, formats: tuple[str, ...] = ()) -> Iterator[ErrorOf]:
    """What gives the error of quantized layers while the body runs: in the formats of the plan, or in any of `formats`."""
    with prepared_errors(inputs, formats) as errors:
        yield lambda entries: float(errors(entries).mean())


def prepared_errors(
    inputs: CostInputs, formats: tuple[str, ...] = (), steps: int | None = None
) -> AbstractContextManager[ErrorsOf]:
    """The same of every recorded state; at most `steps` steps of an image, where it is not given a few."""
    import torch

    from fluxc.calibrate.sensitivity import STEPS, prepared
    from fluxc.calibrate.stage import asked_of, generation_of
    from fluxc.running.placement import find_placement

    checkpoint = inputs.files.checkpoint
    placement = find_placement(checkpoint, "auto", getattr(torch, inputs.dtype), asked_of(inputs.request, inputs.rows))
    return prepared(
        checkpoint,
        inputs.request["prompts"],
        generation_of(inputs.request, inputs.text_layers),
        inputs.rows,
        placement,
        simulation_of(checkpoint, "transformer", rounded_of(inputs), formats),
        STEPS if steps is None else steps,
    )


def rounded_of(inputs: CostInputs) -> Rounded:
    """How the layers of its plan compute."""
    return Rounded(
        inputs.plan,
        inputs.scales,
        inputs.round_inputs,
        calibration=inputs.calibration,
        settings=inputs.settings,
        solved=inputs.solved,
    )
