"""Lets modelopt quantize the transformer, with AWQ-lite or SVDQuant if asked: its own calibration and export, on CUDA.

What it exports is then read like any checkpoint that modelopt quantized. Not run on a GPU by this project yet.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

from fluxc.base.errors import BuildError, RecipeError
from fluxc.checkpoint.reference import Generation, generate, load_pipeline
from fluxc.checkpoint.source import Checkpoint
from fluxc.quantize.plan import LayerPlan
from fluxrt.install import install_extra

NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
FP8 = {"num_bits": (4, 3), "axis": None}
SCHEMES: dict[str, dict[str, Any]] = {"nvfp4": NVFP4, "fp8": FP8}
ALGORITHMS: dict[str, Any] = {"max": "max", "awq_lite": "awq_lite", "svdquant": {"method": "svdquant", "lowrank": 32}}


def check_available() -> None:
    """Raise BuildError unless modelopt is installed and torch sees a CUDA GPU; CPU builds need neither."""
    lacking = (
        [] if importlib.util.find_spec("modelopt") else [f"nvidia-modelopt (`{install_extra('fluxc', 'modelopt')}`)"]
    )
    lacking += [] if torch.cuda.is_available() else ["a CUDA GPU that torch sees"]
    if lacking:
        raise BuildError(
            f"calibration.engine: modelopt needs {' and '.join(lacking)}. "
            "Without them, leave `engine` out: fluxc calibrates on any machine"
        )


def check_formats(plan: list[LayerPlan]) -> None:
    """Raise RecipeError for a plan with a format that fluxc has no modelopt scheme for."""
    others = sorted({entry.format for entry in plan} - {"bf16", *SCHEMES})
    if others:
        raise RecipeError(
            f"calibration.engine: modelopt quantizes to {' and '.join(SCHEMES)} here, and the precision plan asks for "
            f"{', '.join(others)}; leave `engine` out, and fluxc quantizes to it"
        )


def quantize_config(plan: list[LayerPlan], algorithm: str) -> dict[str, Any]:
    """modelopt's config (mtq.quantize, 0.47) for `plan`: every quantizer off, then on by the name of each planned layer."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for entry in plan:
        if entry.format != "bf16":
            scheme = SCHEMES[entry.format]
            # A name in modelopt's config is a glob, and a dot and a number are themselves in one.
            name = re.sub(r"([*?[])", r"[\1]", entry.layer.name)
            entries += [
                {"quantizer_name": f"{name}.{kind}_quantizer", "cfg": scheme, "enable": True}
                for kind in ("weight", "input")
            ]
    return {"quant_cfg": entries, "algorithm": ALGORITHMS[algorithm]}


def quantize_transformer(
    checkpoint: Checkpoint, plan: list[LayerPlan], algorithm: str, prompts: list[str], generation: Generation, out: Path
) -> None:
    """Quantize the transformer under `plan` over the calibration prompts, and export it to the folder `out`."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    pipeline = load_pipeline(checkpoint, torch.bfloat16).to("cuda")

    def forward(_: Any) -> None:
        for number, prompt in enumerate(prompts):
            generate(pipeline, checkpoint, prompt, generation.of_prompt(number))

    mtq.quantize(pipeline.transformer, quantize_config(plan, algorithm), forward)
    export_hf_checkpoint(pipeline.transformer, export_dir=out)
