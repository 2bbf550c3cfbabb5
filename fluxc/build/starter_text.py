"""The text of a recipe that `fluxc init` writes: the fields that matter, each with a comment that says what it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxc.build.requests import LARGE_PROMPTS, LARGE_SIDE, LARGE_STEPS
from fluxc.predict.gpus import GPUS
from fluxc.recipe.schema import FILE as SCHEMA
from fluxc.recipe.words import flow

if TYPE_CHECKING:
    from fluxc.build.starter import Start

CPU = "cpu"
COMPARED_AT = [256, 256]


def recipe_text(start: Start, model: str, name: str, on: str, gpus: int) -> str:
    """The recipe called `name` for `start` (`model`, as it was typed) on the GPU `on`, or cpu, on one and on `gpus` of them."""
    where = "this machine's CPU" if on == CPU else GPUS[on].name
    of_them = "processes" if on == CPU else "of them"
    many = f", one and {gpus} {of_them}" if gpus > 1 else ""
    command = f"fluxc init {model}{f' --for {on}' if on != CPU else ''}{f' --gpus {gpus}' if gpus > 1 else ''}"
    reference = "" if start.is_small else ", reference: bfloat16"
    # Many steps of a large model on a CPU are compared at a small size.
    sizes = [list(start.size)]
    if start.is_large and not start.is_distilled:
        sizes.append(COMPARED_AT)
        reference += f", size: {flow(COMPARED_AT)}"
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        f"# {start.title} for {where}{many}; written by `{command}`.",
        "# Every field: docs/recipe.md. What a build will do: `fluxc plan`.",
        f"name: {name}",
        "",
        "# The checkpoint: a diffusers folder (relative to this file), or a hub id; single files: docs/sources.md.",
        f"model: {flow({'source': start.source})}",
        "",
        f"# [height, width] in pixels that can be generated: multiples of {start.pixels_per_token}. The first is the default.",
        f"sizes: [{', '.join(flow(size) for size in sizes)}]",
        "# Tokens that every prompt is padded to, chat template included; longer prompts are refused.",
        f"text: {{length: {start.text_length}}}",
        f"# What a request gets that does not say otherwise.{_about_steps(start)}",
        f"sampling: {{steps: {start.steps}, guidance: {start.guidance}}}",
        "",
        "# Prompts like your users' (one a line): what the layers' inputs are measured with.",
        *_about_calibration(start, on),
        f"calibration: {{prompts: prompts/{start.prompts}-calibration.txt}}",
        "",
        *_precision(start, on),
        "",
        *_targets(on, gpus, start.is_small),
        "",
        "# Other prompts, which nothing was measured with: every target that runs here is compared with diffusers on them.",
        f"fidelity: {{prompts: prompts/{start.prompts}-held-out.txt{reference}}}",
        "",
        *_gates(start, on),
    ]
    return "\n".join(lines) + "\n"


def _about_calibration(start: Start, on: str) -> list[str]:
    """Of a large model: how little of it calibration takes, and how to do without."""
    if start.is_quantized or not start.is_large:
        return []
    few = f"# Takes {LARGE_PROMPTS} of them, at most {LARGE_STEPS} steps and {LARGE_SIDE}x{LARGE_SIDE} pixels"
    room = ", and leaves 8 times the range that it sees" if _multiplies_fp4(on) else ""
    return [f"{few}{room}.", "# With `engine: none` no model is run: docs/calibration.md."]


def _about_steps(start: Start) -> str:
    if start.embeds_guidance:
        return " The scale of the guidance is an input of this transformer: one pass a step."
    if start.is_distilled and not start.is_small:
        return f" This model is distilled to {start.steps} steps, without guidance."
    return " Guidance over 1 takes two passes of the transformer a step."


def _precision(start: Start, on: str) -> list[str]:
    if start.is_quantized:
        return [
            "# The checkpoint is quantized already: its layers keep their formats and bytes.",
            "precision: {transformer: {default: bf16}}",
        ]
    encoder = "  text_encoder: {default: bf16}" if start.is_small else "  text_encoder: {default: fp8}"
    formats = (
        [
            "    default: nvfp4            # 4 bits: a third of bf16's memory, scales included",
            "    preset: modelopt-flux2    # NVIDIA's list of layers that stay bf16; `fluxc plan --presets` compares others",
            "    scales: four-over-six     # of two block scales the one that reproduces the block better",
            "    # rounding: gptq          # solve weights against calibration's inputs: more accurate, and takes longer",
        ]
        if _multiplies_fp4(on)
        else [
            "    default: fp8              # 8 bits: this GPU does not multiply 4-bit floats",
            "    preset: modelopt-flux2    # NVIDIA's list of layers that stay bf16; `fluxc plan --presets` compares others",
        ]
    )
    return ["# How the layers are stored and multiplied.", "precision:", "  transformer:", *formats, encoder]


def _multiplies_fp4(on: str) -> bool:
    """Whether NVFP4 is what `on` gets: a GPU that multiplies it, or a CPU."""
    return on == CPU or "nvfp4" in GPUS[on].gemms


EXACT = (
    "  # The same in fp32, which int8 is held against (gates.compute_error).",
    "  - {kind: onnxruntime, compute: exact}",
)


def _targets(on: str, gpus: int, is_small: bool) -> list[str]:
    """GPU targets for one GPU and for `gpus`; and one that runs where the build does."""
    lines = ["# What to compile for."]
    shared = [1, gpus] if gpus > 1 else [1]
    if on == CPU:
        entries = [f"  - {{kind: onnxruntime{f', gpus: {count}' if count > 1 else ''}}}" for count in shared]
        return [
            "targets:",
            "  # ONNX Runtime on the CPU, in int8: its images are compared with diffusers' when you build.",
            *entries,
            *(EXACT if is_small else ()),
        ]
    gpu = GPUS[on]
    kind = "tensorrt_rtx" if on.startswith("rtx") else "tensorrt"
    built = (
        "built and audited on this machine" if kind == "tensorrt_rtx" else "`fluxc finish` builds them on that machine"
    )
    entries = [
        f'  - {{kind: {kind}, compute_capabilities: ["{gpu.compute_capability}"]{f", gpus: {count}" if count > 1 else ""}}}'
        for count in shared
    ]
    return [
        *lines,
        "targets:",
        f"  # Engines for {gpu.name}: {built}.",
        *entries,
        "  # Runs on the CPU and rounds as that GPU does, so that images can be compared with diffusers' where you build.",
        "  - {kind: onnxruntime, activations: nvfp4}",
    ]


def _gates(start: Start, on: str) -> list[str]:
    first = "# The worst result that a build may have; a build that misses a gate fails and writes no bundle."
    if start.is_small:
        held = ", compute_error: 0.02" if on == CPU else ""
        return [first, f"gates: {{layer_snr_db: 15, step_cosine: 0.97, image_psnr_db: 30{held}}}"]
    if start.is_quantized:
        return [first, "# gates: {step_cosine: 0.98}"]
    return [
        first,
        "# Once you have seen a report, add step_cosine; image_psnr_db needs `fidelity.level: images`.",
        "gates: {layer_snr_db: 15}",
    ]
