"""Measures what quantizing layers does to the model's output.

1. diffusers generates a few calibration prompts; the transformer's inputs and outputs are kept at a few steps.
2. Layers are quantized as the weights stage would (and their inputs rounded, if a target rounds them), the same inputs are run
   again, and the error is the square of how far the guided velocity is off, relative to its energy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from fluxc.base.safetensors import TensorRef
from fluxc.calibrate.states import PROMPTS, STEPS, evenly
from fluxc.checkpoint.dequantized import read
from fluxc.checkpoint.reference import Generation, guided
from fluxc.checkpoint.source import Checkpoint
from fluxc.formats import cpu
from fluxc.formats.base import Format
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, fusion_groups, to_quantize
from fluxc.quantize.solved import Layer, Solved
from fluxc.recipe.structs import Scales
from fluxc.running.lockstep import CALL
from fluxc.running.model import PlacedModel, ReferenceModel
from fluxc.running.placement import Placement
from fluxc.running.skipping import reusing
from fluxrt.stepprecision import StepPrecision


@dataclass(frozen=True)
class State:
    """One step of one image: the transformer's arguments for each guidance branch, and the guided velocity it gave."""

    arguments: list[dict[str, Any]]
    velocity: torch.Tensor


def record_states(
    model: ReferenceModel,
    transformer: PlacedModel,
    texts: list[torch.Tensor],
    empty: torch.Tensor | None,
    generations: list[Generation],
    wanted: Sequence[int] | None = None,
) -> list[State]:
    """The steps `wanted`, or else STEPS evenly spaced ones, of the image of each of `texts`, one image's after the other's;
    `empty` as for ReferenceModel.denoise."""
    branches, guidance = 1 if empty is None else 2, generations[0].guidance
    wanted = evenly(generations[0].steps, STEPS) if wanted is None else wanted
    calls: list[list[tuple[dict[str, Any], torch.Tensor]]] = [[] for _ in texts]
    passes = [0] * len(texts)

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        number = CALL.get()
        if passes[number] // branches in wanted:
            calls[number].append((dict(kwargs), output[0].detach().clone()))
        passes[number] += 1

    handle = transformer.module.register_forward_hook(keep, with_kwargs=True)
    try:
        model.denoise(transformer, texts, empty, generations)
    finally:
        handle.remove()
    return [
        State([a for a, _ in kept[at : at + branches]], guided([v for _, v in kept[at : at + branches]], guidance))
        for kept in calls
        for at in range(0, len(kept), branches)
    ]


Velocities = Callable[[list[dict[str, Any]]], list[torch.Tensor]]
"""What a transformer makes of each of these arguments."""


def velocities_of(transformer: PlacedModel, sources: Sequence[int] | None = None) -> Velocities:
    """Those of `transformer`, as it then is; with `sources` each of as many calls skips its blocks as `reusing` says."""

    def velocity(arguments: dict[str, Any]) -> torch.Tensor:
        found: torch.Tensor = transformer.module(**arguments)[0]
        return found

    def velocities(listed: list[dict[str, Any]]) -> list[torch.Tensor]:
        with nullcontext() if sources is None else reusing(transformer.module, sources):
            return transformer.run([partial(velocity, arguments) for arguments in listed])

    return velocities


def state_errors(
    transformer: PlacedModel, states: list[State], guidance: float, sources: Sequence[int] | None = None
) -> np.ndarray:
    """The `output_errors` of `transformer`. With `sources` state number i takes what the blocks added in state `sources[i]`: in
    itself, or in an earlier one of the same image."""
    branches = len(states[0].arguments)
    of_states = range(len(states)) if sources is None else sources
    found = []
    # Layer by layer all calls of a run are on their way together.
    for part in _runs(of_states, PROMPTS if transformer.reads_layers else len(states)):
        calls = [(at - part.start) * branches + branch for at in of_states[part] for branch in range(branches)]
        velocities = velocities_of(transformer, None if sources is None else calls)
        found.append(output_errors(velocities, states[part], guidance))
    together: np.ndarray = np.concatenate(found)
    return together


