"""The stage that measures what every fusion group costs when it alone is quantized, in one or several formats, step by step.

`exclude: auto` and `fluxc tune` choose from what it finds. Errors of different groups are nearly independent, so costs add up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxc.base.cache import Made
from fluxc.base.numbers import as_json
from fluxc.base.progress import Report
from fluxc.calibrate.simulated import Rounded, simulation_of
from fluxc.calibrate.states import at_every_step, evenly
from fluxc.checkpoint.files import CheckpointFiles
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, fusion_groups, to_quantize
from fluxc.recipe.structs import Calibration, Scales

if TYPE_CHECKING:
    from fluxc.calibrate.sensitivity import ErrorsOf

COSTS = "costs.json"


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
class FormatInputs:
    """What measuring depends on, and the quantized `formats` that every group the plan quantizes may have; none: that of the
    plan. At most `steps` steps of each image are measured."""

    measured: CostInputs
    formats: tuple[str, ...]
    steps: int


@dataclass(frozen=True)
class Costs:
    """A fusion group: its layers, and by format the relative squared error of the velocity when it alone is in that format, at
    every step of an image; between measured ones linear in the step."""

    layers: tuple[str, ...]
    by_format: dict[str, np.ndarray]


def run(inputs: FormatInputs, folder: Path, report: Report) -> None:
    """Write every group's costs as JSON."""
    asked = [
        (members, format)
        for members in fusion_groups(to_quantize(inputs.measured.plan))
        for format in inputs.formats or (members[0].format,)
        if all(entry.layer.in_features % FORMATS[format].block == 0 for entry in members)
    ]
    steps = inputs.measured.request["steps"]
    measured = evenly(steps, inputs.steps)
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    with prepared_errors(inputs.measured, inputs.formats, measured) as errors:
        for number, (members, format) in enumerate(asked, start=1):
            layers = tuple(entry.layer.name for entry in members)
            of_steps = errors([replace(entry, format=format) for entry in members]).mean(axis=0)
            found.setdefault(layers, {})[format] = of_steps.tolist()
            report(number, len(asked), f"{number}/{len(asked)} groups and formats")
    groups_found = [{"layers": list(layers), "costs": costs} for layers, costs in found.items()]
    plain = {"steps": steps, "measured": measured, "groups": groups_found}
    (folder / COSTS).write_text(as_json(plain, "costs of formats", indent=1) + "\n")


def load(folder: Path) -> Path:
    """The file with the costs."""
    return folder / COSTS


def read_costs(path: Path) -> list[Costs]:
    """The costs."""
    plain = json.loads(path.read_text())
    return [
        Costs(
            tuple(group["layers"]),
            {format: at_every_step(cost, plain["measured"], plain["steps"]) for format, cost in group["costs"].items()},
        )
        for group in plain["groups"]
    ]


def prepared_errors(
    inputs: CostInputs, formats: tuple[str, ...] = (), wanted: Sequence[int] | None = None
) -> AbstractContextManager[ErrorsOf]:
    """What gives the errors of quantized layers while the body runs, in the formats of the plan or in any of `formats`: at a
    few evenly spaced steps of each image, or at those `wanted`."""
    import torch

    from fluxc.calibrate.sensitivity import prepared
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
        wanted,
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
