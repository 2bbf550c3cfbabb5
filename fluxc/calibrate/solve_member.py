"""What the Linears of one fusion group are solved from: their weights, and what was gathered of their common input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from fluxc.calibrate.solve_needs import CHUNK
from fluxc.formats import cpu
from fluxc.formats.base import Format, Parts
from fluxc.quantize.plan import LayerPlan
from fluxc.quantize.solved import Rounding
from fluxc.recipe.structs import Scales

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
class Member:
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
        return decibels(self.signal, self.nearest)

    def smoothed(self, smoothing: np.ndarray, format: Format) -> Member:
        """W / p, in fp32."""
        weight = np.empty(self.weight.shape, np.float32)
        for rows, _, exact in self.chunks():
            np.divide(exact, smoothing, out=weight[rows])
        patterns = weight.view(np.uint32)
        return Member(self.name, patterns, "F32", format.amaxes(patterns, "F32"))

    def rounding(self, method: str, damping: float | None, lost: float, low_rank: int = 0) -> Rounding:
        """That of the layer where its output's error on inputs held out is `lost`."""
        return Rounding(method, damping, decibels(self.signal, lost), self.nearest_snr, low_rank=low_rank)


@dataclass(frozen=True)
class Gathered:
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

    def smoothed(self, smoothing: np.ndarray, noise: torch.Tensor) -> Gathered:
        """The same of inputs times p, in the place of these; `noise` is what rounding makes wrong of those."""
        factor = torch.from_numpy(smoothing).to(self.moments.device)
        moments = self.moments.mul_(factor[:, None]).mul_(factor)
        return Gathered(moments, self.rows * smoothing, noise)


def scale_of(format: Format, members: list[Member], scales: Scales) -> np.float32:
    """The tensor scale that the weights of a group share where they are encoded as they are."""
    amax = max(cpu.largest(member.amaxes, member.dtype) for member in members)
    return format.group_scale([(member.weight, member.dtype) for member in members], amax, scales)


def energy_of(rows: np.ndarray, weight: np.ndarray) -> float:
    """The sum of squares of rows @ weight.T."""
    return float((torch.from_numpy(rows) @ torch.from_numpy(weight).T).square().sum(dtype=torch.float64))


def decibels(signal: float, noise: float | None) -> float | None:
    """Of a signal and what is wrong in it, both as sums of squares; None where there is no such ratio."""
    if not noise or not signal or not math.isfinite(noise + signal):
        return None
    return round(10 * math.log10(signal / noise), 2)