def _runs(sources: Sequence[int], count: int) -> Iterator[slice]:
    """States in order, about `count` at a time, each with the one that it takes from."""
    first = 0
    for at in range(1, len(sources) + 1):
        if at == len(sources) or (at - first >= count and sources[at] == at):
            yield slice(first, at)
            first = at


def output_errors(velocities: Velocities, states: list[State], guidance: float) -> np.ndarray:
    """Of each of `states` |v - reference|^2 / |reference|^2, v being the guided velocity that the transformer now gives."""
    found = iter(velocities([arguments for state in states for arguments in state.arguments]))
    errors = []
    for state in states:
        velocity = guided([next(found) for _ in state.arguments], guidance)
        reference = state.velocity.double()
        errors.append((velocity.double() - reference).square().sum() / reference.square().sum())
    # Read together: the GPU is waited for once.
    together: np.ndarray = torch.stack(errors).cpu().numpy()
    return together


@dataclass(frozen=True)
class Schedule:
    """Which body each of `steps` steps of an image runs, of `passes` of the model each."""

    precision: StepPrecision
    steps: int
    passes: int


class _Exact:
    """Which layers get their inputs as they are at the step that an image is at; images come one after the other, each of all
    steps."""

    def __init__(self, schedule: Schedule | None) -> None:
        self._schedule, self._passes = schedule, Counter[int]()

    def count(self, _module: Any, _args: Any) -> None:
        """A pass of the model begins."""
        if self._schedule:
            self._passes[CALL.get()] += 1

    def now(self, layer: str) -> bool:
        """Whether `layer` gets its inputs as they are."""
        if self._schedule is None:
            return False
        steps, precision = self._schedule.steps, self._schedule.precision
        step = (self._passes[CALL.get()] - 1) // self._schedule.passes % steps
        body = precision.bodies.get(precision.body(step, steps))
        return body is not None and layer in body.layers


