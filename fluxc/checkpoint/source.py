"""A checkpoint: a diffusers folder, or a hub id that resolves to one. Nothing but headers and configs is read on opening."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fluxc.base.errors import CheckpointError
from fluxc.base.safetensors import TensorRef, read_header

COMPONENTS = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")
QUANTIZATION = "quantization_config"
HF_QUANT_CONFIG = "hf_quant_config.json"
SCALES = (".input_scale", ".weight_scale", ".weight_scale_2")
WEIGHTED = ("transformer", "text_encoder", "vae")


@dataclass(frozen=True)
class Component:
    """One folder of the checkpoint: its class as model_index.json names it, and its files."""

    name: str
    folder: Path
    library: str
    class_name: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json (or scheduler/tokenizer config), without what it says of quantization."""
        for file in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
            if (self.folder / file).is_file():
                config = read_json(self.folder / file)
                return {key: value for key, value in config.items() if key != QUANTIZATION}
        raise CheckpointError(f"{self.folder}: no config file; the checkpoint is incomplete")

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """What config.json, or else ModelOpt's hf_quant_config.json, says of quantization; None if neither does."""
        for file, key in (("config.json", QUANTIZATION), (HF_QUANT_CONFIG, "quantization")):
            if (self.folder / file).is_file() and (said := read_json(self.folder / file).get(key)):
                if not isinstance(said, dict):
                    raise CheckpointError(f"{self.folder / file}: {key} is not a mapping; use the file as exported")
                return said
        return None

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in the order of the index if there is one."""
        indexes = sorted(self.folder.glob("*.safetensors.index.json"))
        if indexes:
            names = sorted(set(read_json(indexes[0])["weight_map"].values()))
            return [self.folder / name for name in names]
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.folder}: no safetensors weights; the checkpoint is incomplete")
        return files

    @cached_property
    def tensors(self) -> dict[str, TensorRef]:
        """Every tensor of the component by name, scales of shape [1] as []; a name in two shards is an error."""
        found: dict[str, TensorRef] = {}
        for file in self.weight_files:
            for name, ref in read_header(file).items():
                if name in found:
                    raise CheckpointError(f"{file}: tensor {name!r} is also in {found[name].file}")
                scalar = ref.shape == (1,) and ref.dtype == "F32" and name.endswith(SCALES)
                found[name] = replace(ref, shape=()) if scalar else ref
        return found

    @property
    def files(self) -> list[Path]:
        """Every regular file of the component, sorted; hidden files left out."""
        return sorted(p for p in self.folder.iterdir() if p.is_file() and not p.name.startswith("."))


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder opened for reading."""

    root: Path
    pipeline_class: str
    index: dict[str, Any]
    components: dict[str, Component]


def open_checkpoint(source: str, revision: str | None, folder: Path) -> Checkpoint:
    """Open `source`: a folder (relative to `folder`) or, failing that, a hub id, whose files are fetched or found in cache.

    Raises CheckpointError naming what is missing.
    """
    root = _resolve(source, revision, folder)
    index_path = root / "model_index.json"
    if not index_path.is_file():
        raise CheckpointError(f"{root}: there is no model_index.json, so this is not a diffusers checkpoint")
    index = read_json(index_path)
    components = {}
    for name in COMPONENTS:
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or not (root / name).is_dir():
            raise CheckpointError(f"{root}: component {name!r} is missing from model_index.json or has no folder")
        components[name] = Component(name, root / name, *entry)
    return Checkpoint(root, str(index.get("_class_name")), index, components)


def check_tensors(component: Component, expected: dict[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> None:
    """Compare the component's tensors with `expected` (name to shape); names starting with `ignored` may be there or not.

    Raises CheckpointError naming every missing, surplus and misshapen tensor (the first few of each).
    """
    actual = component.tensors
    missing = [name for name in expected if name not in actual]
    surplus = [name for name in actual if name not in expected and not name.startswith(ignored or ("\0",))]
    shapes = [
        f"{name} is {list(actual[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in actual and actual[name].shape != shape
    ]
    problems = [
        f"{label}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for label, names in (("missing", missing), ("not part of the model", surplus), ("wrong shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{component.folder}: its tensors do not match its config.json: {'; '.join(problems)}; "
            "use the checkpoint as published, or mend its config"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; CheckpointError if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def _expanded(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{source}: {error}; write the whole path") from error


def _resolve(source: str, revision: str | None, folder: Path) -> Path:
    local = folder / _expanded(source)
    if local.is_dir():
        return local.resolve()
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise CheckpointError(f"{local}: no such folder; model.source is a diffusers folder or a hub id (owner/name)")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{source}: reading from the hub needs huggingface_hub; install it or give a local folder"
        ) from error
    patterns = ["model_index.json", *(f"{name}/*" for name in COMPONENTS)]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source}: not a local folder ({local}), and the hub did not give it: {error}; "
            "check the name and your access, or download it and give the folder"
        ) from error
