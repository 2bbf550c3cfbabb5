"""Gates: the worst result a recipe allows, and errors that no recipe allows, because only a fault explains them.

Every stage is compared with diffusers on diffusers' own input. The text encoder, the transformer's prologue and the decoder
then differ by rounding alone, of the target's dtype, of the reference's, and of the formats their layers are stored in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fluxc.base.errors import GateError
from fluxc.base.numbers import significant
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.structs import Gates
from fluxc.recipe.targets import Target
from fluxrt.manifest import StageBound

ROUNDING = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.15}
"""The largest relative error of a stage in this dtype: ten times and more what flux2-nano has (1.1e-5, 0.0013, 0.011), since
larger models have more layers. The stages of another model differ by about 1.4, as vectors do that have nothing in common."""
EIGHT_BITS, FOUR_BITS = 0.3, 0.6
"""The same where a layer is stored in so many bits: five times what flux2-nano has, 0.061 in FP8 and 0.107 in NVFP4."""
STAGES = {"text_error": "text encoder", "prologue_error": "prologue", "decode_error": "decoder"}
VELOCITY_FACTOR = 2.0
"""How much larger than measured a velocity's error may be on another machine, or on a target that rounds alike but computes in
16 bits: flux2-nano's TensorRT-RTX graphs have less than 1.3 times the error of the CPU target that rounds as they do."""


@dataclass(frozen=True)
class Bound:
    """The largest error of a stage, and what it is the rounding of."""

    error: float
    of: str


def stage_bounds(target: Target, reference: str, plans: Mapping[str, list[LayerPlan]]) -> dict[str, Bound]:
    """By figure of STAGES, what rounding can come to in `target`, against diffusers in the dtype `reference`."""
    dtypes = [Bound(ROUNDING[dtype], dtype) for dtype in _dtypes(target, reference)]
    prologue = [entry for entry in plans["transformer"] if _is_of_prologue(entry.layer.name)]
    stored = {"text_error": plans["text_encoder"], "prologue_error": prologue, "decode_error": []}
    return {
        figure: max((*dtypes, *_of_formats(layers)), key=lambda bound: bound.error) for figure, layers in stored.items()
    }


def evidence_bounds(
    targets: Sequence[Target],
    reference: str,
    plans: Mapping[str, list[LayerPlan]],
    measured: Mapping[str, float],
) -> dict[str, dict[str, StageBound]]:
    """By target and figure of a replay, the largest error that evidence may be replayed with.

    `measured` holds the largest velocity error by target that the build ran. Of text encoder, prologue and decoder the bounds
    are stage_bounds. A velocity may have VELOCITY_FACTOR times what the target itself had, or the first target that rounds
    inputs as it does, and always what rounding to its dtype explains; where no such target ran, what formats explain.
    """
    alike = {target.rounds_inputs: target.name for target in reversed(targets) if target.name in measured}
    found = {}
    for target in targets:
        bounds = stage_bounds(target, reference, plans)
        like = target.name if target.name in measured else alike.get(target.rounds_inputs)
        known = [Bound(ROUNDING[dtype], f"rounding to {dtype}") for dtype in _dtypes(target, reference)]
        if like is None:
            stored = _of_formats(plans["transformer"])
            known += [
                Bound(bound.error, f"rounding to {bound.of}; no target that rounds alike ran") for bound in stored
            ]
        else:
            of = f"{VELOCITY_FACTOR:g} times what {'it' if like == target.name else like} had when it was built"
            known.append(Bound(significant(VELOCITY_FACTOR * measured[like]), of))
        velocity = max(known, key=lambda bound: bound.error)
        found[target.name] = {
            figure: StageBound(bound.error, f"rounding to {bound.of}") for figure, bound in bounds.items()
        } | {"step_error": StageBound(velocity.error, velocity.of)}
    return found


def _dtypes(target: Target, reference: str) -> tuple[str, str]:
    """What `target` computes in, and what the reference was computed in."""
    return "float32" if target.activation_bytes == 4 else str(getattr(target, "dtype", "bfloat16")), reference


def check_stages(targets: Mapping[str, dict[str, Any]], bounds: Mapping[str, Mapping[str, Bound]]) -> None:
    """Raise GateError naming every stage that is further from diffusers than rounding explains.

    `targets` holds figures by target (see compare_target), `bounds` those of stage_bounds.
    """
    # Written as "not at most", so that a NaN is refused too.
    misses = [
        f"target {name}: the {stage} is {figures[figure]} from diffusers (relative error), and rounding to "
        f"{bounds[name][figure].of} explains {bounds[name][figure].error:g}"
        for name, figures in targets.items()
        for figure, stage in STAGES.items()
        if not figures[figure] <= bounds[name][figure].error
    ]
    if misses:
        raise GateError(
            f"{'; '.join(misses)}. This is a fault, which no gate of the recipe allows, and no bundle was written: the "
            "checkpoint's config or tokenizer is not that of its weights, a file changed while it was read, or a library "
            "computes wrongly; try the checkpoint as published and the versions of constraints.txt"
        )


def _is_of_prologue(layer: str) -> bool:
    """Whether the layer comes before the blocks."""
    return not layer.startswith(("transformer_blocks.", "single_transformer_blocks.", "norm_out.", "proj_out"))


def _of_formats(layers: Iterable[LayerPlan]) -> list[Bound]:
    formats = sorted({entry.format for entry in layers if entry.format in FORMATS})
    return [Bound(EIGHT_BITS if FORMATS[name].bits >= 8 else FOUR_BITS, name) for name in formats]


