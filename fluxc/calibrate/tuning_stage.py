"""The last stage of `fluxc tune`: what whole choices cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fluxc.base.numbers import as_json
from fluxc.base.progress import Report
from fluxc.calibrate.costs_stage import CostInputs, prepared_errors
from fluxc.calibrate.states import at_every_step, evenly
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, to_quantize

ERRORS = "errors.json"


@dataclass(frozen=True)
class Wanted:
    """The format of every layer that is quantized, by its name; the others stay in bf16. At `exact_steps` (from 0) inputs of
    `exact_layers` are left as they are; `skipped` steps take the residual of the last step before them that is not skipped.
    """

    formats: dict[str, str]
    exact_layers: tuple[str, ...] = ()
    exact_steps: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChoiceInputs:
    """What measuring depends on, and whole choices, each to be measured as one at most at `steps` steps of each image."""

    measured: CostInputs
    formats: tuple[str, ...]
    steps: int
    choices: tuple[Wanted, ...]


def sources_of(skipped: Sequence[int], steps: int) -> list[int]:
    """Of every step the one whose residual it takes: itself, or the last before it that is not skipped."""
    sources: list[int] = []
    for step in range(steps):
        sources.append(sources[-1] if step in skipped else step)
    return sources


def run_choices(inputs: ChoiceInputs, folder: Path, report: Report) -> None:
    """Write the relative error (root of the mean square) of each choice as JSON.

    Where a choice skips steps, the choices are measured at all of them: errors leap from a skipped step to the next.
    """
    steps, every = inputs.measured.request["steps"], to_quantize(inputs.measured.plan)
    skips = any(choice.skipped for choice in inputs.choices)
    measured = list(range(steps)) if skips else evenly(steps, inputs.steps)
    found = []
    with prepared_errors(inputs.measured, inputs.formats, measured) as errors:
        for number, choice in enumerate(inputs.choices, start=1):
            sources = sources_of(choice.skipped, steps)

            def squared(plan: list[LayerPlan], sources: list[int] = sources) -> np.ndarray:
                return at_every_step(errors(plan, sources if skips else None).mean(axis=0), measured, steps)

            plan = [replace(e, format=choice.formats[e.layer.name]) for e in every if e.layer.name in choice.formats]
            of_steps = squared(plan)
            if choice.exact_steps:
                exact = [
                    replace(e, format=FORMATS[e.format].weights_alone) if e.layer.name in choice.exact_layers else e
                    for e in plan
                ]
                of_steps = np.where(np.isin(sources, choice.exact_steps), squared(exact), of_steps)
            found.append(float(of_steps.mean()) ** 0.5)
            report(number, len(inputs.choices), f"{number}/{len(inputs.choices)} choices")
    (folder / ERRORS).write_text(as_json(found, "errors of choices") + "\n")


def load_choices(folder: Path) -> list[float]:
    """The errors."""
    found: list[Any] = json.loads((folder / ERRORS).read_text())
    return [float(error) for error in found]
