"""Weights of a component solved against its own inputs (GPTQ): one part of the model after the other, on the calls calibration
kept.

All calls go through a part together (fluxc.running.lockstep). When they have, the second moments of its inputs are whole; its
weights are solved, and the moments let go of, so that memory holds those of one part and never of the model.

A layer is judged on inputs of calls that its moments were not gathered on. Where rounding to nearest reproduces its output
there at least as well, more damping is tried, and then the weight is rounded to nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fluxc.base.errors import FluxError
from fluxc.base.progress import Report
from fluxc.base.safetensors import TensorRef
from fluxc.calibrate.calls import FIXED, Call, Calls
from fluxc.calibrate.moments import Moments
from fluxc.calibrate.solve_needs import CHUNK
from fluxc.formats import cpu
from fluxc.formats.base import Format, Parts
from fluxc.formats.gptq import DAMPING, SingularError, factor, order_of
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxc.quantize.solved import Rounding, read_roundings, write_solved
from fluxc.quantize.writer import not_finite
from fluxc.recipe.structs import Scales
from fluxc.running.model import PlacedModel

DAMPINGS = (DAMPING, 10 * DAMPING, 100 * DAMPING)
"""Tried in turn, until a layer is better than rounded to nearest."""

Group = list[LayerPlan]


def solvable(plan: list[LayerPlan]) -> list[Group]:
    """The fusion groups of `plan` that can be solved, in its order."""
    groups: dict[str, Group] = {}
    for entry in to_quantize(plan):
        if FORMATS[entry.format].solves:
            groups.setdefault(entry.layer.group or entry.layer.name, []).append(entry)
    return list(groups.values())


@dataclass(frozen=True)
class Problem:
    """The layers of `plan`, from the `tensors` of a `component`, are solved against its `calls`; `scales` as a recipe's."""

    component: str
    plan: list[LayerPlan]
    tensors: dict[str, TensorRef]
    calls: Calls
    scales: Scales


def solve_component(placed: PlacedModel, problem: Problem, folder: Path, report: Report | None = None) -> None:
    """Write a file of solved weights (fluxc.quantize.solved) into `folder` for each part of `placed`, which reads layers.

    Parts whose file is there are passed through, and not solved again.
    """
    groups, calls = solvable(problem.plan), problem.calls
    parts = {part: [group for group in groups if _is_of(group, part)] for part in placed.parts}
    files = {part: folder / f"{number:04}.safetensors" for number, part in enumerate(placed.parts) if parts[part]}
    left = {part: parts[part] for part, file in files.items() if not _is_whole(file)}
    done, total = sum(len(parts[part]) for part in files if part not in left), len(groups)
    solver = _Solver(problem.tensors, problem.scales)
    moments = Moments(placed.module, [group[0].layer.name for part in left.values() for group in part], len(calls))

    def solve(part: str, _: torch.nn.Module) -> None:
        nonlocal done
        found = _Found()
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


@dataclass
class _Found:
    solved: dict[str, tuple[Parts, np.float32]] = field(default_factory=dict)
    roundings: dict[str, Rounding] = field(default_factory=dict)


@dataclass
class _Member:
    """A layer of the group that is being solved: its weight as patterns and their dtype, the largest magnitudes that its format
    encodes with; squares of its output on the inputs held out, and of what rounding to nearest makes wrong of it."""

    name: str
    weight: np.ndarray
    dtype: str
    amaxes: np.ndarray
    signal: float = 0.0
    nearest: float | None = None


@dataclass(frozen=True)
class _Solver:
    tensors: dict[str, TensorRef]
    scales: Scales

    def group(self, group: Group, moments: Moments, calls: int, found: _Found) -> None:
        """Solve the layers of one fusion group into `found`."""
        first, names = group[0].layer.name, [entry.layer.name for entry in group]
        if moments.calls_of(first) != calls:
            why = f"calibration's calls reach it {moments.calls_of(first)} times, not {calls}"
            found.roundings |= {name: Rounding("nearest", why=why) for name in names}
            return
        sums, rows = moments.take(first)
        held_out = rows.cpu().numpy()
        format, left = FORMATS[group[0].format], [self._member(entry) for entry in group]
        amax = max(cpu.largest(member.amaxes, member.dtype) for member in left)
        scale = format.group_scale([(member.weight, member.dtype) for member in left], amax, self.scales)
        order = order_of(sums.diagonal().cpu().numpy())
        for damping in DAMPINGS:
            try:
                upper = factor(sums, damping, order)
            except SingularError as error:
                found.roundings |= {member.name: Rounding("nearest", why=str(error)) for member in left}
                return
            again = []
            for member in left:
                parts, lost = self._solved(format, member, (upper, order), scale, held_out)
                if lost is not None and member.nearest is not None and not lost < member.nearest:
                    again.append(member)
                    continue
                solved, nearest = (_decibels(member.signal, noise) for noise in (lost, member.nearest))
                found.roundings[member.name] = Rounding("gptq", damping, solved, nearest)
                found.solved[member.name] = parts, scale
            left = again
            if not left:
                return
        why = "no better than rounded to nearest on inputs that were held out"
        for member in left:
            snr = _decibels(member.signal, member.nearest)
            found.roundings[member.name] = Rounding("nearest", nearest_snr_db=snr, why=why)

    def _member(self, entry: LayerPlan) -> _Member:
        ref = self.tensors[f"{entry.layer.name}.weight"]
        weight = cpu.patterns_in(ref)
        try:
            return _Member(entry.layer.name, weight, ref.dtype, FORMATS[entry.format].amaxes(weight, ref.dtype))
        except cpu.NotFiniteError as error:
            raise not_finite(ref, error.position) from None

    def _solved(
        self,
        format: Format,
        member: _Member,
        factor: tuple[np.ndarray, np.ndarray],
        scale: np.float32,
        rows: np.ndarray,
    ) -> tuple[Parts, float | None]:
        """The parts of a layer, and, where `rows` are held out, the squares of what is wrong in its output on them."""
        chunks: list[Parts] = []
        height, is_first = max(1, CHUNK // member.weight.shape[1]), member.nearest is None
        lost, nearest, signal = 0.0, 0.0, 0.0
        for first in range(0, len(member.weight), height):
            patterns = np.ascontiguousarray(member.weight[first : first + height])
            exact = cpu.values(patterns, member.dtype)
            chunks.append(format.solve(exact, factor, scale, self.scales))
            if not len(rows):
                continue
            lost += _energy(rows, exact - format.decode(chunks[-1], scale))
            if is_first:
                amaxes = member.amaxes[first : first + height]
                encoded = format.encode(patterns, member.dtype, amaxes, scale, self.scales)
                nearest += _energy(rows, exact - format.decode(encoded, scale))
                signal += _energy(rows, exact)
        parts = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        if not len(rows):
            return parts, None
        if is_first:
            member.nearest, member.signal = nearest, signal
        return parts, lost


def _energy(rows: np.ndarray, weight: np.ndarray) -> float:
    """The sum of squares of rows @ weight.T."""
    return float((torch.from_numpy(rows) @ torch.from_numpy(weight).T).square().sum(dtype=torch.float64))


def _decibels(signal: float, noise: float | None) -> float | None:
    return None if not noise or not signal else round(10 * math.log10(signal / noise), 2)


def _is_of(group: Group, part: str) -> bool:
    return f"{group[0].layer.name}.".startswith(f"{part}.")


def _is_whole(file: Path) -> bool:
    """Whether an earlier run solved this part."""
    try:
        read_roundings(file)
    except (FluxError, OSError):
        return False
    return True
