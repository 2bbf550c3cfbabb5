"""The stages of `exclude: auto`: what every fusion group costs (costs_stage.py), then what is kept under
the budget.

The first takes long and knows no budget, so another budget measures no group again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxc.base.numbers import as_json, significant
from fluxc.base.progress import Report
from fluxc.calibrate.choice import Limits, Option, choose
from fluxc.calibrate.costs_stage import CostInputs, Costs, prepared_errors, read_costs
from fluxc.calibrate.states import STEPS, at_every_step, evenly, measured_on
from fluxc.formats.bf16 import BF16
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxc.recipe.structs import Budget

RESULT = "sensitivity.json"
SEARCHES = 8
"""Choices that are measured as a whole, where the budget is one of error."""


@dataclass(frozen=True)
class ChoiceInputs:
    """What was measured, the file with the `costs`, and the budget."""

    measured: CostInputs
    costs: Path
    budget: Budget


def run_choice(inputs: ChoiceInputs, folder: Path, report: Report) -> None:
    """Write what was measured and chosen as JSON."""
    measured, request = inputs.measured, inputs.measured.request
    steps = evenly(request["steps"], STEPS)
    with prepared_errors(measured) as errors:

        def error(entries: list[LayerPlan]) -> float:
            return float(at_every_step(errors(entries).mean(axis=0), steps, request["steps"]).mean())

        chosen = choose_layers(error, measured.plan, read_costs(inputs.costs), inputs.budget)
    on = measured_on(len(request["prompts"]), request["steps"])
    found = {**on, "inputs_rounded": measured.round_inputs, **chosen}
    (folder / RESULT).write_text(as_json(found, "sensitivity", indent=1) + "\n")


def load_choice(folder: Path) -> dict[str, Any]:
    """What was measured and chosen."""
    found: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return found


ErrorOf = Callable[[list[LayerPlan]], float]
"""The relative squared error of the velocity with these layers quantized."""


def choose_layers(error: ErrorOf, plan: list[LayerPlan], costs: list[Costs], budget: Budget) -> dict[str, Any]:
    """Which groups are kept, and the errors measured as a whole: the part of `sensitivity.json` that the budget decides."""
    every, parameters = to_quantize(plan), {entry.layer.name: entry.parameters for entry in plan}
    total, sizes = sum(parameters.values()), [sum(parameters[name] for name in group.layers) for group in costs]
    alone = [float(cost.mean()) for group in costs for cost in group.by_format.values()]

    def error_without(kept: list[int]) -> float:
        left = {name for i in kept for name in costs[i].layers}
        return error([entry for entry in every if entry.layer.name not in left])

    kept = _within(budget, alone, sizes, total, error_without)
    ranked = sorted(range(len(costs)), key=lambda i: (-alone[i] / sizes[i], costs[i].layers))
    return {
        "share_kept": sum(sizes[i] for i in kept) / total,
        "error_all_quantized": _root(error(every)),
        "error": _root(error_without(kept)),
        "ranking": [
            {
                "layers": list(costs[i].layers),
                "parameters": sizes[i],
                "error_alone": _root(alone[i]),
                "kept": i in kept,
            }
            for i in ranked
        ],
    }


def keep(alone: list[float], sizes: list[int], most: int) -> list[int]:
    """The groups to keep, of `sizes` parameters and at most so many in all, so that costs of the others add up to the least."""
    groups = [
        [Option(BF16, 0.0, 0.0, size), Option("quantized", cost, 0.0, 0.0)]
        for cost, size in zip(alone, sizes, strict=True)
    ]
    picks = choose(groups, Limits(weights=most), "weights")
    assert picks is not None, "none kept is within any limit"
    return [number for number, pick in enumerate(picks) if pick == 0]


def _within(
    budget: Budget, alone: list[float], sizes: list[int], total: int, error: Callable[[list[int]], float]
) -> list[int]:
    """What to keep: the best choice of at most `budget.share` of the parameters, or the smallest that meets `budget.error`."""
    if budget.share is not None:
        return keep(alone, sizes, int(budget.share * total))
    allowed = float(budget.error or 0) ** 2
    kept: list[int] = []
    if error(kept) <= allowed:
        return kept
    low, high = 0.0, 1.0
    kept = list(range(len(alone)))
    for _ in range(SEARCHES):
        middle = (low + high) / 2
        candidate = keep(alone, sizes, int(middle * total))
        if error(candidate) <= allowed:
            kept, high = candidate, middle
        else:
            low = middle
    return kept


def _root(squared: float) -> float:
    """Four digits are what two machines agree on."""
    return significant(squared**0.5)