@dataclass(frozen=True)
class Simulation:
    """How quantized layers compute: from the checkpoint's `tensors`, with rounded inputs or not, and rounded weights or not.

    `input_amax` is by layer and format. Layers that are among the `solved`, in the format they were solved in or one with the
    same weights, compute with what was solved. At the steps of a `schedule` some layers get their inputs as they are.
    """

    tensors: dict[str, TensorRef]
    input_amax: dict[tuple[str, str], float]
    scales: Scales
    round_inputs: bool
    solved: Solved | None = None
    round_weights: bool = True
    schedule: Schedule | None = None

    @contextmanager
    def of(self, transformer: PlacedModel, entries: list[LayerPlan]) -> Iterator[None]:
        """`transformer` with the Linears of `entries` computing as their planned format does; whole fusion groups only.

        Weights are quantized from the checkpoint; those that stay in memory are restored from there. Those that are read for
        every run are quantized whenever they were read. What the checkpoint holds quantized keeps its weights and the scales
        of its inputs.
        """
        model, groups = transformer.module, fusion_groups(to_quantize(entries)) if self.round_weights else []
        handles: list[Any] = []
        at_step = _Exact(self.schedule)
        if self.round_inputs:
            handles.append(model.register_forward_pre_hook(at_step.count))
            for entry in entries:
                module = model.get_submodule(entry.layer.name)
                if not FORMATS[entry.format].calibrated:
                    continue
                if entry.quantized_in_source:
                    handles += self._rounding_as_stored(entry, module, at_step)
                else:
                    handles += self._round_inputs(entry, module, at_step)
        try:
            if transformer.reads_layers:
                transformer.on_load = lambda part, _: self._quantize(model, groups, part)
            else:
                self._quantize(model, groups)
            yield
        finally:
            transformer.on_load = None
            for handle in handles:
                handle.remove()
            for entry in [] if transformer.reads_layers else [entry for members in groups for entry in members]:
                exact = cpu.values(*self._weight(entry))
                model.get_submodule(entry.layer.name).get_parameter("weight").data.copy_(torch.from_numpy(exact))

    def _quantize(self, model: torch.nn.Module, groups: list[list[LayerPlan]], part: str | None = None) -> None:
        """Put rounded weights in place, of one part of the model or of all."""
        for members in groups:
            if part is None or f"{members[0].layer.name}.".startswith(f"{part}."):
                for entry, rounded in zip(members, self._rounded(members), strict=True):
                    weight = model.get_submodule(entry.layer.name).get_parameter("weight")
                    weight.data.copy_(torch.from_numpy(rounded))

    def _weight(self, entry: LayerPlan) -> tuple[np.ndarray, str]:
        ref = self.tensors[f"{entry.layer.name}.weight"]
        return cpu.patterns_in(ref), ref.dtype

    def _rounded(self, members: list[LayerPlan]) -> Iterator[np.ndarray]:
        """fp32 weights of one fusion group after a round trip through their format, as the writer stores them; one at a
        time."""
        format, weights = FORMATS[members[0].format], [self._weight(entry) for entry in members]
        amaxes = [format.amaxes(*weight) for weight in weights]
        amax = max(cpu.largest(found, dtype) for found, (_, dtype) in zip(amaxes, weights, strict=True))
        scale = format.group_scale(weights, amax, self.scales)
        for entry, weight, found in zip(members, weights, amaxes, strict=True):
            layer = self._solved(entry)
            if layer is None:
                parts = format.encode(*weight, found, scale, self.scales)
            else:
                parts, scale = layer.rows(0, len(weight[0]), len(weight[0])), layer.scale
            values = format.decode(parts, scale)
            factors = layer.low_rank() if layer else None
            if factors:
                values += factors[0] @ factors[1]
            if layer and (smoothing := layer.smoothing) is not None:
                values *= smoothing
            yield values

    def _solved(self, entry: LayerPlan) -> Layer | None:
        """What was solved of a layer, in its format."""
        return self.solved.layers.get(entry.layer.name) if self.solved and FORMATS[entry.format].solves else None

    def _round_inputs(self, entry: LayerPlan, linear: torch.nn.Module, at_step: _Exact) -> list[RemovableHandle]:
        """Round the layer's inputs, but not for its factors of low rank: q(x) W^T + ((x - q(x)) a^T) b^T, W with b a in it; of
        a layer that is smoothed, behind that."""
        format, solved = FORMATS[entry.format], self._solved(entry)
        scale = format.tensor_scale(torch.tensor(self.input_amax[entry.layer.name, entry.format]))
        smoothing = solved.smoothing if solved else None

        def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values = format.fake_quantize(x, scale.to(x.device)).to(x.dtype)
            return values, x - values

        behind = None if smoothing is None else _rounding_smoothed(format, scale, torch.from_numpy(smoothing))
        factors = solved.low_rank() if solved else None
        return _hooks(
            linear,
            partial(at_step.now, entry.layer.name),
            behind or rounded,
            factors and [*map(torch.from_numpy, factors)],
        )

    def _rounding_as_stored(self, entry: LayerPlan, linear: torch.nn.Module, at_step: _Exact) -> list[RemovableHandle]:
        """Hooks that round the inputs of a layer as the checkpoint holds it, on a Linear with its plain weight
        (Q + b a) * p: with x the inputs times p, Q gets them rounded and b a, SVDQuant's factors, as they are."""
        format, parts = FORMATS[entry.format], self._stored(entry)
        rounded = _rounding_smoothed(format, parts["input_scale"], parts.get("pre_quant_scale"))
        low_rank = [parts[f"svdquant_lora_{side}"] for side in "ba"] if "svdquant_lora_a" in parts else None
        return _hooks(linear, partial(at_step.now, entry.layer.name), rounded, low_rank)

    def _stored(self, entry: LayerPlan) -> dict[str, torch.Tensor]:
        """What the checkpoint holds of a quantized layer beside its weight, fp32; `input_scale` as a scalar."""
        wanted = ("input_scale", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
        parts = {
            name: read(self.tensors[f"{entry.layer.name}.{name}"]).float() for name in wanted if name in entry.parts
        }
        return parts | {"input_scale": parts["input_scale"].reshape(())}


def _rounding_smoothed(
    format: Format, scale: torch.Tensor, smoothing: torch.Tensor | None
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """What makes of inputs x, with p the `smoothing` [in] of their layer, q(x p) / p, which a weight times p gets, and
    x p - q(x p) in fp32, which its factors get."""

    def rounded(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor = None if smoothing is None else smoothing.to(given.device)
        x = given.float() if factor is None else given.float() * factor
        values = format.fake_quantize(x, scale.to(given.device))
        lost = x - values
        if factor is not None:
            values = torch.where(factor == 0, 0, values / factor)
        return values.to(given.dtype), lost

    return rounded


def _hooks(
    linear: torch.nn.Module,
    is_exact: Callable[[], bool],
    rounded: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    factors: list[torch.Tensor] | None,
) -> list[RemovableHandle]:
    """Hooks that give `linear` rounded inputs, but where `is_exact` says that they stay. `rounded` gives what the weight gets
    of inputs, and what that lacks of them, which the factors (b, a) of low rank get too."""
    lost: list[torch.Tensor | None] = []

    def before(_: Any, inputs: Any) -> Any:
        if is_exact():
            lost.append(None)
            return inputs
        values, lacks = rounded(inputs[0])
        lost.append(lacks if factors else None)
        return (values, *inputs[1:])

    def after(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        lacks = lost.pop()
        if lacks is None or factors is None:
            return output
        b, a = (factor.to(lacks) for factor in factors)
        return (output + lacks @ a.T @ b.T).to(output.dtype)

    return [linear.register_forward_pre_hook(before), linear.register_forward_hook(after)]


class ErrorsOf(Protocol):
    """What gives the errors of quantized layers."""

    def __call__(self, entries: list[LayerPlan], /, reused: Sequence[int] | None = None) -> np.ndarray:
        """[prompts, steps]: at every recorded state the relative squared error of the velocity with these layers quantized.
        With `reused` step number i of the recorded ones takes what the blocks added at number `reused[i]` of them."""
        ...


@contextmanager
def prepared(
    checkpoint: Checkpoint,
    prompts: list[str],
    generation: Generation,
    branches: int,
    placement: Placement,
    simulation: Simulation,
    wanted: Sequence[int] | None = None,
) -> Iterator[ErrorsOf]:
    """What gives the errors of quantized layers, at PROMPTS evenly spaced prompts and the steps `wanted` of each (else STEPS
    evenly spaced ones), while the body runs."""
    model, numbers = ReferenceModel(checkpoint, placement), evenly(len(prompts), PROMPTS)
    texts = [prompts[number] for number in numbers] + ([""] if branches == 2 else [])
    with model.component("text_encoder", generation.text_layers) as encoder:
        embeddings = model.encode(encoder, texts, generation)
    empty = embeddings.pop() if branches == 2 else None
    with model.component("transformer") as transformer:
        generations = [generation.of_prompt(number) for number in numbers]
        states = record_states(model, transformer, embeddings, empty, generations, wanted)
        steps = len(states) // len(numbers)

        def errors(entries: list[LayerPlan], /, reused: Sequence[int] | None = None) -> np.ndarray:
            images = range(len(numbers))
            sources = None if reused is None else [image * steps + step for image in images for step in reused]
            with simulation.of(transformer, entries):
                return state_errors(transformer, states, generation.guidance, sources).reshape(len(numbers), -1)

        yield errors
