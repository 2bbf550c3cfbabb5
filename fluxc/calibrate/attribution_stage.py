"""The stage of `fidelity.attribution`: what weights, rounded inputs and the text encoder each do to the velocity, alone.

Measured in torch, on the states that `exclude: auto` measures on: a few steps of a few calibration prompts, with diffusers' own
latents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxc.base.numbers import as_json, significant
from fluxc.base.progress import Report
from fluxc.calibrate.costs_stage import CostInputs, rounded_of
from fluxc.calibrate.simulated import simulated, simulation_of
from fluxc.calibrate.states import PROMPTS, evenly, measured_on

if TYPE_CHECKING:
    import torch

    from fluxc.calibrate.sensitivity import State

RESULT = "attribution.json"
CAUSES = {
    "weights": (True, False, False),
    "inputs": (False, True, False),
    "text encoder": (False, False, True),
    "all": (True, True, True),
}
"""Whether the transformer's weights are rounded, its layers' inputs, and whether the text encoder is quantized."""


@dataclass(frozen=True)
class AttributionInputs:
    """What measuring the transformer depends on, and the same of the text encoder."""

    transformer: CostInputs
    text_encoder: CostInputs


def run(inputs: AttributionInputs, folder: Path, report: Report) -> None:
    """Write the relative error of each cause alone, and of all together, as JSON; of what is not quantized none."""
    import torch

    from fluxc.calibrate.sensitivity import record_states, state_errors
    from fluxc.calibrate.stage import asked_of, generation_of
    from fluxc.running.model import ReferenceModel
    from fluxc.running.placement import find_placement

    measured, request = inputs.transformer, inputs.transformer.request
    checkpoint, generation = measured.files.checkpoint, generation_of(request, measured.text_layers)
    placement = find_placement(checkpoint, "auto", getattr(torch, measured.dtype), asked_of(request, measured.rows))
    model, numbers = ReferenceModel(checkpoint, placement), evenly(len(request["prompts"]), PROMPTS)
    texts = [request["prompts"][number] for number in numbers] + ([""] if measured.rows == 2 else [])
    layers, text = rounded_of(measured).layers, rounded_of(inputs.text_encoder)
    with model.component("text_encoder", generation.text_layers) as encoder:
        exact = model.encode(encoder, texts, generation)
        with simulated(checkpoint, "text_encoder", encoder, {"text_encoder": text}):
            quantized = model.encode(encoder, texts, generation)
    empty = exact[-1] if measured.rows == 2 else None
    simulation, errors = simulation_of(checkpoint, "transformer", rounded_of(measured)), {}
    with model.component("transformer") as transformer:
        generations = [generation.of_prompt(number) for number in numbers]
        states = record_states(model, transformer, exact[: len(numbers)], empty, generations)
        for done, (cause, (weights, rounded, of_text)) in enumerate(CAUSES.items(), start=1):
            how = replace(simulation, round_weights=weights, round_inputs=rounded)
            with how.of(transformer, layers if weights or rounded else []):
                given = [_with_texts(state, exact, quantized) for state in states] if of_text else states
                error = float(state_errors(transformer, given, generation.guidance).mean())
            errors[cause] = significant(error**0.5)
            report(done, len(CAUSES), f"{done}/{len(CAUSES)} causes")
    on = measured_on(len(request["prompts"]), request["steps"])
    (folder / RESULT).write_text(as_json({**on, "errors": errors}, "attribution", indent=1) + "\n")


def _with_texts(state: State, exact: list[torch.Tensor], quantized: list[torch.Tensor]) -> State:
    """The state with the quantized embeddings in place of the exact ones."""
    import torch

    def other(given: torch.Tensor) -> torch.Tensor:
        return next(new for old, new in zip(exact, quantized, strict=True) if torch.equal(old, given))

    arguments = [of | {"encoder_hidden_states": other(of["encoder_hidden_states"])} for of in state.arguments]
    return replace(state, arguments=arguments)


def load(folder: Path) -> dict[str, Any]:
    """What was measured."""
    found: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return found
