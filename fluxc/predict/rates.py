"""From work to time: peak rates, and what share of them is reached.

A product takes as long as its operations or its bytes, whichever is longer; attention, memory traffic and exchanges follow each
other, as they do in a plan. Each takes (amount / peak rate) / share. The five shares are the model's only parameters: they
start from assumed values and are moved by published figures, each weighed by how sure it is
(least squares of logarithms, which is the most probable value under log-normal errors).
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
class Reached:
    """Shares of peak rates that are reached: of products in FP4 and in other formats, of bf16 products by attention, of memory
    and of the link between GPUs."""

    nvfp4: float
    other_products: float
    attention: float
    memory: float
    link: float


ASSUMED = Reached(nvfp4=0.50, other_products=0.65, attention=0.55, memory=0.75, link=0.70)
DOUBT = Reached(nvfp4=0.30, other_products=0.20, attention=0.20, memory=0.10, link=0.20)
"""Standard deviations of the logarithms of ASSUMED."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one denoising step of one rank, and of its parts."""

    products: float
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

    def predicted(self, shares: Reached) -> float: ...


def step_time(work: Work, gpu: Gpu, shares: Reached) -> StepTime:
    """How long `work`, in formats that `gpu` multiplies, takes on it at these shares of its peak rates."""
    memory = gpu.memory_rate * shares.memory

    def seconds(format: str, operations: float, nbytes: float) -> float:
        share = shares.nvfp4 if format == "nvfp4" else shares.other_products
        return max(operations / (gpu.products[format] * share), nbytes / memory)

    return StepTime(
        products=sum(p.count * seconds(p.format, p.operations, p.nbytes) for p in work.products),
        attention=work.attention_operations / (gpu.products["bf16"] * shares.attention),
        memory=work.moved_bytes / memory,
        exchanges=work.sent_bytes / (gpu.link_rate * shares.link) + work.exchanges * EXCHANGE_LATENCY,
        launches=work.kernels * KERNEL_GAP,
    )


def fit(points: Sequence[Point]) -> Reached:
    """The shares that agree best with `points` and with what is assumed; without points, what is assumed."""
    import numpy as np
    from scipy.optimize import least_squares

    centre, doubt = np.log(astuple(ASSUMED)), np.array(astuple(DOUBT))

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        shares = Reached(*np.exp(logarithms))
        missed = [math.log(p.predicted(shares) / p.published) / p.doubt for p in points]
        return np.concatenate([(logarithms - centre) / doubt, missed])

    found = least_squares(residuals, centre, bounds=(-np.inf, 0.0), xtol=1e-10, ftol=1e-10)
    return Reached(*(float(value) for value in np.exp(found.x)))