def gated_snr(layer: dict[str, Any]) -> float | None:
    """What `layer_snr_db` is held against, of a layer as the weights stage reports it: the signal-to-noise ratio of its weight,
    or, of a weight that was solved, of its output, since such a weight moves where no input is lost by it."""
    rounding = layer["rounding"] or {"rounding": "nearest"}
    is_solved = rounding["rounding"] != "nearest" or rounding.get("low_rank", 0) > 0
    found: float | None = (
        layer["output_snr_db"] if is_solved and layer["output_snr_db"] is not None else layer["snr_db"]
    )
    return found


def check_gates(
    gates: Gates,
    layer_snr_db: dict[str, float],
    targets: dict[str, dict[str, Any]],
    cached: dict[str, Any] | None = None,
) -> None:
    """Raise GateError naming what misses its gate, the worst layers, steps and images behind it, and what to change.

    `layer_snr_db` holds the weight SNR of the layers the build quantized, `targets` figures by target (see compare_target),
    `cached` those of images with the step cache (see frontier.figures).
    """
    misses: dict[str, list[str]] = {}
    if gates.layer_snr_db is not None:
        misses["layer_snr_db"] = _layers_under(gates.layer_snr_db, layer_snr_db)
    for field, behind in (("step_cosine", _steps_under), ("image_psnr_db", _images_under)):
        gate = getattr(gates, field)
        misses[field] = [
            f"target {name}: {field} {figures[field]} under {gate}{behind(gate, figures.get('prompts', []))}"
            for name, figures in targets.items()
            if gate is not None and not figures[field] >= gate
        ]
    misses["compute_error"] = [
        f"target {name}: its velocities are {apart['velocity_error']} from those of {apart['target']} (relative error), over "
        f"compute_error {gates.compute_error}"
        for name, figures in targets.items()
        if gates.compute_error is not None
        and (apart := figures.get("against_exact"))
        and not apart["velocity_error"] <= gates.compute_error
    ]
    if gates.step_cache_psnr_db is not None:
        misses["step_cache_psnr_db"] = _step_cache_under(gates.step_cache_psnr_db, cached)
    missed = {field: found for field, found in misses.items() if found}
    if missed:
        advice = [*dict.fromkeys(ADVICE[field] for field in missed)]
        raise GateError(
            f"gates: {'; '.join(line for found in missed.values() for line in found)}. No bundle was written; "
            f"{'; '.join(advice)}; or, if this loss is acceptable, relax {', '.join(f'gates.{field}' for field in missed)}"
        )


MOST = 4
"""So many layers, steps or images are named; the report has all of them."""
PRECISION = (
    "keep the layers that lose most in higher precision (precision.transformer.exclude, or a rule with format: fp8), or let "
    "`exclude: auto` choose them"
)
ADVICE = {
    "layer_snr_db": PRECISION,
    "step_cosine": PRECISION,
    "image_psnr_db": PRECISION,
    "compute_error": "generate with compute: exact",
    "step_cache_psnr_db": "skip fewer steps (step_cache.skip)",
}


# Conditions are written as "not at least", so that a NaN misses its gate.
def _layers_under(gate: float, layer_snr_db: dict[str, float]) -> list[str]:
    low = {name: snr for name, snr in layer_snr_db.items() if not snr >= gate}
    worst = [f"{name} {low[name]:.2f} dB" for name in sorted(low, key=lambda name: low[name])]
    return [f"{len(low)} layers under layer_snr_db {gate}: {_listed(worst)}"] if low else []


def _steps_under(gate: float, prompts: list[dict[str, Any]]) -> str:
    """The steps that fell short, with the worst cosine of any prompt at each."""
    steps: dict[int, tuple[float, str]] = {}
    for row in prompts:
        for step, value in enumerate(row["step_cosine"], start=1):
            if not value >= gate and not value >= steps.get(step, (gate, ""))[0]:
                steps[step] = (value, row["prompt"])
    worst = [f"step {step} {value} for {prompt!r}" for step, (value, prompt) in _by_value(steps)]
    return f" ({len(steps)} steps: {_listed(worst)})" if steps else ""


def _images_under(gate: float, prompts: list[dict[str, Any]]) -> str:
    """The images that fell short; the gate itself is for their mean."""
    images = {at: (row["image_psnr_db"], row["prompt"]) for at, row in enumerate(prompts)}
    low = {at: found for at, found in images.items() if not found[0] >= gate}
    worst = [f"{value} dB for {prompt!r}" for _, (value, prompt) in _by_value(low)]
    return f" ({len(low)} of {len(images)} images: {_listed(worst)})" if low else ""


def _step_cache_under(gate: float, cached: dict[str, Any] | None) -> list[str]:
    if cached and cached["psnr_db"] >= gate:
        return []
    found = f"{cached['psnr_db']} under {gate}" if cached else "not measured, no target runs here"
    return [f"step cache: step_cache_psnr_db {found}"]


def _by_value(found: Mapping[int, tuple[float, str]]) -> list[tuple[int, tuple[float, str]]]:
    return sorted(found.items(), key=lambda entry: entry[1][0])


def _listed(worst: list[str]) -> str:
    return ", ".join(worst[:MOST]) + (f", and {len(worst) - MOST} more" if len(worst) > MOST else "")
