"""Measures what quantizing each fusion group does to the model's output, and chooses what stays in bf16 under a budget.

1. diffusers' pipeline generates a few calibration prompts; the transformer's inputs and outputs are kept at a few steps.
2. Each fusion group alone is quantized as the weights stage would (and its inputs rounded, if a target rounds them), the
   same inputs are run again, and the squared error of the guided velocity, relative to its energy, is the group's cost.
3. Errors of different groups are nearly independent, so costs add up: what to keep is a knapsack, solved exactly.
4. What was chosen is measured as a whole, beside quantizing everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fluxc.base.errors import BuildError
from fluxc.base.numbers import significant
from fluxc.base.progress import Report
from fluxc.base.safetensors import TensorRef
from fluxc.checkpoint.reference import Generation, generate, guided, load_pipeline
from fluxc.checkpoint.source import Checkpoint
from fluxc.formats import cpu
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxc.recipe.structs import Budget, Scales

PROMPTS, STEPS = 4, 4
SEARCHES = 8


@dataclass(frozen=True)
class State:
    """One step of one image: the transformer's arguments for each guidance branch, and the guided velocity it gave."""

    arguments: list[dict[str, Any]]
    velocity: torch.Tensor


@dataclass(frozen=True)
class GroupCost:
    """A fusion group's layers, their parameters, and the relative squared error of the velocity when it alone is quantized."""

    layers: tuple[str, ...]
    parameters: int
    cost: float


def record_states(
    pipeline: Any, checkpoint: Checkpoint, prompts: list[str], generation: Generation, branches: int
) -> list[State]:
    """STEPS evenly spaced steps of PROMPTS evenly spaced prompts."""
    wanted = _evenly(generation.steps, STEPS)
    states: list[State] = []
    for number in _evenly(len(prompts), PROMPTS):
        calls: list[tuple[dict[str, Any], torch.Tensor]] = []

        def keep(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any, calls: list = calls) -> None:
            calls.append((dict(kwargs), output[0].detach().clone()))

        handle = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                generate(pipeline, checkpoint, prompts[number], generation.of_prompt(number))
        finally:
            handle.remove()
        for step in wanted:
            passes = calls[step * branches : (step + 1) * branches]
            states.append(State([a for a, _ in passes], guided([v for _, v in passes], generation.guidance)))
    return states


def output_error(model: torch.nn.Module, states: list[State], guidance: float) -> float:
    """Mean over `states` of |v - reference|^2 / |reference|^2, v being the guided velocity that `model` now gives."""
    errors = []
    with torch.no_grad():
        for state in states:
            velocity = guided([model(**arguments)[0] for arguments in state.arguments], guidance)
            reference = state.velocity.double()
            errors.append((velocity.double() - reference).square().sum() / reference.square().sum())
        # Read together: the GPU is waited for once.
        return float(np.mean(torch.stack(errors).cpu().numpy()))


