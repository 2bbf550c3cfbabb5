"""The Linears of one fusion group solved against the second moments of their common input: GPTQ, and factors of low rank.

A layer is judged on inputs of calls that its moments were not gathered on. Where rounding to nearest, without factors,
reproduces its output there at least as well, more damping is tried, then doing without factors, and then the weight is rounded
to nearest. The members of a group share a tensor scale, so either all of them have factors or none.

A group that may be smoothed is solved once more as W / p on inputs x p (fluxc.calibrate.smoothing).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
import torch

from fluxc.base.safetensors import TensorRef
from fluxc.calibrate.moments import Moments
from fluxc.calibrate.smoothing import Ranges, Smoother
from fluxc.calibrate.solve_member import Found, Gathered, Group, Member, energy_of, scale_of
from fluxc.formats import cpu
from fluxc.formats.base import Format, Parts
from fluxc.formats.gptq import DAMPING, SingularError, factor, order_of
from fluxc.formats.low_rank import A, B, fit
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan
from fluxc.quantize.solved import Rounding
from fluxc.quantize.writer import not_finite
from fluxc.recipe.structs import RoundingMethod, Scales

DAMPINGS = (DAMPING, 10 * DAMPING, 100 * DAMPING)
"""Tried in turn, until a layer is better than rounded to nearest."""
NO_BETTER = "no better than rounded to nearest on inputs that were held out"


@dataclass(frozen=True)
class _Attempt:
    """Rounds what first factors leave of a weight, under `solving` (formats.gptq) or to nearest, and fits the factors again."""

    format: Format
    scale: np.float32
    scales: Scales
    rank: int
    damping: float
    solving: tuple[np.ndarray, np.ndarray] | None

    def of(self, member: Member, rest: np.ndarray, gathered: Gathered) -> tuple[Parts, float]:
        """The layer's parts, factors as bf16 patterns among them, and squares of what is wrong in its output."""
        chunks, left = [], np.empty_like(rest)
        for rows, _, exact in member.chunks():
            chunks.append(self._rounded(rest[rows]))
            left[rows] = exact - self.format.decode(chunks[-1], self.scale)
        b, a = fit(torch.from_numpy(left), gathered.moments.cpu(), self.rank, self.damping)
        lost = 0.0
        for rows, _, _ in member.chunks() if len(gathered.rows) else ():
            lost += energy_of(gathered.rows, left[rows] - (b[rows].float() @ a.float()).numpy())
        factors = {name: value.view(torch.int16).numpy().view(np.uint16) for name, value in ((A, a), (B, b))}
        return {**_joined(chunks), **factors}, lost

    def _rounded(self, rest: np.ndarray) -> Parts:
        if self.solving is not None:
            return self.format.solve(rest, self.solving, self.scale, self.scales)
        patterns = rest.view(np.uint32)
        return self.format.encode(patterns, "F32", self.format.amaxes(patterns, "F32"), self.scale, self.scales)


