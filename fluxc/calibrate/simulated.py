"""The model that will run, in torch: weights as this build rounds them, and inputs as a GPU rounds them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fluxc.base.cache import Made
from fluxc.checkpoint.source import Checkpoint
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxc.recipe.structs import Calibration, Scales
from fluxrt.stepprecision import StepPrecision

if TYPE_CHECKING:
    from fluxc.calibrate.sensitivity import Simulation
    from fluxc.running.model import PlacedModel


@dataclass(frozen=True)
class Rounded:
    """How the quantized layers of a component compute.

    `calibration` is the file that says the ranges of inputs by `settings`; `assumed` are ranges by layer where no model was
    run. Neither is needed where inputs are not rounded. `solved`: the folder of weights that were solved, where some were.
    `steps`: where inputs of some layers are left as they are at some steps, which.
    """

    plan: list[LayerPlan]
    scales: Scales
    round_inputs: bool
    calibration: Path | None = None
    settings: Calibration | None = None
    assumed: dict[str, float] = field(default_factory=dict)
    solved: Made | None = None
    steps: StepPrecision | None = None

    @property
    def layers(self) -> list[LayerPlan]:
        """The layers that compute otherwise than the checkpoint's own model: of those that the checkpoint holds quantized,
        whose weights are what they are, the ones whose inputs are rounded."""
        return [entry for entry in self.plan if to_quantize([entry]) or self._rounds_stored(entry)]

    @property
    def rounding_inputs(self) -> list[LayerPlan]:
        """The layers whose inputs are rounded."""
        return [entry for entry in self.layers if self.round_inputs and FORMATS[entry.format].calibrated]

    def _rounds_stored(self, entry: LayerPlan) -> bool:
        return self.round_inputs and entry.quantized_in_source and FORMATS[entry.format].calibrated

    def identity(self) -> list[Any]:
        """Equal only where layers compute alike, in values that JSON has."""
        ranges = "" if self.calibration is None else _hash(self.calibration)
        settings = [getattr(self.settings, name, None) for name in ("amax", "percentile", "margin")]
        solved = self.solved.fingerprint() if self.solved else None
        layers = [entry.fingerprint() for entry in self.layers]
        steps = msgspec.to_builtins(self.steps)
        return [layers, self.scales, self.round_inputs, ranges, settings, self.assumed, solved, steps]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rounding_bytes(layers: list[LayerPlan]) -> int:
    """What rounding weights in memory takes besides: the largest of them in fp32, twice while it is unfolded."""
    return 8 * max((entry.parameters for entry in to_quantize(layers)), default=0)


def simulation_of(
    checkpoint: Checkpoint,
    component: str,
    rounded: Rounded,
    formats: tuple[str, ...] = (),
    passes: tuple[int, int] | None = None,
) -> Simulation:
    """How the layers of a component's plan compute, in its formats or in any of `formats`; `passes` are the steps of an image
    and the passes of a step, where images are generated."""
    from fluxc.calibrate.amax import input_amax
    from fluxc.calibrate.file import read_calibration
    from fluxc.calibrate.sensitivity import Schedule, Simulation
    from fluxc.quantize.solved import Solved

    plan, solved = rounded.plan, Solved(rounded.solved.folder) if rounded.solved else None
    smoothing = solved.smoothing if solved else None
    format_of = {entry.layer.name: entry.format for entry in plan}
    amax = {(layer, format_of[layer]): value for layer, value in rounded.assumed.items()}
    if rounded.calibration is not None and rounded.settings is not None:
        records = read_calibration(rounded.calibration).records[component]
        for other in (plan, *([replace(entry, format=name) for entry in to_quantize(plan)] for name in formats)):
            format_of = {entry.layer.name: entry.format for entry in other}
            found = input_amax(records, other, rounded.settings, smoothing)
            amax |= {(layer, format_of[layer]): value for layer, value in found.items()}
    tensors = checkpoint.components[component].tensors
    schedule = Schedule(rounded.steps, *passes) if rounded.steps and passes else None
    return Simulation(tensors, amax, rounded.scales, rounded.round_inputs, solved, schedule=schedule)


def simulated(
    checkpoint: Checkpoint,
    component: str,
    placed: PlacedModel,
    rounded: Mapping[str, Rounded],
    passes: tuple[int, int] | None = None,
) -> AbstractContextManager[None]:
    """While the body runs, the component `placed` computes as `rounded` says, by component; of one it lacks, as it is. `passes`
    as for simulation_of."""
    how = rounded.get(component)
    if how is None:
        return nullcontext()
    return simulation_of(checkpoint, component, how, (), passes).of(placed, how.layers)
