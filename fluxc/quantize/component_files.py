"""A bundle's configs: what was quantized, and how, in ModelOpt's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluxc.checkpoint.components import WEIGHTS_FILE, small_files, without_machine
from fluxc.checkpoint.identify import family_of
from fluxc.checkpoint.source import HF_QUANT_CONFIG, QUANTIZATION, Checkpoint
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan


def write_small_files(
    checkpoint: Checkpoint, folder: Path, plans: dict[str, list[LayerPlan]], kept_text_layers: int
) -> None:
    """Copy configs, tokenizer and scheduler into `folder`, saying in the configs what was quantized and pruned.

    `plans` cover every Linear that is stored.
    """
    _write_json(folder / "model_index.json", without_machine(checkpoint.index))
    for name, component in checkpoint.components.items():
        target = folder / name
        target.mkdir()
        for file in small_files(component):
            if file.name != HF_QUANT_CONFIG:
                (target / file.name).write_bytes(file.read_bytes())
        if name not in WEIGHTS_FILE:
            continue
        config = without_machine(component.config)
        if name == "text_encoder":
            config = family_of(checkpoint).text_encoder.with_layers(config, kept_text_layers)
        quantization = quantization_config(plans.get(name, []))
        if quantization:
            if name == "text_encoder":
                quantization["ignore"].append("lm_head")
            config[QUANTIZATION] = quantization
        _write_json(target / "config.json", config)


def quantization_config(plan: list[LayerPlan]) -> dict[str, Any] | None:
    """ModelOpt's `quantization_config` for a plan of every Linear that is stored.

    It holds the algorithm, the layers left in bf16, and formats by layer when they are mixed.
    """
    kinds = sorted({_kind(entry) for entry in plan if entry.format != "bf16"}, reverse=True)
    if not kinds:
        return None
    config: dict[str, Any] = {
        "config_groups": {
            f"group_{number}": _config_group(
                *kind, ["Linear"] if len(kinds) == 1 else [e.layer.name for e in plan if _kind(e) == kind]
            )
            for number, kind in enumerate(kinds)
        },
        "ignore": [entry.layer.name for entry in plan if entry.format == "bf16"],
        "quant_algo": kinds[0][0] if len(kinds) == 1 else "MIXED_PRECISION",
        "producer": {"name": "fluxc"},
        "quant_method": "modelopt",
    }
    if len(kinds) > 1:
        config["quantized_layers"] = {
            entry.layer.name: {"quant_algo": _algorithm(entry)} for entry in plan if entry.format != "bf16"
        }
    return config


def _algorithm(entry: LayerPlan) -> str:
    """ModelOpt's name for how a layer is quantized."""
    if entry.format not in FORMATS:
        return "BF16"
    format = FORMATS[entry.format]
    further = "svdquant_lora_a" if entry.rank else "pre_quant_scale" if entry.is_smoothed else ""
    return format.variants.get(further, format.algorithm)


def _kind(entry: LayerPlan) -> tuple[str, str, int, bool]:
    return _algorithm(entry), entry.format, entry.rank, entry.is_smoothed


def _config_group(algorithm: str, name: str, low_rank: int, smoothed: bool, targets: list[str]) -> dict[str, Any]:
    format = FORMATS[name]
    scheme: dict[str, Any] = {"dynamic": False, "num_bits": format.bits, "type": format.number}
    if format.group_size:
        scheme["group_size"] = format.group_size
    group: dict[str, Any] = (
        {"input_activations": scheme, "weights": scheme} if format.calibrated else {"weights": scheme}
    )
    if algorithm in format.variants.values():
        group |= {"has_zero_point": False, "pre_quant_scale": smoothed}
    if low_rank:
        group["lora_rank"] = low_rank
    return {**group, "targets": targets}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
