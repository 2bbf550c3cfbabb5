"""The Linears of one fusion group solved against the second moments of their common input: GPTQ, and factors of low rank.

A layer is judged on inputs of calls that its moments were not gathered on. Where rounding to nearest, without factors,
reproduces its output there at least as well, more damping is tried, then doing without factors, and then the weight is rounded
to nearest. The members of a group share a tensor scale, so either all of them have factors or none.

A group that may be smoothed is solved once more as W / p on inputs x p (fluxc.calibrate.smoothing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch

from fluxc.base.safetensors import TensorRef
from fluxc.calibrate.moments import Moments
from fluxc.calibrate.smoothing import NOT_BETTER, NOT_HELD_OUT, NOT_SOLVED, Ranges
from fluxc.calibrate.solve_needs import CHUNK
from fluxc.formats import cpu
from fluxc.formats.base import Format, Parts
from fluxc.formats.gptq import DAMPING, SingularError, factor, order_of
from fluxc.formats.low_rank import A, B, fit
from fluxc.formats.registry import FORMATS
from fluxc.formats.smoothing import PRE_QUANT_SCALE, values_of
from fluxc.quantize.plan import LayerPlan
from fluxc.quantize.solved import Rounding
from fluxc.quantize.writer import not_finite
from fluxc.recipe.structs import RoundingMethod, Scales

DAMPINGS = (DAMPING, 10 * DAMPING, 100 * DAMPING)
"""Tried in turn, until a layer is better than rounded to nearest."""
NO_BETTER = "no better than rounded to nearest on inputs that were held out"

Group = list[LayerPlan]


@dataclass
class Found:
    """What was solved, by layer, with the scale of its group, and how every layer is rounded."""

    solved: dict[str, tuple[Parts, np.float32]] = field(default_factory=dict)
    roundings: dict[str, Rounding] = field(default_factory=dict)

    def add(self, other: Found) -> None:
        """All of `other` too."""
        self.solved |= other.solved
        self.roundings |= other.roundings


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

    def chunks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Some rows at a time: which, their patterns and their values fp32."""
        height = max(1, CHUNK // self.weight.shape[1])
        for first in range(0, len(self.weight), height):
            rows = slice(first, first + height)
            patterns = np.ascontiguousarray(self.weight[rows])
            yield rows, patterns, cpu.values(patterns, self.dtype)

    def is_better(self, lost: float) -> bool:
        """Whether `lost`, squares of what is wrong in its output, is less than rounding to nearest loses; True where no inputs
        are held out."""
        return self.nearest is None or lost < self.nearest

    @property
    def nearest_snr(self) -> float | None:
        """Of its output rounded to nearest, dB."""
        return _decibels(self.signal, self.nearest)

    def smoothed(self, smoothing: np.ndarray, format: Format) -> _Member:
        """W / p, in fp32."""
        weight = np.empty(self.weight.shape, np.float32)
        for rows, _, exact in self.chunks():
            np.divide(exact, smoothing, out=weight[rows])
        patterns = weight.view(np.uint32)
        return _Member(self.name, patterns, "F32", format.amaxes(patterns, "F32"))

    def rounding(self, method: str, damping: float | None, lost: float, low_rank: int = 0) -> Rounding:
        """That of the layer where its output's error on inputs held out is `lost`."""
        return Rounding(method, damping, _decibels(self.signal, lost), self.nearest_snr, low_rank=low_rank)


@dataclass(frozen=True)
class _Gathered:
    """What the layers of a group get: second moments fp32 [in, in], inputs that were held out fp32 [rows, in], the format's
    rounding error of every channel fp32 [in]."""

    moments: torch.Tensor
    rows: np.ndarray
    noise: torch.Tensor

    @property
    def is_usable(self) -> bool:
        """Whether factors can be fitted to them: they are finite, and not all zero."""
        energy = float(self.moments.diagonal().sum(dtype=torch.float64))
        return 0 < energy < math.inf and bool(torch.isfinite(self.noise).all())

    def smoothed(self, smoothing: np.ndarray, noise: torch.Tensor) -> _Gathered:
        """The same of inputs times p, in the place of these; `noise` is what rounding makes wrong of those."""
        factor = torch.from_numpy(smoothing).to(self.moments.device)
        moments = self.moments.mul_(factor[:, None]).mul_(factor)
        return _Gathered(moments, self.rows * smoothing, noise)


@dataclass(frozen=True)
class _Attempt:
    """Rounds what first factors leave of a weight, under `solving` (formats.gptq) or to nearest, and fits the factors again."""

    format: Format
    scale: np.float32
    scales: Scales
    rank: int
    damping: float
    solving: tuple[np.ndarray, np.ndarray] | None

    def of(self, member: _Member, rest: np.ndarray, gathered: _Gathered) -> tuple[Parts, float]:
        """The layer's parts, factors as bf16 patterns among them, and squares of what is wrong in its output."""
        chunks, left = [], np.empty_like(rest)
        for rows, _, exact in member.chunks():
            chunks.append(self._rounded(rest[rows]))
            left[rows] = exact - self.format.decode(chunks[-1], self.scale)
        b, a = fit(torch.from_numpy(left), gathered.moments.cpu(), self.rank, self.damping)
        lost = 0.0
        for rows, _, _ in member.chunks() if len(gathered.rows) else ():
            lost += _energy(gathered.rows, left[rows] - (b[rows].float() @ a.float()).numpy())
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
    _smoothing: dict[str, np.ndarray] = field(default_factory=dict)

    def smoothing_of(self, group: Group) -> np.ndarray | None:
        """The p that a group may be smoothed with, bf16 patterns [in]; None where it is not to be."""
        name = group[0].layer.name
        if self.ranges is None or not group[0].is_smoothed:
            return None
        if name not in self._smoothing:
            largest = [
                np.abs(exact).max(0) for entry in group for _, _, exact in self._member(entry).chunks()
            ]
            self._smoothing[name] = self.ranges.of(group, np.max(largest, axis=0))
        return self._smoothing[name]

    def factor_of(self, group: Group) -> torch.Tensor | None:
        """The same, fp32."""
        patterns = self.smoothing_of(group)
        return None if patterns is None else torch.from_numpy(values_of(patterns))

    def group(self, group: Group, moments: Moments, calls: int, found: Found) -> None:
        """Solve the layers of one fusion group into `found`."""
        first, names = group[0].layer.name, [entry.layer.name for entry in group]
        if moments.calls_of(first) != calls:
            why = f"calibration's calls reach it {moments.calls_of(first)} times, not {calls}"
            found.roundings |= {name: Rounding("nearest", why=why) for name in names}
            return
        noise, (sums, rows) = moments.noise_of(first).cpu(), moments.take(first)
        gathered = _Gathered(sums, rows.cpu().numpy(), noise)
        members = [self._member(entry) for entry in group]
        here, smoothing = self._solved(group, members, gathered), self.smoothing_of(group)
        if smoothing is not None:
            here = self._smoothed(group, members, gathered, here, moments.smoothed_noise_of(first))
        found.add(here)

    def _solved(self, group: Group, members: list[_Member], gathered: _Gathered) -> Found:
        """What is found of the layers of a group, whose weights `members` are, or those divided by p."""
        found, names, rows = Found(), [entry.layer.name for entry in group], gathered.rows
        format = FORMATS[group[0].format]
        scale = self._scale(format, members)
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

    def _smoothed(
        self, group: Group, members: list[_Member], gathered: _Gathered, plain: Found, noise: torch.Tensor | None
    ) -> Found:
        """`plain`, or what is found of W / p where that is better; `gathered` is used up. `noise` is what rounding makes wrong
        of smoothed inputs."""
        format, patterns, x = FORMATS[group[0].format], self.smoothing_of(group), gathered.rows
        assert self.ranges is not None
        assert patterns is not None
        if noise is None or not len(x):
            return _not_smoothed(plain, NOT_HELD_OUT)
        factor = values_of(patterns)
        divided = [member.smoothed(factor, format) for member in members]
        behind = gathered.smoothed(factor, noise.cpu())
        smoothed = self._solved(group, divided, behind)
        if len(smoothed.solved) < len(members):
            return _not_smoothed(plain, NOT_SOLVED)
        lost = self._lost(format, members, plain, x, self.ranges.rounded(group, torch.from_numpy(x)))
        rounded = self.ranges.rounded(group, torch.from_numpy(behind.rows), factor)
        lost_smoothed = self._lost(format, divided, smoothed, behind.rows, rounded)
        signals = [member.signal for member in members]
        for found in (plain, smoothed):
            for member, without, with_it in zip(members, lost, lost_smoothed, strict=True):
                found.roundings[member.name] = msgspec.structs.replace(
                    found.roundings[member.name],
                    nearest_snr_db=member.nearest_snr,
                    smoothed_snr_db=_decibels(member.signal, with_it),
                    unsmoothed_snr_db=_decibels(member.signal, without),
                )
        if not _relative(lost_smoothed, signals) < _relative(lost, signals):
            return _not_smoothed(plain, NOT_BETTER)
        for name, (parts, _) in smoothed.solved.items():
            parts[PRE_QUANT_SCALE] = patterns
            smoothed.roundings[name] = msgspec.structs.replace(smoothed.roundings[name], smoothed=True)
        return smoothed

    def _lost(
        self, format: Format, members: list[_Member], found: Found, x: np.ndarray, rounded: torch.Tensor
    ) -> list[float]:
        """Squares of what is wrong in the output of each of `members` as it was found, which gets `rounded` in place of its
        inputs `x`; its factors get these."""
        lost = []
        scale = self._scale(format, members)
        exact_x = torch.from_numpy(x)
        for member in members:
            parts, scale_of = found.solved.get(member.name, (None, scale))
            wrong = 0.0
            low = exact_x @ torch.from_numpy(cpu.values(parts[A], "BF16")).T if parts and A in parts else None
            for rows, patterns, exact in member.chunks():
                if parts is None:
                    some = format.encode(patterns, member.dtype, member.amaxes[rows], scale, self.scales)
                else:
                    some = {part: value[rows] for part, value in parts.items() if part not in (A, B)}
                error = exact_x @ torch.from_numpy(exact).T
                error -= rounded @ torch.from_numpy(format.decode(some, scale_of)).T
                if low is not None and parts is not None:
                    error -= low @ torch.from_numpy(cpu.values(parts[B][rows], "BF16")).T
                wrong += float(error.square().sum(dtype=torch.float64))
            lost.append(wrong)
        return lost

    def _scale(self, format: Format, members: list[_Member]) -> np.float32:
        """The tensor scale that the weights share where they are encoded as they are."""
        amax = max(cpu.largest(member.amaxes, member.dtype) for member in members)
        return format.group_scale([(member.weight, member.dtype) for member in members], amax, self.scales)

    def _judge_nearest(self, format: Format, member: _Member, scale: np.float32, held_out: np.ndarray) -> None:
        """Note the energy of a layer's output, and of its error where the weight is rounded to nearest."""
        member.nearest = 0.0
        for rows, patterns, exact in member.chunks():
            encoded = format.encode(patterns, member.dtype, member.amaxes[rows], scale, self.scales)
            member.nearest += _energy(held_out, exact - format.decode(encoded, scale))
            member.signal += _energy(held_out, exact)

    def _without_factors(
        self, format: Format, members: list[_Member], scale: np.float32, gathered: _Gathered, found: Found
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
                        lost += _energy(gathered.rows, exact - format.decode(chunks[-1], scale))
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

    def _member(self, entry: LayerPlan) -> _Member:
        ref = self.tensors[f"{entry.layer.name}.weight"]
        weight = cpu.patterns_in(ref)
        try:
            return _Member(entry.layer.name, weight, ref.dtype, FORMATS[entry.format].amaxes(weight, ref.dtype))
        except cpu.NotFiniteError as error:
            raise not_finite(ref, error.position) from None

    def _with_factors(
        self, format: Format, members: list[_Member], rank: int, gathered: _Gathered, found: Found
    ) -> bool:
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
    def _rest(member: _Member, rank: int, noise: torch.Tensor) -> np.ndarray:
        """fp32 [out, in]: what the first factors leave of the weight."""
        rest = np.empty(member.weight.shape, np.float32)
        for rows, _, exact in member.chunks():
            rest[rows] = exact
        b, a = fit(torch.from_numpy(rest), noise, rank)
        for rows, _, _ in member.chunks():
            rest[rows] -= (b[rows].float() @ a.float()).numpy()
        return rest


def _not_smoothed(found: Found, why: str) -> Found:
    """`found`, which says so."""
    for name, of in found.roundings.items():
        found.roundings[name] = msgspec.structs.replace(of, why="; ".join(filter(None, (of.why, why))))
    return found


def _relative(lost: list[float], signals: list[float]) -> float:
    """The mean of what is lost of each output."""
    return float(np.mean([one / signal if signal else 0.0 for one, signal in zip(lost, signals, strict=True)]))


def _joined(chunks: list[Parts]) -> Parts:
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _energy(rows: np.ndarray, weight: np.ndarray) -> float:
    """The sum of squares of rows @ weight.T."""
    return float((torch.from_numpy(rows) @ torch.from_numpy(weight).T).square().sum(dtype=torch.float64))


def _decibels(signal: float, noise: float | None) -> float | None:
    if not noise or not signal or not math.isfinite(noise + signal):
        return None
    return round(10 * math.log10(signal / noise), 2)
