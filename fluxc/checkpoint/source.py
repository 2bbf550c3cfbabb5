"""A checkpoint: a diffusers folder or a hub id, its components its own or from elsewhere. Opening reads no weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fluxc.base.errors import CheckpointError, RecipeError
from fluxc.base.json_object import read_json
from fluxc.base.safetensors import FLOATS, TensorRef, read_header
from fluxc.checkpoint.hub import (
    Commits,
    Missing,
    Scratch,
    Snapshot,
    component_file,
    component_folder,
    fill,
    open_snapshot,
)
from fluxc.checkpoint.layouts import read_layout
from fluxc.checkpoint.named import OnHub, named_part, named_source
from fluxc.checkpoint.weight_files import WeightFiles, find_weights, has_variant

COMPONENTS = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")
QUANTIZATION = "quantization_config"
HF_QUANT_CONFIG = "hf_quant_config.json"
SCALES = (".input_scale", ".weight_scale", ".weight_scale_2")
WEIGHTED = ("transformer", "text_encoder", "vae")


@dataclass(frozen=True)
class Component:
    """One folder of the checkpoint: its class as model_index.json names it, and its files.

    Of the weights those of `variant`, where there are some; or, in place of the folder's, those in the one file `file`.
    """

    name: str
    folder: Path
    library: str
    class_name: str
    variant: str | None = None
    file: Path | None = None

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
    def place(self) -> Path:
        """Where the weights are, for messages: the file that was given, or the folder."""
        return self.file or self.folder

    @property
    def quantization_file(self) -> Path:
        """The file that `quantization` is from."""
        return self._quantization[0]

    @cached_property
    def _quantization(self) -> tuple[Path, dict[str, Any] | None]:
        if self.file is not None and all(ref.dtype in FLOATS for ref in self.tensors.values()):
            # The folder's config describes the weights that this file stands in for.
            return self.folder / "config.json", None
        for file, key in (("config.json", QUANTIZATION), (HF_QUANT_CONFIG, "quantization")):
            if (self.folder / file).is_file() and (said := read_json(self.folder / file).get(key)):
                if not isinstance(said, dict):
                    raise CheckpointError(f"{self.folder / file}: {key} is not a mapping; use the file as exported")
                return self.folder / file, said
        return self.folder / "config.json", None

    @cached_property
    def weights(self) -> WeightFiles:
        """Which files hold the weights, for every reader of the component."""
        if self.file is not None:
            return WeightFiles((self.file,))
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
        """Every tensor of the component by diffusers' name, scales of shape [1] as []; a name in two shards is an error."""
        found: dict[str, TensorRef] = {}
        for file in self.weight_files:
            refs = read_header(file)
            for name, ref in (refs if self.file is None else read_layout(self.name, refs)).items():
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

    @cached_property
    def is_renamed(self) -> bool:
        """Whether the weights lie under other names than diffusers', which its loaders do not find."""
        return self.file is not None and set(read_header(self.file)) != set(self.tensors)

    @property
    def files(self) -> list[Path]:
        """Every regular file of the component, sorted; hidden files left out."""
        return sorted(p for p in self.folder.iterdir() if p.is_file() and not p.name.startswith("."))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint opened for reading; `root` has its model_index.json.

    `missing`: files of weights that are outlined here and still on the hub. `commits`: by hub id, what was read of it.
    `notices`: what was found on opening, in sentences.
    """

    root: Path
    pipeline_class: str
    index: dict[str, Any]
    components: dict[str, Component]
    missing: tuple[Missing, ...] = ()
    commits: dict[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    _scratch: Scratch = field(default_factory=Scratch)

    def telling(self) -> AbstractContextManager[None]:
        """A context in which errors about outlined files name the repository that they are of."""
        return self._scratch.hidden()


def with_transformer(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """`checkpoint` with the transformer in `folder` in place of its own."""
    replaced = replace(checkpoint.components["transformer"], folder=folder, file=None, variant=None)
    return replace(checkpoint, components={**checkpoint.components, "transformer": replaced})


def open_checkpoint(
    source: str,
    revision: str | None,
    folder: Path,
    variant: str | None = None,
    parts: Mapping[str, str] = MappingProxyType({}),
    commits: Commits | None = None,
) -> Checkpoint:
    """Open `source`: a folder (relative to `folder`) or, failing that, a hub id, of which small files are fetched.

    `variant` is a word in the names of weights files, such as fp16. `parts` are components that are taken from elsewhere: a
    file of weights or a folder. Repositories that are in `commits` are opened at that commit, and others are added. Raises
    CheckpointError naming what is missing, RecipeError where `source` is no checkpoint at all.
    """
    opening = _Opening(variant, {} if commits is None else commits)
    places = {name: named_part(name, place, folder) for name, place in parts.items()}
    folders = {name: place for name, place in places.items() if isinstance(place, Path) and place.is_dir()}
    place = named_source(source, revision, folder)
    own = [name for name in COMPONENTS if name not in folders]
    root = place if isinstance(place, Path) else opening.snapshot(place, own).root
    index = _read_index(root)
    components = {}
    for name in COMPONENTS:
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or not (name in folders or (root / name).is_dir()):
            raise CheckpointError(f"{root}: component {name!r} is missing from model_index.json or has no folder")
        library, class_name = entry
        if not isinstance(library, str) or not isinstance(class_name, str):
            raise CheckpointError(
                f"{root / 'model_index.json'}: {name} is {entry}, expected the names of a library and a class; use the file as "
                "published"
            )
        file = opening.file(places[name]) if name in places and name not in folders else None
        here = folders.get(name, root / name)
        if name in WEIGHTED and name not in places and isinstance(place, OnHub):
            here = opening.folder(place, name)
        components[name] = Component(name, here, library, class_name, variant, file)
        if name in folders:
            _check_class(components[name])
    opening.fill()
    own_weights = [components[name].folder for name in WEIGHTED if components[name].file is None]
    if variant is not None and not any(has_variant(folder, variant) for folder in own_weights):
        raise CheckpointError(
            f"{root}: model.variant: no component has weights of the variant {variant!r} (NAME.{variant}.safetensors); "
            "leave it out, or name one that is there"
        )
    return Checkpoint(
        root,
        str(index.get("_class_name")),
        index,
        components,
        tuple(opening.missing),
        {snapshot.repo: snapshot.commit for snapshot in opening.snapshots.values()},
        tuple(snapshot.moved for snapshot in opening.snapshots.values() if snapshot.moved),
        opening.scratch,
    )


class _Opening:
    """What is opened on the hub on the way."""

    def __init__(self, variant: str | None, commits: Commits) -> None:
        self._variant, self._commits = variant, commits
        self.scratch = Scratch()
        self.missing: list[Missing] = []
        self.snapshots: dict[tuple[str, str | None], Snapshot] = {}

    def snapshot(self, place: OnHub, components: Iterable[str] = ()) -> Snapshot:
        key = place.repo, place.revision
        if key not in self.snapshots:
            self.snapshots[key] = open_snapshot(place, components, self._commits)
        return self.snapshots[key]

    def folder(self, place: OnHub, name: str) -> Path:
        """The folder of the component `name` of a repository."""
        with self.scratch.hidden():
            folder, missing = component_folder(self.snapshot(place), name, self._variant, self.scratch)
        self.missing += missing
        return folder

    def file(self, place: Path | OnHub) -> Path:
        """A file of weights."""
        if isinstance(place, Path):
            return place
        file, missing = component_file(self.snapshot(place), place.file, self.scratch)
        self.missing += missing
        return file

    def fill(self) -> None:
        """Read what outlines hold."""
        with self.scratch.hidden():
            fill(self.missing)


def _read_index(root: Path) -> dict[str, Any]:
    path = root / "model_index.json"
    if not path.is_file():
        raise RecipeError(
            f"model.source: {root}: there is no model_index.json, so this is not a diffusers checkpoint; give its folder, or a "
            "hub id (owner/name)"
        )
    index = read_json(path)
    if not isinstance(index.get("is_distilled", False), bool):
        raise CheckpointError(
            f"{path}: is_distilled is {index['is_distilled']!r}, expected true or false; use the file as published"
        )
    return index


def _check_class(component: Component) -> None:
    """Refuse a folder given for a component whose config says that it is of another class."""
    said = component.config.get("_class_name") or next(iter(component.config.get("architectures") or ()), None)
    if component.name in WEIGHTED and said not in (None, component.class_name):
        raise CheckpointError(
            f"{component.folder}: is a {said}, and the checkpoint's {component.name} is a {component.class_name}; give the "
            "folder of one"
        )


def check_tensors(component: Component, expected: dict[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> None:
    """Compare the component's tensors with `expected` (name to shape); names starting with `ignored` may be there, and in a
    single file may be missing.

    Raises CheckpointError naming every missing, surplus and misshapen tensor (the first few of each).
    """
    actual = component.tensors
    unread = ignored or ("\0",)
    # Files of weights alone leave out what is no weight; diffusers, which reads folders, wants it there.
    missing = [n for n in expected if n not in actual and not (component.file and n.startswith(unread))]
    surplus = [name for name in actual if name not in expected and not name.startswith(unread)]
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
    if not problems:
        return
    if component.file is None:
        raise CheckpointError(
            f"{component.folder}: its tensors do not match its config.json: {'; '.join(problems)}; "
            "use the checkpoint as published, or mend its config"
        )
    if not any(name in actual for name in expected):
        raise CheckpointError(
            f"{component.file}: these are not the weights of a {component.class_name}: it holds {', '.join([*actual][:4])}...; "
            f"give a file of the {component.name} alone, in diffusers' layout or Black Forest Labs'"
        )
    raise CheckpointError(
        f"{component.file}: its tensors do not match {component.folder / 'config.json'}: {'; '.join(problems)}; "
        "give a file of the model that model.source is, whole"
    )
