"""What `model` of a recipe names: folders, files, hub ids, files on the hub. Told apart by form; nothing is fetched or read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fluxc.base.errors import RecipeError
from fluxc.recipe.structs import Model

PARTS = ("transformer", "text_encoder", "vae", "tokenizer")
"""Components that a recipe can take from elsewhere."""
SAFETENSORS = (".safetensors", ".sft")
ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/(.+)")


@dataclass(frozen=True)
class OnHub:
    """A repository `owner/name` of the hub at a branch, tag or commit, or, with `file`, a file in it."""

    repo: str
    revision: str | None = None
    file: str = ""


def parts_of(model: Model) -> dict[str, str]:
    """The components that the recipe takes from elsewhere than `source`, and from where."""
    return {name: place for name in PARTS if (place := getattr(model, name)) is not None}


def named_source(source: str, revision: str | None, folder: Path) -> Path | OnHub:
    """The folder or the hub id that `source` names, relative to `folder`; RecipeError if it is neither by its form."""
    local = folder / _expanded("source", source)
    if local.is_dir():
        return local.resolve()
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith(SAFETENSORS):
        if local.is_file():
            raise RecipeError(
                f"model.source: {local}: is a file; give a diffusers folder or a hub id (owner/name), which has the configs; a "
                "file of weights goes into model.transformer, model.text_encoder or model.vae"
            )
        raise RecipeError(f"model.source: {local}: no such folder; give a diffusers folder, or a hub id (owner/name)")
    return OnHub(source, revision)


def named_part(name: str, place: str, folder: Path) -> Path | OnHub:
    """The folder or file that stands in for component `name`, relative to `folder`, or the file on the hub.

    RecipeError for what is not there, or cannot hold this component.
    """
    local = folder / _expanded(name, place)
    if local.is_dir():
        _check_folder(name, local)
        return local.resolve()
    if name == "tokenizer":
        raise RecipeError(
            f"model.tokenizer: {local}: no such folder; give a tokenizer's folder, with its tokenizer.json"
        )
    if not place.endswith(SAFETENSORS):
        raise RecipeError(
            f"model.{name}: {local}: {_no_weights(local)}; give one .safetensors file of its weights, or the component's "
            "folder with its config.json"
        )
    if local.is_file():
        return local.resolve()
    on_hub = ON_HUB.fullmatch(place)
    if on_hub is None or place.startswith((".", "/", "~")):
        raise RecipeError(
            f"model.{name}: {local}: no such file; give the path of a file or a folder relative to the recipe"
        )
    return OnHub(on_hub[1], on_hub[2], on_hub[3])


def faults_of(model: Model, folder: Path) -> Iterator[RecipeError]:
    """What is wrong with what `model` names, by its form and by the files that are here."""
    for check in (
        lambda: named_source(model.source, model.revision, folder),
        *(lambda name=name, place=place: named_part(name, place, folder) for name, place in parts_of(model).items()),
    ):
        try:
            check()
        except RecipeError as error:
            yield error


def _check_folder(name: str, folder: Path) -> None:
    if (folder / "model_index.json").is_file():
        inner = f": give {folder / name}" if (folder / name).is_dir() else ""
        raise RecipeError(f"model.{name}: {folder}: is a whole checkpoint, not the folder of its {name}{inner}")
    wanted = "tokenizer.json" if name == "tokenizer" else "config.json"
    if not (folder / wanted).is_file():
        files = (
            ""
            if name == "tokenizer"
            else "; a single file of weights is named itself, and has its config from model.source"
        )
        raise RecipeError(f"model.{name}: {folder}: there is no {wanted}, so this is not the folder of a {name}{files}")


def _no_weights(local: Path) -> str:
    """Why `local`, which is no safetensors file by its name, cannot be read."""
    if local.suffix == ".gguf":
        return "GGUF files hold weights quantized in other formats, which fluxc does not read"
    if local.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        return "fluxc does not read pickled weights, which could run code"
    return "is not a safetensors file" if local.is_file() else "no such file or folder"


def _expanded(field: str, place: str) -> Path:
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"model.{field}: {place}: {error}; write the whole path") from error
