"""Weights of a component solved against its own inputs (GPTQ, low rank): one part of the model after the other, on the calls
calibration kept.

All calls go through a part together (fluxc.running.lockstep). When they have, the second moments of its inputs are whole; its
weights are solved, and the moments let go of, so that memory holds those of one part and never of the model.
How one fusion group is solved: fluxc.calibrate.solve_group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fluxc.base.errors import FluxError
from fluxc.base.progress import Report
from fluxc.base.safetensors import TensorRef
from fluxc.calibrate.calls import FIXED, Call, Calls
from fluxc.calibrate.moments import Moments
from fluxc.calibrate.smoothing import Ranges
from fluxc.calibrate.solve_group import Solver
from fluxc.calibrate.solve_member import Found, Group
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, fusion_groups, to_quantize
from fluxc.quantize.solved import read_roundings, write_solved
from fluxc.recipe.structs import RoundingMethod, Scales
from fluxc.running.model import PlacedModel


def solvable(plan: list[LayerPlan]) -> list[Group]:
    """The fusion groups of `plan` that can be solved, in its order."""
    return fusion_groups(entry for entry in to_quantize(plan) if FORMATS[entry.format].solves)


@dataclass(frozen=True)
class Problem:
    """The layers of `plan`, from the `tensors` of a `component`, are solved against its `calls`; `scales` and `rounding` as a
    recipe's. Those that may be smoothed need the `ranges` of their inputs."""

    component: str
    plan: list[LayerPlan]
    tensors: dict[str, TensorRef]
    calls: Calls
    scales: Scales
    rounding: RoundingMethod = "gptq"
    ranges: Ranges | None = None


def solve_component(placed: PlacedModel, problem: Problem, folder: Path, report: Report | None = None) -> None:
    """Write a file of solved weights (fluxc.quantize.solved) into `folder` for each part of `placed`, which reads layers.

    Parts whose file is there are passed through, and not solved again.
    """
    groups, calls = solvable(problem.plan), problem.calls
    parts = {part: [group for group in groups if _is_of(group, part)] for part in placed.parts}
    files = {part: folder / f"{number:04}.safetensors" for number, part in enumerate(placed.parts) if parts[part]}
    left = {part: parts[part] for part, file in files.items() if not _is_whole(file)}
    done, total = sum(len(parts[part]) for part in files if part not in left), len(groups)
    solver = Solver(problem.tensors, problem.scales, problem.rounding, problem.ranges)
    firsts = [group[0] for part in left.values() for group in part]
    smoothed = {entry.layer.name for entry in firsts if entry.is_smoothed}
    moments = Moments(placed.module, [entry.layer.name for entry in firsts], len(calls), smoothed)

    def solve(part: str, _: torch.nn.Module) -> None:
        nonlocal done
        found = Found()
        for group in left.pop(part, []):
            solver.group(group, moments, len(calls), found)
            done += 1
            if report:
                report(done, total, f"{done}/{total} groups of layers solved")
        if found.roundings:
            write_solved(files[part], found.solved, found.roundings)

    def call(arguments: Call) -> None:
        placed.module(**arguments, **FIXED[problem.component])

    if left:
        placed.on_done = solve
        placed.run([partial(call, calls[number]) for number in range(len(calls))])


def _is_of(group: Group, part: str) -> bool:
    return f"{group[0].layer.name}.".startswith(f"{part}.")


def _is_whole(file: Path) -> bool:
    """Whether an earlier run solved this part."""
    try:
        read_roundings(file)
    except (FluxError, OSError):
        return False
    return True
