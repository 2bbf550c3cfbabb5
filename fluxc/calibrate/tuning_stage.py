"""The stages of `fluxc tune`: what every fusion group costs in each format it may have, then what whole choices cost.

As those of `exclude: auto` (sensitivity_stage.py), with several formats in place of one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxc.base.numbers import as_json
from fluxc.base.progress import Report
from fluxc.calibrate.sensitivity_stage import CostInputs, prepared_error
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, to_quantize

COSTS, ERRORS = "costs.json", "errors.json"

Choice = dict[str, str]
"""The format of every layer that is quantized, by its name; the others stay in bf16."""


@dataclass(frozen=True)
class FormatInputs:
    """What measuring depends on, and the quantized `formats` that every group the plan quantizes may have."""

    measured: CostInputs
    formats: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceInputs:
    """What measuring depends on, and whole choices, each to be measured as one."""

    measured: CostInputs
    formats: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Costs:
    """A fusion group: its layers, and by format the relative squared error of the velocity when it alone is in that format."""

    layers: tuple[str, ...]
    by_format: dict[str, float]


def run(inputs: FormatInputs, folder: Path, report: Report) -> None:
    """Write every group's costs as JSON."""
    groups: dict[str, list[LayerPlan]] = {}
    for entry in to_quantize(inputs.measured.plan):
        groups.setdefault(entry.layer.group or entry.layer.name, []).append(entry)
    asked = [
        (members, format)
        for members in groups.values()
        for format in inputs.formats
        if all(entry.layer.in_features % FORMATS[format].block == 0 for entry in members)
    ]
    found: dict[tuple[str, ...], dict[str, float]] = {}
    with prepared_error(inputs.measured, inputs.formats) as error:
        for number, (members, format) in enumerate(asked, start=1):
            layers = tuple(entry.layer.name for entry in members)
            found.setdefault(layers, {})[format] = error([replace(entry, format=format) for entry in members])
            report(number, len(asked), f"{number}/{len(asked)} groups and formats")
    plain = [{"layers": list(layers), "costs": costs} for layers, costs in found.items()]
    (folder / COSTS).write_text(as_json(plain, "costs of formats", indent=1) + "\n")


def load(folder: Path) -> list[Costs]:
    """The costs."""
    return [Costs(tuple(of["layers"]), of["costs"]) for of in json.loads((folder / COSTS).read_text())]


def run_choices(inputs: ChoiceInputs, folder: Path, report: Report) -> None:
    """Write the relative error (root of the mean square) of each choice as JSON."""
    errors = []
    with prepared_error(inputs.measured, inputs.formats) as error:
        for number, choice in enumerate(inputs.choices, start=1):
            plan = [entry for entry in to_quantize(inputs.measured.plan) if entry.layer.name in choice]
            errors.append(error([replace(entry, format=choice[entry.layer.name]) for entry in plan]) ** 0.5)
            report(number, len(inputs.choices), f"{number}/{len(inputs.choices)} choices")
    (folder / ERRORS).write_text(as_json(errors, "errors of choices") + "\n")


def load_choices(folder: Path) -> list[float]:
    """The errors."""
    found: list[Any] = json.loads((folder / ERRORS).read_text())
    return [float(error) for error in found]
