"""Whether the Linears of a fusion group are smoothed: solved with it and without, and compared with their inputs rounded.

1. The group's p follows from the root mean square of every input channel, the diagonal of the second moments, and of its
   column in all weights (fluxc.formats.smoothing).
2. What is solved under it is W / p on inputs x p, as any group is (fluxc.calibrate.solve_group); what rounding makes wrong of
   those inputs is found again.
3. Both results are judged on inputs that were held out, rounded under the `input_scale` that each would be stored with. The
   one that loses less is taken, of a group as a whole: the mean over its members of what is lost of their outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from fluxc.calibrate.amax import input_amax
from fluxc.calibrate.records import LayerInputs
from fluxc.calibrate.solve_member import Found, Gathered, Group, Member, decibels, scale_of
from fluxc.formats import cpu
from fluxc.formats.low_rank import A, B
from fluxc.formats.registry import FORMATS
from fluxc.formats.smoothing import PRE_QUANT_SCALE, fit, values_of
from fluxc.recipe.structs import Calibration, Scales

NOT_HELD_OUT = "not smoothed: no inputs were held out to judge it by"
NOT_SOLVED = "not smoothed: the smoothed weights could not be solved"
NOT_BETTER = "not smoothed: with rounded inputs no less is lost"


@dataclass(frozen=True)
class Ranges:
    """What calibration recorded of layers' inputs, and the `settings` by which their ranges follow from it."""

    records: Mapping[str, LayerInputs]
    settings: Calibration

    def rounded(self, group: Group, x: torch.Tensor, smoothing: np.ndarray | None = None) -> torch.Tensor:
        """`x` fp32 [rows, in] as the layers of the group get them: rounded, behind p where `smoothing` fp32 [in] is given."""
        name, format = group[0].layer.name, FORMATS[group[0].format]
        taken = {} if smoothing is None else {name: smoothing}
        amax = input_amax(self.records, group, self.settings, taken)[name]
        return format.fake_quantize(x, format.tensor_scale(torch.tensor(amax, device=x.device)))


@dataclass(frozen=True)
class Smoother:
    """Solves groups once more, smoothed, by `solve`, which takes their weights and what was gathered of their input."""

    ranges: Ranges
    scales: Scales
    solve: Callable[[list[Member], Gathered], Found]

    def choose(
        self, group: Group, members: list[Member], gathered: Gathered, samples: torch.Tensor, plain: Found
    ) -> Found:
        """`plain`, which was found without smoothing, or what is found with it, where that loses less.

        `gathered` is used up; `samples` fp32 [rows, in] are inputs to find by what rounding makes wrong of each channel.
        """
        if not len(gathered.rows):
            return _not_smoothed(plain, NOT_HELD_OUT)
        patterns = fit(*_sizes(members, gathered))
        factor, x = values_of(patterns), torch.from_numpy(gathered.rows)
        behind = samples * torch.from_numpy(factor).to(samples.device)
        noise = (self.ranges.rounded(group, behind, factor) - behind).square().sum(0, dtype=torch.float64)
        divided = [member.smoothed(factor, FORMATS[group[0].format]) for member in members]
        gathered = gathered.smoothed(factor, noise.float().cpu())
        smoothed = self.solve(divided, gathered)
        if len(smoothed.solved) < len(members):
            return _not_smoothed(plain, NOT_SOLVED)
        lost = self._lost(group, members, plain, x, self.ranges.rounded(group, x))
        x = torch.from_numpy(gathered.rows)
        lost_smoothed = self._lost(group, divided, smoothed, x, self.ranges.rounded(group, x, factor))
        for found in (plain, smoothed):
            for member, without, with_it in zip(members, lost, lost_smoothed, strict=True):
                found.roundings[member.name] = msgspec.structs.replace(
                    found.roundings[member.name],
                    nearest_snr_db=member.nearest_snr,
                    smoothed=found is smoothed,
                    smoothed_snr_db=decibels(member.signal, with_it),
                    unsmoothed_snr_db=decibels(member.signal, without),
                )
        # A NaN is not less.
        if not _of_outputs(lost_smoothed, members) < _of_outputs(lost, members):
            return _not_smoothed(plain, NOT_BETTER)
        for parts, _ in smoothed.solved.values():
            parts[PRE_QUANT_SCALE] = patterns
        return smoothed

    def _lost(
        self, group: Group, members: list[Member], found: Found, x: torch.Tensor, rounded: torch.Tensor
    ) -> list[float]:
        """Squares of what is wrong in the output of each of `members` as it was found, which gets `rounded` in place of its
        inputs `x`; its factors get these."""
        format, lost = FORMATS[group[0].format], []
        unsolved = scale_of(format, members, self.scales)
        for member in members:
            parts, scale = found.solved.get(member.name, ({}, unsolved))
            coded = {part: value for part, value in parts.items() if part not in (A, B)}
            low, b = x[:, :0], np.empty((len(member.weight), 0), np.float32)
            if A in parts:
                low, b = x @ _values(parts[A]).T, _values(parts[B]).numpy()
            wrong = 0.0
            for rows, patterns, exact in member.chunks():
                if coded:
                    some = {part: value[rows] for part, value in coded.items()}
                else:
                    some = format.encode(patterns, member.dtype, member.amaxes[rows], unsolved, self.scales)
                error = x @ torch.from_numpy(exact).T - rounded @ torch.from_numpy(format.decode(some, scale)).T
                wrong += float((error - low @ torch.from_numpy(b[rows]).T).square().sum(dtype=torch.float64))
            lost.append(wrong)
        return lost


def _sizes(members: list[Member], gathered: Gathered) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [in], the root of the energy of every input channel, and of its columns in the weights of `members`."""
    columns = np.zeros(members[0].weight.shape[1])
    for member in members:
        for _, _, exact in member.chunks():
            columns += np.square(exact, dtype=np.float64).sum(0)
    inputs = gathered.moments.diagonal().double().cpu().numpy()
    return np.sqrt(inputs).astype(np.float32), np.sqrt(columns).astype(np.float32)


def _values(patterns: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(cpu.values(patterns, "BF16"))


def _of_outputs(lost: list[float], members: list[Member]) -> float:
    """The mean of what is lost of each output."""
    return float(np.mean([one / of.signal if of.signal else 0.0 for one, of in zip(lost, members, strict=True)]))


def _not_smoothed(found: Found, why: str) -> Found:
    """`found`, which says so."""
    for name, of in found.roundings.items():
        found.roundings[name] = msgspec.structs.replace(of, why="; ".join(filter(None, (of.why, why))))
    return found