@dataclass(frozen=True)
class Solver:
    """Solves layers of the checkpoint's `tensors`; `scales` and `rounding` as a recipe's, `ranges` where it has smoothing."""

    tensors: dict[str, TensorRef]
    scales: Scales
    rounding: RoundingMethod = "gptq"
    ranges: Ranges | None = None

    def group(self, group: Group, moments: Moments, calls: int, found: Found) -> None:
        """Solve the layers of one fusion group into `found`."""
        first, names = group[0].layer.name, [entry.layer.name for entry in group]
        if moments.calls_of(first) != calls:
            why = f"calibration's calls reach it {moments.calls_of(first)} times, not {calls}"
            found.roundings |= {name: Rounding("nearest", why=why) for name in names}
            return
        noise, samples = moments.noise_of(first).cpu(), moments.samples_of(first)
        sums, rows = moments.take(first)
        gathered = Gathered(sums, rows.cpu().numpy(), noise)
        members = [self._member(entry) for entry in group]
        here = self._solved(group, members, gathered)
        if samples is not None and self.ranges is not None:
            smoother = Smoother(self.ranges, self.scales, partial(self._solved, group))
            here = smoother.choose(group, members, gathered, samples, here)
        found.add(here)

    def _solved(self, group: Group, members: list[Member], gathered: Gathered) -> Found:
        """What is found of the layers of a group, whose weights `members` are, or those divided by p."""
        found, names, rows = Found(), [entry.layer.name for entry in group], gathered.rows
        format = FORMATS[group[0].format]
        scale = scale_of(format, members, self.scales)
        for member in members if len(rows) else []:
            self._judge_nearest(format, member, scale, gathered.rows)
        try:
            if group[0].low_rank and self._with_factors(format, members, group[0].low_rank, gathered, found):
                return found
            if self.rounding == "gptq":
                self._without_factors(format, members, scale, gathered, found)
                for name in names if group[0].low_rank else ():
                    why = f"without factors: with them, {NO_BETTER}"
                    found.roundings[name] = msgspec.structs.replace(found.roundings[name], why=why)
                return found
            why = NO_BETTER
        except SingularError as error:
            why = str(error)
        for member in members:
            if member.name not in found.solved:
                found.roundings[member.name] = Rounding("nearest", nearest_snr_db=member.nearest_snr, why=why)
        return found

    def _judge_nearest(self, format: Format, member: Member, scale: np.float32, held_out: np.ndarray) -> None:
        """Note the energy of a layer's output, and of its error where the weight is rounded to nearest."""
        member.nearest = 0.0
        for rows, patterns, exact in member.chunks():
            encoded = format.encode(patterns, member.dtype, member.amaxes[rows], scale, self.scales)
            member.nearest += energy_of(held_out, exact - format.decode(encoded, scale))
            member.signal += energy_of(held_out, exact)

    def _without_factors(
        self, format: Format, members: list[Member], scale: np.float32, gathered: Gathered, found: Found
    ) -> None:
        left, order = members, order_of(gathered.moments.diagonal().cpu().numpy())
        for damping in DAMPINGS:
            upper = factor(gathered.moments, damping, order)
            again = []
            for member in left:
                chunks, lost = [], 0.0
                for _, _, exact in member.chunks():
                    chunks.append(format.solve(exact, (upper, order), scale, self.scales))
                    if len(gathered.rows):
                        lost += energy_of(gathered.rows, exact - format.decode(chunks[-1], scale))
                if not member.is_better(lost):
                    again.append(member)
                    continue
                found.roundings[member.name] = member.rounding("gptq", damping, lost)
                found.solved[member.name] = _joined(chunks), scale
            left = again
            if not left:
                return
        for member in left:
            found.roundings[member.name] = Rounding("nearest", nearest_snr_db=member.nearest_snr, why=NO_BETTER)

    def _member(self, entry: LayerPlan) -> Member:
        ref = self.tensors[f"{entry.layer.name}.weight"]
        weight = cpu.patterns_in(ref)
        try:
            return Member(entry.layer.name, weight, ref.dtype, FORMATS[entry.format].amaxes(weight, ref.dtype))
        except cpu.NotFiniteError as error:
            raise not_finite(ref, error.position) from None

    def _with_factors(self, format: Format, members: list[Member], rank: int, gathered: Gathered, found: Found) -> bool:
        """Solve a group with factors of `rank`; False, and nothing is found, where that is no better for each of its layers.

        1. The first factors take what rounded inputs make the most wrong of.
        2. What they leave of the weight is rounded, to nearest or solved.
        3. The factors are fitted again, to the weight less what it was rounded to, as the layer's inputs weigh it.
        """
        if not gathered.is_usable:
            raise SingularError("its inputs are all zero, or not finite")
        rests = [self._rest(member, rank, gathered.noise) for member in members]
        matrices = [(rest.view(np.uint32), "F32") for rest in rests]
        amax = max(cpu.largest(format.amaxes(*matrix), "F32") for matrix in matrices)
        scale = format.group_scale(matrices, amax, self.scales)
        order = order_of(gathered.moments.diagonal().cpu().numpy())
        for damping in DAMPINGS if self.rounding == "gptq" else DAMPINGS[:1]:
            solving = (factor(gathered.moments, damping, order), order) if self.rounding == "gptq" else None
            attempt = _Attempt(format, scale, self.scales, rank, damping, solving)
            tried = [attempt.of(member, rest, gathered) for member, rest in zip(members, rests, strict=True)]
            if all(member.is_better(lost) for member, (_, lost) in zip(members, tried, strict=True)):
                for member, (parts, lost) in zip(members, tried, strict=True):
                    used = damping if solving else None
                    found.roundings[member.name] = member.rounding(self.rounding, used, lost, rank)
                    found.solved[member.name] = parts, scale
                return True
        return False

    @staticmethod
    def _rest(member: Member, rank: int, noise: torch.Tensor) -> np.ndarray:
        """fp32 [out, in]: what the first factors leave of the weight."""
        rest = np.empty(member.weight.shape, np.float32)
        for rows, _, exact in member.chunks():
            rest[rows] = exact
        b, a = fit(torch.from_numpy(rest), noise, rank)
        for rows, _, _ in member.chunks():
            rest[rows] -= (b[rows].float() @ a.float()).numpy()
        return rest


def _joined(chunks: list[Parts]) -> Parts:
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
