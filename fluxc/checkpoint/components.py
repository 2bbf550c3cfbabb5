"""Writes the small files of a bundle's component folders: configs, tokenizer, scheduler."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fluxc.base.safetensors import TensorRef, read_header
from fluxc.checkpoint.source import Component

WEIGHTS_FILE = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
INDEX = ".index.json"
ANY_INDEX = re.compile(r"\.index(\.[^.]+)?\.json$")
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
    """A component's files other than weights and indexes of weights, of any format and variant."""
    return [
        file
        for file in component.files
        if file.suffix in (".json", ".txt", ".jinja", ".model") and not ANY_INDEX.search(file.name)
    ]


def without_machine(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the fields that name a machine."""
    return {key: value for key, value in config.items() if key not in MACHINE_FIELDS}
