"""The stages of `fluxc tune`: what every fusion group costs in each format it may have, then what whole choices cost.

As those of `exclude: auto` (sensitivity_stage.py), with several formats in place of one, and step by step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fluxc.base.numbers import as_json
from fluxc.base.progress import Report
from fluxc.calibrate.sensitivity_stage import CostInputs, prepared_errors
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, to_quantize

COSTS, ERRORS = "costs.json", "errors.json"


@dataclass(frozen=True)
class Wanted:
    """The format of every layer that is quantized, by its name; the others stay in bf16. At `exact_steps` (from 0) inputs of
    `exact_layers` are left as they are."""

    formats: dict[str, str]
    exact_layers: tuple[str, ...] = ()
    exact_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class FormatInputs:
    """What measuring depends on, and the quantized `formats` that every group the plan quantizes may have; at most `steps`
    steps of each image are measured."""

    measured: CostInputs
    formats: tuple[str, ...]
    steps: int


@dataclass(frozen=True)
class ChoiceInputs:
    """What measuring depends on, and whole choices, each to be measured as one."""

    measured: CostInputs
    formats: tuple[str, ...]
    steps: int
    choices: tuple[Wanted, ...]


@dataclass(frozen=True)
class Costs:
    """A fusion group: its layers, and by format the relative squared error of the velocity when it alone is in that format, at
    every step of an image; between measured ones linear in the step."""

    layers: tuple[str, ...]
    by_format: dict[str, np.ndarray]


def run(inputs: FormatInputs, folder: Path, report: Report) -> None:
    """Write every group's costs as JSON."""
    from fluxc.calibrate.sensitivity import evenly

    groups: dict[str, list[LayerPlan]] = {}
    for entry in to_quantize(inputs.measured.plan):
        groups.setdefault(entry.layer.group or entry.layer.name, []).append(entry)
    asked = [
        (members, format)
        for members in groups.values()
        for format in inputs.formats
        if all(entry.layer.in_features % FORMATS[format].block == 0 for entry in members)
    ]
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    with prepared_errors(inputs.measured, inputs.formats, inputs.steps) as errors:
        for number, (members, format) in enumerate(asked, start=1):
            layers = tuple(entry.layer.name for entry in members)
            of_steps = errors([replace(entry, format=format) for entry in members]).mean(axis=0)
            found.setdefault(layers, {})[format] = of_steps.tolist()
            report(number, len(asked), f"{number}/{len(asked)} groups and formats")
    steps = inputs.measured.request["steps"]
    plain = {
        "steps": steps,
        "measured": evenly(steps, inputs.steps),
        "groups": [{"layers": list(layers), "costs": costs} for layers, costs in found.items()],
    }
    (folder / COSTS).write_text(as_json(plain, "costs of formats", indent=1) + "\n")


def load(folder: Path) -> list[Costs]:
    """The costs."""
    plain = json.loads((folder / COSTS).read_text())
    return [
        Costs(
            tuple(group["layers"]),
            {
                format: _at_every_step(cost, plain["measured"], plain["steps"])
                for format, cost in group["costs"].items()
            },
        )
        for group in plain["groups"]
    ]


def run_choices(inputs: ChoiceInputs, folder: Path, report: Report) -> None:
    """Write the relative error (root of the mean square) of each choice as JSON."""
    from fluxc.calibrate.sensitivity import evenly

    steps, every = inputs.measured.request["steps"], to_quantize(inputs.measured.plan)
    measured, found = evenly(steps, inputs.steps), []
    with prepared_errors(inputs.measured, inputs.formats, inputs.steps) as errors:

        def squared(plan: list[LayerPlan]) -> np.ndarray:
            return _at_every_step(errors(plan).mean(axis=0), measured, steps)

        for number, choice in enumerate(inputs.choices, start=1):
            plan = [replace(e, format=choice.formats[e.layer.name]) for e in every if e.layer.name in choice.formats]
            of_steps = squared(plan)
            if choice.exact_steps:
                exact = [
                    replace(e, format=FORMATS[e.format].weights_alone) if e.layer.name in choice.exact_layers else e
                    for e in plan
                ]
                at = list(choice.exact_steps)
                of_steps[at] = squared(exact)[at]
            found.append(float(of_steps.mean()) ** 0.5)
            report(number, len(inputs.choices), f"{number}/{len(inputs.choices)} choices")
    (folder / ERRORS).write_text(as_json(found, "errors of choices") + "\n")


def load_choices(folder: Path) -> list[float]:
    """The errors."""
    found: list[Any] = json.loads((folder / ERRORS).read_text())
    return [float(error) for error in found]


def _at_every_step(values: Any, measured: list[int], steps: int) -> np.ndarray:
    return np.interp(np.arange(steps), measured, values)
