"""From work to time: peak rates, and how efficiently they are used.

A GEMM takes as long as its FLOP or its bytes, whichever is longer; attention, memory traffic and exchanges follow each
other, as they do in a plan. Each takes (amount / peak rate) / efficiency. The five efficiencies are the model's only
parameters: they start from assumed values and are moved by published figures, each weighed by how sure it is (least squares of
logarithms, which is the most probable value under log-normal errors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

from fluxc.predict.gpus import Gpu
from fluxc.predict.work import Work

EXCHANGE_LATENCY = 15e-6
"""Seconds an all-to-all takes however little it moves: NCCL on NVLink, assumed."""
KERNEL_GAP = 1e-6
"""Seconds between two kernels of a CUDA graph, assumed."""


@dataclass(frozen=True)
class Efficiency:
    """What part of peak rates is reached: of GEMMs in FP4 and in other formats, of bf16 GEMMs by attention, of memory
    and of the link between GPUs."""

    nvfp4: float
    other_gemms: float
    attention: float
    memory: float
    link: float


ASSUMED = Efficiency(nvfp4=0.50, other_gemms=0.65, attention=0.55, memory=0.75, link=0.70)
DOUBT = Efficiency(nvfp4=0.30, other_gemms=0.20, attention=0.20, memory=0.10, link=0.20)
"""Standard deviations of the logarithms of ASSUMED."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one denoising step of one rank, and of its parts."""

    gemms: float
    attention: float
    memory: float
    exchanges: float
    launches: float

    @property
    def seconds(self) -> float:
        return sum(astuple(self))


class Point(Protocol):
    """A published figure, what the model says of it, and the standard deviation of its logarithm."""

    @property
    def published(self) -> float: ...

    @property
    def doubt(self) -> float: ...

    def predicted(self, efficiency: Efficiency) -> float: ...


def step_time(work: Work, gpu: Gpu, efficiency: Efficiency) -> StepTime:
    """How long `work`, in formats that `gpu` multiplies, takes on it with this `efficiency`."""
    memory = gpu.memory_bandwidth * efficiency.memory

    def seconds(format: str, flop: float, nbytes: float) -> float:
        reached = efficiency.nvfp4 if format == "nvfp4" else efficiency.other_gemms
        return max(flop / (gpu.gemms[format] * reached), nbytes / memory)

    return StepTime(
        gemms=sum(p.count * seconds(p.format, p.flop, p.nbytes) for p in work.gemms),
        attention=work.attention_flop / (gpu.gemms["bf16"] * efficiency.attention),
        memory=work.moved_bytes / memory,
        exchanges=work.sent_bytes / (gpu.link_bandwidth * efficiency.link) + work.exchanges * EXCHANGE_LATENCY,
        launches=work.kernels * KERNEL_GAP,
    )


def fit(points: Sequence[Point]) -> Efficiency:
    """The efficiency that agrees best with `points` and with what is assumed; without points, what is assumed."""
    import numpy as np
    from scipy.optimize import least_squares

    centre, doubt = np.log(astuple(ASSUMED)), np.array(astuple(DOUBT))

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        efficiency = Efficiency(*np.exp(logarithms))
        missed = [math.log(p.predicted(efficiency) / p.published) / p.doubt for p in points]
        return np.concatenate([(logarithms - centre) / doubt, missed])

    found = least_squares(residuals, centre, bounds=(-np.inf, 0.0), xtol=1e-10, ftol=1e-10)
    return Efficiency(*(float(value) for value in np.exp(found.x)))
