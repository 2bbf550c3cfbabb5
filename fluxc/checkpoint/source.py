"""A checkpoint: a diffusers folder, or a hub id that resolves to one. Nothing but headers and configs is read on opening."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fluxc.base.errors import CheckpointError, RecipeError
from fluxc.base.json_object import read_json
from fluxc.base.safetensors import TensorRef, read_header
from fluxc.checkpoint.weight_files import WeightFiles, find_weights, has_variant

COMPONENTS = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")
QUANTIZATION = "quantization_config"
HF_QUANT_CONFIG = "hf_quant_config.json"
SCALES = (".input_scale", ".weight_scale", ".weight_scale_2")
WEIGHTED = ("transformer", "text_encoder", "vae")


@dataclass(frozen=True)
class Component:
    """One folder of the checkpoint: its class as model_index.json names it, and its files.

    Of the weights those of `variant`, where there are some.
    """

    name: str
    folder: Path
    library: str
    class_name: str
    variant: str | None = None

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
        return self._quantization[1]

    @property
    def quantization_file(self) -> Path:
        """The file that `quantization` is from."""
        return self._quantization[0]

    @cached_property
    def _quantization(self) -> tuple[Path, dict[str, Any] | None]:
        for file, key in (("config.json", QUANTIZATION), (HF_QUANT_CONFIG, "quantization")):
            if (self.folder / file).is_file() and (said := read_json(self.folder / file).get(key)):
                if not isinstance(said, dict):
                    raise CheckpointError(f"{self.folder / file}: {key} is not a mapping; use the file as exported")
                return self.folder / file, said
        return self.folder / "config.json", None

    @cached_property
    def weights(self) -> WeightFiles:
        """Which files hold the weights, for every reader of the component."""
        named = self.config.get("transformers_weights")
        if named is not None:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: transformers_weights names {named!r} as the weights for transformers alone; "
                "remove the field, and leave the weights you mean in the folder"
            )
        return find_weights(self.folder, self.variant)

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files of `weights`, in order."""
        return list(self.weights.files)

    @cached_property
    def tensors(self) -> dict[str, TensorRef]:
        """Every tensor of the component by name, scales of shape [1] as []; a name in two shards is an error."""
        found: dict[str, TensorRef] = {}
        for file in self.weight_files:
            for name, ref in read_header(file).items():
                if name in found:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} is also in {found[name].file}; download the checkpoint again"
                    )
                scalar = ref.shape == (1,) and ref.dtype == "F32" and name.endswith(SCALES)
                found[name] = replace(ref, shape=()) if scalar else ref
        for name, file_name in (self.weights.weight_map or {}).items():
            if name not in found or found[name].file.name != file_name:
                raise CheckpointError(
                    f"{self.folder / file_name}: it lacks tensor {name!r}, which the index places there; "
                    "the index and its files are not of one checkpoint, download them again"
                )
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


def open_checkpoint(source: str, revision: str | None, folder: Path, variant: str | None = None) -> Checkpoint:
    """Open `source`: a folder (relative to `folder`) or, failing that, a hub id, whose files are fetched or found in cache.

    `variant` is a word in the names of weights files, such as fp16. Raises CheckpointError naming
    what is missing, RecipeError where `source` is no checkpoint at all.
    """
    root = _resolve(source, revision, folder)
    index_path = root / "model_index.json"
    if not index_path.is_file():
        raise RecipeError(
            f"model.source: {root}: there is no model_index.json, so this is not a diffusers checkpoint; give its folder, or a "
            "hub id (owner/name)"
        )
    index = read_json(index_path)
    components = {}
    for name in COMPONENTS:
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or not (root / name).is_dir():
            raise CheckpointError(f"{root}: component {name!r} is missing from model_index.json or has no folder")
        library, class_name = entry
        if not isinstance(library, str) or not isinstance(class_name, str):
            raise CheckpointError(
                f"{index_path}: {name} is {entry}, expected the names of a library and a class; use the file as published"
            )
        components[name] = Component(name, root / name, library, class_name, variant)
    if not isinstance(index.get("is_distilled", False), bool):
        raise CheckpointError(
            f"{index_path}: is_distilled is {index['is_distilled']!r}, expected true or false; use the file as published"
        )
    if variant is not None and not any(has_variant(components[name].folder, variant) for name in WEIGHTED):
        raise CheckpointError(
            f"{root}: model.variant: no component has weights of the variant {variant!r} (NAME.{variant}.safetensors); "
            "leave it out, or name one that is there"
        )
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


def _expanded(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"model.source: {source}: {error}; write the whole path") from error


def check_source(source: str, folder: Path) -> None:
    """Refuse a source that is neither a folder nor a hub id by its form; RecipeError. Nothing is fetched."""
    local = folder / _expanded(source)
    if not local.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise RecipeError(f"model.source: {local}: no such folder; give a diffusers folder, or a hub id (owner/name)")


def _resolve(source: str, revision: str | None, folder: Path) -> Path:
    check_source(source, folder)
    local = folder / _expanded(source)
    if local.is_dir():
        return local.resolve()
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{source}: reading from the hub needs huggingface_hub; install it or give a local folder"
        ) from error
    patterns = ["model_index.json", "LICENSE*", "NOTICE*", "README.md", *(f"{name}/*" for name in COMPONENTS)]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source}: not a local folder ({local}), and the hub did not give it: {error}; "
            "check the name and your access, or download it and give the folder"
        ) from error
