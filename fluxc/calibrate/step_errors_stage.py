"""The stage of steps that are to be chosen (`precision.steps`): how far each step's velocity is with each of the bodies.

Measured in torch, on a few of calibration's prompts, with diffusers' own latents, at most STEPS steps of an image. Which steps
are chosen does not belong to it, so another count measures nothing again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluxc.base.numbers import as_json, significant
from fluxc.base.progress import Report
from fluxc.calibrate.costs_stage import CostInputs, prepared_errors
from fluxc.calibrate.states import at_every_step, measured_on
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxrt.stepprecision import BODY

RESULT = "step-errors.json"
STEPS = 24


@dataclass(frozen=True)
class StepErrorInputs:
    """The model with the plan of `body`, asked for all steps of a generation, and the plans of the `bodies` beside it."""

    measured: CostInputs
    bodies: dict[str, list[LayerPlan]]


@dataclass(frozen=True)
class StepErrors:
    """By body the relative squared error of the velocity at each step of a generation, averaged over prompts; between steps
    that were measured (`measured`) linear in the step."""

    prompts: int
    measured: tuple[int, ...]
    squared: dict[str, np.ndarray]

    @property
    def gains(self) -> dict[str, list[float]]:
        """How much of the squared error of `body` goes away at each step with each of the bodies beside it."""
        return {body: (self.squared[BODY] - found).tolist() for body, found in self.squared.items() if body != BODY}

    @property
    def roots(self) -> dict[str, list[float]]:
        """The relative errors, by body and step."""
        return {body: [significant(float(value) ** 0.5) for value in found] for body, found in self.squared.items()}


def run(inputs: StepErrorInputs, folder: Path, report: Report) -> None:
    """Write the errors of every body as JSON."""
    request = inputs.measured.request
    plans = {BODY: inputs.measured.plan, **inputs.bodies}
    found: dict[str, Any] = {}
    on = measured_on(len(request["prompts"]), request["steps"], STEPS)
    with prepared_errors(inputs.measured, wanted=on["steps"]) as errors:
        for done, (body, plan) in enumerate(plans.items(), start=1):
            found[body] = errors(to_quantize(plan)).mean(axis=0).tolist()
            report(done, len(plans), f"{done}/{len(plans)} bodies")
    plain = {"prompts": on["prompts"], "steps": request["steps"], "measured": on["steps"], "squared": found}
    (folder / RESULT).write_text(as_json(plain, "step errors", indent=1) + "\n")


def load(folder: Path) -> StepErrors:
    """What was measured, at every step."""
    plain = json.loads((folder / RESULT).read_text())
    measured = plain["measured"]
    squared = {body: at_every_step(found, measured, plain["steps"]) for body, found in plain["squared"].items()}
    return StepErrors(plain["prompts"], tuple(measured), squared)
