"""Which files hold a component's weights: one list, which every reader reads.

1. NAME.safetensors.index.json names them; without an index, the folder's one safetensors file does.
2. A variant (`model.variant`) is a word in the name, NAME.fp16.safetensors. Files of the variant asked for are taken, in a
   component that has none of it those without a word; files of other variants are left alone, as diffusers leaves them.
3. A folder is refused in which two readers could find two models: several indexes, several files without an index, or a file
   beside an index that does not name it. diffusers prefers the index, transformers the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fluxc.base.errors import CheckpointError
from fluxc.base.json_object import as_struct, read_json

INDEX_NAME = re.compile(r"\.safetensors\.index(\.[^.]+)?\.json$")
SHARD = re.compile(r"-(\d+)-of-(\d+)(?=\.)")


@dataclass(frozen=True)
class WeightFiles:
    """A component's weights: `files` in order and, where an index names them, the file of every tensor."""

    files: tuple[Path, ...]
    weight_map: dict[str, str] | None = None


def is_index(name: str) -> bool:
    """Whether a file of this name is the index of a variant, or of the weights without one."""
    return INDEX_NAME.search(name) is not None


def variant_of(name: str) -> str | None:
    """The variant that a weights file or an index is of, by its name; None for NAME.safetensors."""
    words = SHARD.sub("", name).split(".")[1:]
    return ".".join(word for word in words if word not in ("safetensors", "index", "json")) or None


def find_weights(folder: Path, variant: str | None = None) -> WeightFiles:
    """The weights in the component's `folder`; CheckpointError where they are missing, incomplete or ambiguous."""
    named = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    named = [path for path in named if path.name.endswith(".safetensors") or is_index(path.name)]
    found = [path for path in named if variant_of(path.name) == variant]
    if variant is not None and not found:
        found = [path for path in named if variant_of(path.name) is None]
    indexes = [path for path in found if is_index(path.name)]
    files = [path for path in found if path not in indexes]
    if len(indexes) > 1:
        raise CheckpointError(f"{folder}: two indexes, {_names(indexes)}, name its weights; remove one, and its files")
    if indexes:
        return _of_index(indexes[0], files)
    if len(files) == 1 and not _is_one_of_several(files[0].name):
        return WeightFiles((_existing(files[0]),))
    if files:
        several = f"{len(files)} weights files, {_names(files)}" if len(files) > 1 else f"one shard, {files[0].name},"
        raise CheckpointError(
            f"{folder}: {several} and no index ({folder.name}'s NAME.safetensors.index.json) that says which belong "
            "together; download the index too, or leave one file"
        )
    others = sorted({word for path in named if (word := variant_of(path.name)) is not None})
    if others:
        raise CheckpointError(
            f"{folder}: its weights are there as the variant {' and '.join(map(repr, others))} alone; "
            f"set model.variant: {others[0]} to take them"
        )
    raise CheckpointError(f"{folder}: no safetensors weights; the checkpoint is incomplete, or holds another format")


def has_variant(folder: Path, variant: str) -> bool:
    """Whether the component's `folder` has weights of `variant`."""
    return any(path.suffix == ".safetensors" and variant_of(path.name) == variant for path in folder.iterdir())


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _of_index(index: Path, beside: list[Path]) -> WeightFiles:
    weight_map = as_struct(_Index, read_json(index), index).weight_map
    if not weight_map:
        raise CheckpointError(f"{index}: its weight_map is empty; download the index again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map names {name!r}, which is no safetensors file of this folder; use the index as published"
            )
    files = tuple(_existing(index.parent / name) for name in names)
    stray = [path for path in beside if path.name not in names]
    if stray:
        raise CheckpointError(
            f"{index.parent}: {_names(stray)} is not in {index.name}, so readers would differ in which weights they take; "
            f"remove it, or remove the index and its {len(names)} files"
        )
    return WeightFiles(files, weight_map)


def _existing(path: Path) -> Path:
    try:
        if path.is_file():
            return path
        what = "is a folder, not a weights file" if path.is_dir() else "is not there"
    except OSError as error:
        what = f"cannot be reached ({error.strerror})"
    raise CheckpointError(f"{path}: {what}; download the checkpoint again")


def _is_one_of_several(name: str) -> bool:
    found = SHARD.search(name)
    return found is not None and int(found[2]) > 1


def _names(paths: list[Path]) -> str:
    shown = [path.name for path in paths[:3]]
    return ", ".join(shown) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
