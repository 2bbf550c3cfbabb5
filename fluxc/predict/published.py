"""Published times of FLUX.2-dev at 1024x1024 with 50 steps, which the model is calibrated on and held against.

None of them is of fluxc's own engines: no time of a FLUX.2 NVFP4 plan has been published. They are of TensorRT-LLM VisualGen,
of torch, and of TensorRT in bf16. Those of whole images have text encoding and the VAE in them, which the model has not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.published import DEV
from fluxc.predict.gpus import GPUS
from fluxc.predict.rates import Efficiency, fit, step_time
from fluxc.predict.work import Work, work_of
from fluxc.quantize.plan import precision_plan
from fluxc.recipe.structs import ComponentPrecision, Format
from fluxc.targets.sharding import shards_of

STEPS, SKIPPED = 50, 16
TEXT_TOKENS, IMAGE_TOKENS, SIZE = 512, 4096, (1024, 1024)


@dataclass(frozen=True)
class Published:
    """A published figure (`unit`: s, or x for a ratio of two times) and where it was read; `formula` is the model's."""

    what: str
    published: float
    unit: str
    source: str
    formula: Callable[[Efficiency], float]
    doubt: float = 0.08

    def predicted(self, efficiency: Efficiency) -> float:
        return self.formula(efficiency)


@dataclass(frozen=True)
class Checked:
    """A point with what the model says of it, calibrated on all points and on all others."""

    point: Published
    predicted: float
    without: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is 10 % too slow, or for a ratio too large."""
        return self.predicted / self.point.published - 1

    @property
    def error_without(self) -> float:
        """The error of what was said without having seen the point."""
        return self.without / self.point.published - 1


@cache
def dev_work(format: Format, ranks: int, preset: str | None = None) -> Work:
    """A step of dev on one of `ranks` GPUs, its layers in `format` but those the preset keeps."""
    dev = Flux2Transformer.read(DEV)
    plan = precision_plan("transformer", dev.linears, ComponentPrecision(default=format, preset=preset))
    return work_of(dev, plan, shards_of(ranks, SIZE, IMAGE_TOKENS, dev, TEXT_TOKENS, 1, 2), 1)


def _step(gpu: str, format: Format, ranks: int = 1, preset: str | None = None) -> Callable[[Efficiency], float]:
    return lambda efficiency: step_time(dev_work(format, ranks, preset), GPUS[gpu], efficiency).seconds


def _image(step: Callable[[Efficiency], float], steps: int = STEPS) -> Callable[[Efficiency], float]:
    return lambda efficiency: steps * step(efficiency)


def _ratio(slow: Callable[[Efficiency], float], fast: Callable[[Efficiency], float]) -> Callable[[Efficiency], float]:
    return lambda efficiency: slow(efficiency) / fast(efficiency)


_H200, _B200 = _image(_step("h200", "bf16")), _image(_step("b200", "bf16"))
_BLOG = "NVIDIA developer blog, Scaling NVFP4 Inference for FLUX.2, 22 January 2026"
_PR = "TensorRT-LLM #12548, VisualGen"
_ULYSSES = "read in 2026, torch; bf16 inferred"
_GB300 = "TensorRT-Model-Connect's trackers, 2026"

POINTS = (
    Published("B200, NVFP4", 5.60, "s", _PR, _image(_step("b200", "nvfp4", 1, "modelopt-flux2")), 0.04),
    Published("4 B200, Ulysses, bf16", 3.61, "s", _ULYSSES, _image(_step("b200", "bf16", 4))),
    Published("4 H200, Ulysses, bf16", 6.94, "s", _ULYSSES, _image(_step("h200", "bf16", 4))),
    Published("GB300, bf16, torch.compile, a step", 0.185, "s", _GB300, _step("gb300", "bf16")),
    Published("GB300, bf16, TensorRT, a step", 0.211, "s", _GB300, _step("gb300", "bf16")),
    Published("B200 against H200, bf16", 1.7, "x", _BLOG, _ratio(_H200, _B200)),
    Published(
        f"B200 NVFP4, {SKIPPED} of {STEPS} steps skipped, against H200 bf16",
        6.3,
        "x",
        _BLOG,
        _ratio(_H200, _image(_step("b200", "nvfp4", 1, "nvidia-blog"), STEPS - SKIPPED)),
    ),
    Published(
        "the same on 2 B200",
        10.2,
        "x",
        _BLOG,
        _ratio(_H200, _image(_step("b200", "nvfp4", 2, "nvidia-blog"), STEPS - SKIPPED)),
    ),
)

CALIBRATED_ON = tuple(GPUS[name].name for name in ("h200", "b200", "gb300"))

TEACACHE = Published(
    "B200, NVFP4, TeaCache at 0.2", 2.20, "s", _PR, _image(_step("b200", "nvfp4", 1, "modelopt-flux2"))
)
"""A run whose number of computed steps was not published: it says how many there were, so it can neither fit nor test."""


@cache
def calibrated() -> Efficiency:
    """The efficiency that agrees best with every published point."""
    return fit(POINTS)


@cache
def checked() -> tuple[Checked, ...]:
    """Every published point against the model, calibrated on all and on all others."""
    efficiency = calibrated()
    return tuple(
        Checked(point, point.predicted(efficiency), point.predicted(fit([p for p in POINTS if p is not point])))
        for point in POINTS
    )


def steps_computed_with_teacache() -> float:
    """How many steps the model says the run with TeaCache computed, if a skipped one takes no time."""
    return TEACACHE.published / TEACACHE.predicted(calibrated()) * STEPS
