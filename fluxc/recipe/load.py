"""Reads a recipe from YAML, changes fields from the command line, and names the field of every error."""

from __future__ import annotations

import re
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.errors import RecipeError
from fluxc.recipe.checks import faults_between
from fluxc.recipe.conform import Conform
from fluxc.recipe.document import is_control, read_document
from fluxc.recipe.faults import SHOWN, Places, raise_faults, told
from fluxc.recipe.structs import Recipe
from fluxc.recipe.targets import TARGETS


class LoadedRecipe(msgspec.Struct, frozen=True):
    """A recipe with the folder its relative paths start from, the prompt files that were read (each is read once), the places
    its fields were written at, and the commits of hub ids that were opened (each stays at its commit)."""

    recipe: Recipe
    folder: Path
    files: dict[Path, list[str]] = {}
    places: Places = Places()
    commits: dict[str, str] = {}

    def path(self, field: str, file: str) -> Path:
        """The file that the recipe names: relative to its folder, `~` is the home folder; RecipeError names `field`."""
        try:
            return self.folder / Path(file).expanduser()
        except RuntimeError as error:
            raise RecipeError(f"{field}: {file}: {error}; write the whole path") from error

    def prompts(self, field: str, file: str) -> list[str]:
        """The lines of a prompt file, without empty ones and `#` comments; RecipeError names `field`."""
        path = self.path(field, file)
        if path not in self.files:
            self.files[path] = _read_prompts(field, path)
        return list(self.files[path])


def _read_prompts(field: str, path: Path) -> list[str]:
    # A byte order mark is at the start of a file, and of each part of one that was put together from several.
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"{field}: {path} is not a file; give a text file, one prompt a line")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{field}: cannot read {path}: {_reason(error)}; give a text file, one prompt a line"
        ) from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        prompt = line.strip("\ufeff").strip()
        if not prompt or prompt.startswith("#"):
            continue
        odd = next((character for character in prompt if is_control(character) and character != "\t"), None)
        if odd:
            raise RecipeError(f"{field}: {path}, line {number}: holds the control character {odd!r}; take it out")
        prompts.append(prompt)
    if not prompts:
        raise RecipeError(f"{field}: {path} holds no prompts; write one a line")
    return prompts


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text ({error.reason} at byte {error.start})"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def load_recipe(path: str | Path, changes: tuple[str, ...] = ()) -> LoadedRecipe:
    """Read `path`, apply `changes` ("a.b=value", the value in YAML), and check every field.

    Raises RecipeError with everything that is wrong: each fault after the line or the change it comes from, with its field and,
    for a misspelt one, the nearest valid field.
    """
    path = Path(path)
    check_is_recipe(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {_reason(error)}") from error
    lines: dict[str, int] = {}
    try:
        data = read_document(text, lines=lines)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of fields; `fluxc init` writes one, docs/recipe.md explains them"
        )
    places = Places(str(path), lines, tuple((_apply_change(data, change), change) for change in changes))
    conform = Conform()
    plain = conform.struct(Recipe, data)
    recipe = _converted(plain)
    faults = [*conform.faults, *faults_between(recipe, conform.faults)]
    if faults:
        raise_faults(faults, places)
    if recipe.step_cache and recipe.step_cache.skip is None and recipe.step_cache.max_error is None:
        recipe = msgspec.structs.replace(recipe, step_cache=msgspec.structs.replace(recipe.step_cache, skip="auto"))
    return LoadedRecipe(recipe, path.resolve().parent, {}, places)


def check_is_recipe(path: Path) -> None:
    """Refuse what people give for a recipe that is none: a checkpoint, a bundle, a hub id. RecipeError says what to do."""
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {str(path)[:SHOWN]}...: {_reason(error)}") from error
    if is_folder:
        if (path / "bundle.json").is_file():
            raise RecipeError(
                f"{path}: is a bundle, which is built already; `fluxrt generate {path} --prompt TEXT --out image.png` "
                "generates with it. To build, give a recipe: `fluxc init` writes one"
            )
        if (path / "model_index.json").is_file():
            raise RecipeError(f"{path}: is a checkpoint, not a recipe; `fluxc init {path}` writes a recipe for it")
        raise RecipeError(f"{path}: is a folder, not a recipe; give a YAML file, which `fluxc init MODEL` writes")
    if not is_there:
        is_model = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) and path.suffix not in (".yaml", ".yml")
        model = str(path) if is_model else "MODEL"
        what = "; if it is a model," if is_model else ", give one of recipes/;"
        raise RecipeError(f"cannot read the recipe {path}: no such file{what} `fluxc init {model}` writes a recipe")


def _converted(plain: dict[str, Any]) -> Recipe:
    """The struct of values that conform. Kinds of targets are registered at run time, so their union is made here."""
    union: Any = reduce(or_, TARGETS.values())
    wanted: Any = tuple[union, ...]
    targets = msgspec.convert(plain["targets"], wanted, strict=True)
    recipe = msgspec.convert(plain | {"targets": [{"kind": "Target"}]}, Recipe, strict=True)
    return msgspec.structs.replace(recipe, targets=targets)


def _apply_change(data: dict[str, Any], change: str) -> str:
    """Write the value of `change` into `data`; the field it names."""
    where, equals, value = change.partition("=")
    if not equals or not where or not all(where.split(".")):
        raise RecipeError(f"--set {told(change)}: write it as field.sub_field=value")
    if "[" in where:
        field = where.partition("[")[0]
        raise RecipeError(
            f"--set {told(change)}: an entry of a list cannot be changed by itself; give the whole list, --set '{field}=[...]'"
        )
    try:
        parsed = read_document(value, where)
    except ValueError as error:
        said = re.sub(r" \(line 1, column \d+\)$", "", str(error))
        raise RecipeError(f"--set {told(change)}: {said}") from error
    *parents, last = where.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise RecipeError(f"--set {told(change)}: {parent!r} is not a mapping, so it has no fields to set")
    data[last] = parsed
    return where
