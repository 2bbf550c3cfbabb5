"""Writes the small files of a bundle's component folders: configs, tokenizer, scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluxc.base.errors import CheckpointError
from fluxc.base.safetensors import TensorRef, read_header
from fluxc.checkpoint.source import HF_QUANT_CONFIG, QUANTIZATION, Checkpoint, Component
from fluxc.formats.constants import BLOCK
from fluxc.quantize.plan import LayerPlan

WEIGHTS_FILE = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
INDEX = ".index.json"
MACHINE_FIELDS = ("_name_or_path",)


def weights_entry(folder: Path, component: str) -> str:
    """The name of a component's weights in `folder`: its one file, or the index when it is split."""
    name = WEIGHTS_FILE[component]
    return name + INDEX if (folder / (name + INDEX)).exists() else name


def weights_files(folder: Path, component: str) -> list[Path]:
    """The component's safetensors files in `folder`, in order, without the index."""
    entry = folder / weights_entry(folder, component)
    if not entry.name.endswith(INDEX):
        return [entry]
    return [folder / name for name in sorted(set(json.loads(entry.read_text())["weight_map"].values()))]


def weights_tensors(folder: Path, component: str) -> dict[str, TensorRef]:
    """Every tensor of the component's weights in `folder`, by name."""
    return {name: ref for file in weights_files(folder, component) for name, ref in read_header(file).items()}


def small_files(component: Component) -> list[Path]:
    """A component's files other than weights and their index."""
    return [
        file
        for file in component.files
        if file.suffix in (".json", ".txt", ".jinja", ".model") and not file.name.endswith(".safetensors.index.json")
    ]


def write_small_files(
    checkpoint: Checkpoint, folder: Path, plans: dict[str, list[LayerPlan]], kept_text_layers: int
) -> None:
    """Copy configs, tokenizer and scheduler into `folder`, saying in the configs what was quantized and pruned.

    `plans` cover every Linear that is stored.
    """
    _write_json(folder / "model_index.json", _without_machine(checkpoint.index))
    for name, component in checkpoint.components.items():
        target = folder / name
        target.mkdir()
        for file in small_files(component):
            if file.name != HF_QUANT_CONFIG:
                (target / file.name).write_bytes(file.read_bytes())
        if name not in WEIGHTS_FILE:
            continue
        config = _without_machine(component.config)
        if name == "text_encoder":
            config = text_encoder_config(config, kept_text_layers)
        quantization = quantization_config(plans.get(name, []))
        if quantization:
            if name == "text_encoder":
                quantization["ignore"].append("lm_head")
            config[QUANTIZATION] = quantization
        _write_json(target / "config.json", config)


def text_encoder_config(config: dict[str, Any], kept_layers: int) -> dict[str, Any]:
    """The text encoder's config for its first `kept_layers` layers."""
    config = _without_machine(config) | {"num_hidden_layers": kept_layers}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:kept_layers]
    # Prompts are encoded without the language-model head, which is not stored; tied, it needs no tensor.
    return config | {"tie_word_embeddings": True}


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
    if entry.low_rank:
        return "NVFP4_SVD"
    if "pre_quant_scale" in entry.parts:
        return "NVFP4_AWQ"
    return entry.format.upper()


def _kind(entry: LayerPlan) -> tuple[str, int]:
    return _algorithm(entry), entry.low_rank


def _config_group(algorithm: str, low_rank: int, targets: list[str]) -> dict[str, Any]:
    scheme: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if algorithm != "FP8":
        scheme |= {"num_bits": 4, "group_size": BLOCK}
    group: dict[str, Any] = {"input_activations": scheme, "weights": scheme}
    if algorithm in ("NVFP4_SVD", "NVFP4_AWQ"):
        group |= {"has_zero_point": False, "pre_quant_scale": True}
    if low_rank:
        group["lora_rank"] = low_rank
    return {**group, "targets": targets}


def render_template(checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[str, str, int]:
    """(prefix, suffix, pad id) of the tokenizer's chat template around one user message.

    Raises CheckpointError when the template does more to the message than to surround it, since the runtime could not
    repeat that without the template engine.
    """
    from transformers import AutoTokenizer

    folder = checkpoint.components["tokenizer"].folder
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: there is no tokenizer.json, which the runtime tokenizes with")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def render(message: str) -> str:
        messages = [{"role": "user", "content": message}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))

    marker = "\u2063fluxc-prompt\u2063"
    prefix, found, suffix = render(marker).partition(marker)
    probes = ("", "a cat", " two  spaces ", "line\nbreak", "<|im_end|>", "Ünïcödé 猫")
    if not found or any(render(probe) != prefix + probe + suffix for probe in probes):
        raise CheckpointError(
            f"{folder}: the chat template changes the message it is given, so it cannot be rendered once at compile time"
        )
    if tokenizer.pad_token_id is None or tokenizer.padding_side != "right":
        raise CheckpointError(f"{folder}: the tokenizer must have a pad token and pad on the right")
    return prefix, suffix, int(tokenizer.pad_token_id)


def _without_machine(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in MACHINE_FIELDS}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