@dataclass(frozen=True)
class Simulation:
    """How quantized layers compute: from the checkpoint's `tensors`, and with rounded inputs or not."""

    tensors: dict[str, TensorRef]
    input_amax: dict[str, float]
    scales: Scales
    round_inputs: bool

    @contextmanager
    def of(self, model: torch.nn.Module, entries: list[LayerPlan]) -> Iterator[None]:
        """`model` with the Linears of `entries` computing as their planned format does; whole fusion groups only.

        Weights are quantized from the checkpoint, and restored from there.
        """
        groups: dict[str, list[LayerPlan]] = {}
        for entry in entries:
            groups.setdefault(entry.layer.group or entry.layer.name, []).append(entry)
        handles = []
        try:
            for members in groups.values():
                for entry, rounded in zip(members, self._rounded(members), strict=True):
                    module = model.get_submodule(entry.layer.name)
                    weight = module.get_parameter("weight")
                    weight.data.copy_(torch.from_numpy(rounded))
                    if self.round_inputs and FORMATS[entry.format].calibrated:
                        handles.append(module.register_forward_pre_hook(self._rounding(entry, weight.device)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for entry in entries:
                exact = cpu.values(*self._weight(entry))
                model.get_submodule(entry.layer.name).get_parameter("weight").data.copy_(torch.from_numpy(exact))

    def _weight(self, entry: LayerPlan) -> tuple[np.ndarray, str]:
        ref = self.tensors[f"{entry.layer.name}.weight"]
        return cpu.patterns_in(ref), ref.dtype

    def _rounded(self, members: list[LayerPlan]) -> list[np.ndarray]:
        """fp32 weights of one fusion group after a round trip through their format, as the writer stores them."""
        format, weights = FORMATS[members[0].format], [self._weight(entry) for entry in members]
        amaxes = [format.amaxes(*weight) for weight in weights]
        amax = max(cpu.largest(found, dtype) for found, (_, dtype) in zip(amaxes, weights, strict=True))
        scale = format.group_scale(weights, amax, self.scales)
        return [
            format.decode(format.encode(*weight, found, scale, self.scales), scale)
            for weight, found in zip(weights, amaxes, strict=True)
        ]

    def _rounding(self, entry: LayerPlan, device: torch.device) -> Callable[[Any, Any], Any]:
        format = FORMATS[entry.format]
        scale = format.tensor_scale(torch.tensor(self.input_amax[entry.layer.name])).to(device)

        def rounded(_: Any, inputs: Any) -> Any:
            x = inputs[0]
            return (format.fake_quantize(x, scale).to(x.dtype), *inputs[1:])

        return rounded


def choose(costs: list[GroupCost], parameters: int) -> list[int]:
    """The groups of `costs` to keep, at most `parameters` in all, whose costs add up to the most: a 0/1 knapsack."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not costs or sum(group.parameters for group in costs) <= parameters:
        return list(range(len(costs)))
    gains = np.array([group.cost for group in costs])
    sizes = np.array([group.parameters for group in costs], float)
    # Scaled, because the solver's tolerances are absolute.
    result = milp(
        -gains / gains.max(initial=1e-30),
        constraints=LinearConstraint(sizes / sizes.max(), ub=parameters / sizes.max()),
        bounds=Bounds(0, 1),
        integrality=np.ones(len(costs)),
    )
    if result.x is None:
        raise BuildError(f"exclude: auto: scipy found no choice of layers: {result.message}")
    return [i for i, kept in enumerate(result.x) if kept > 0.5]


ErrorOf = Callable[[list[LayerPlan]], float]
"""The relative squared error of the velocity with these layers quantized."""


def prepare(
    checkpoint: Checkpoint,
    prompts: list[str],
    generation: Generation,
    branches: int,
    dtype: torch.dtype,
    simulation: Simulation,
) -> ErrorOf:
    """The model with the states it is measured at, on the GPU if there is one with room for it."""
    pipeline = load_pipeline(checkpoint, dtype)
    pipeline.to(_device(pipeline))
    model = pipeline.transformer
    states = record_states(pipeline, checkpoint, prompts, generation, branches)

    def error(entries: list[LayerPlan]) -> float:
        with simulation.of(model, entries):
            return output_error(model, states, generation.guidance)

    return error


def measure_costs(error: ErrorOf, plan: list[LayerPlan], on_progress: Report | None = None) -> list[GroupCost]:
    """The cost of every fusion group; only the layers that `plan` quantizes are candidates."""
    groups: dict[str, list[LayerPlan]] = {}
    for entry in to_quantize(plan):
        groups.setdefault(entry.layer.group or entry.layer.name, []).append(entry)
    costs = []
    for number, members in enumerate(groups.values()):
        layers = tuple(entry.layer.name for entry in members)
        costs.append(GroupCost(layers, sum(entry.parameters for entry in members), error(members)))
        if on_progress:
            on_progress(number + 1, len(groups), f"{number + 1}/{len(groups)} groups")
    return costs


def choose_layers(error: ErrorOf, plan: list[LayerPlan], costs: list[GroupCost], budget: Budget) -> dict[str, Any]:
    """Which groups are kept, and the errors measured as a whole: the part of `sensitivity.json` that the budget decides."""
    every = to_quantize(plan)
    total = sum(entry.parameters for entry in plan)

    def error_without(kept: list[int]) -> float:
        left = {name for i in kept for name in costs[i].layers}
        return error([entry for entry in every if entry.layer.name not in left])

    kept = _within(budget, costs, total, error_without)
    ranked = sorted(range(len(costs)), key=lambda i: (-costs[i].cost / costs[i].parameters, costs[i].layers))
    return {
        "share_kept": sum(costs[i].parameters for i in kept) / total,
        "error_all_quantized": _root(error(every)),
        "error": _root(error_without(kept)),
        "ranking": [
            {
                "layers": list(costs[i].layers),
                "parameters": costs[i].parameters,
                "error_alone": _root(costs[i].cost),
                "kept": i in kept,
            }
            for i in ranked
        ],
    }


def measured_on(prompts: int, steps: int) -> dict[str, Any]:
    """How many prompts, and which steps, `record_states` takes of so many."""
    return {"prompts": len(_evenly(prompts, PROMPTS)), "steps": _evenly(steps, STEPS)}


def _root(squared: float) -> float:
    """Four digits are what two machines agree on."""
    return significant(float(np.sqrt(squared)))


def _within(budget: Budget, costs: list[GroupCost], total: int, error: Callable[[list[int]], float]) -> list[int]:
    """What to keep: the best choice of at most `budget.share` of the parameters, or the smallest that meets `budget.error`."""
    if budget.share is not None:
        return choose(costs, int(budget.share * total))
    allowed = float(budget.error or 0) ** 2
    kept: list[int] = []
    if error(kept) <= allowed:
        return kept
    low, high = 0.0, 1.0
    kept = list(range(len(costs)))
    for _ in range(SEARCHES):
        middle = (low + high) / 2
        candidate = choose(costs, int(middle * total))
        if error(candidate) <= allowed:
            kept, high = candidate, middle
        else:
            low = middle
    return kept


def _evenly(count: int, wanted: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted)).round()})


def _device(pipeline: Any) -> str:
    if not torch.cuda.is_available():
        return "cpu"
    needed = sum(
        tensor.nbytes
        for name in ("transformer", "text_encoder", "vae")
        for tensor in getattr(pipeline, name).parameters()
    )
    return "cuda" if needed < 0.7 * torch.cuda.mem_get_info()[0] else "cpu"
