"""Reads a recipe from YAML, changes fields from the command line, and names the field of every error."""

from __future__ import annotations

from functools import reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from fluxc.base.errors import RecipeError, nearest
from fluxc.recipe.checks import check_values
from fluxc.recipe.document import is_control, read_document
from fluxc.recipe.structs import Recipe
from fluxc.recipe.targets import TARGETS, Target


class LoadedRecipe(msgspec.Struct, frozen=True):
    """A recipe with the folder its relative paths start from, and the prompt files that were read: each is read once."""

    recipe: Recipe
    folder: Path
    files: dict[Path, list[str]] = {}

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

    Raises RecipeError naming the file, the field and, for a misspelt one, the nearest valid field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {_reason(error)}") from error
    try:
        data = read_document(text)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields; see recipes/flux2-nano.yaml")
    for change in changes:
        _apply_change(data, change)
    entries = data.get("targets")
    targets = _read_targets(entries, str(path)) if isinstance(entries, list) else ()
    data |= {"targets": []} if targets else {}
    _check_fields(data, Recipe, "", str(path))
    try:
        recipe = msgspec.convert(data, Recipe, strict=True)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{path}: {str(error).replace('$.', '')}") from error
    recipe = msgspec.structs.replace(recipe, targets=targets)
    check_values(recipe, path)
    if recipe.step_cache and recipe.step_cache.skip is None and recipe.step_cache.max_error is None:
        recipe = msgspec.structs.replace(recipe, step_cache=msgspec.structs.replace(recipe.step_cache, skip="auto"))
    return LoadedRecipe(recipe, path.resolve().parent)


RENAMED = {"keep": "exclude", "longest_run": "max_consecutive_skips", "elsewhere": "on_mismatch"}
"""Fields of older recipes by what they are called now."""


def _apply_change(data: dict[str, Any], change: str) -> None:
    where, equals, value = change.partition("=")
    if not equals or not where:
        raise RecipeError(f"--set {change}: write it as field.sub_field=value")
    try:
        parsed = read_document(value, where)
    except ValueError as error:
        raise RecipeError(f"--set {change}: {error}") from error
    *parents, last = where.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {change}: {parent!r} is not a mapping, so it has no fields to set")
    data[last] = parsed


def _read_targets(entries: list[Any], file: str) -> tuple[Target, ...]:
    """Each entry as the struct of its kind. Kinds are registered while the program runs, so their union is made here."""
    union: Any = reduce(or_, TARGETS.values())
    wanted: Any = tuple[union, ...]
    checked = [_checked_target(entry, f"targets[{at}]", file) for at, entry in enumerate(entries)]
    try:
        targets: tuple[Target, ...] = msgspec.convert(checked, wanted, strict=True)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{file}: {str(error).replace('`$', '`targets', 1)}") from error
    return targets


def _checked_target(entry: Any, where: str, file: str) -> Any:
    """The entry with short forms written in full; refuses a kind that there is not, and options that the kind has not."""
    if not isinstance(entry, dict):
        return entry
    if "kind" not in entry:
        raise RecipeError(f"{file}: {where}.kind: say what kind of target it is. It can be {', '.join(TARGETS)}")
    kind = entry["kind"]
    if not isinstance(kind, str) or kind not in TARGETS:
        raise RecipeError(
            f"{file}: {where}.kind: {kind!r} is not possible{nearest(str(kind), TARGETS) or '.'} It can be {', '.join(TARGETS)}"
        )
    options = {option: value for option, value in entry.items() if option != "kind"}
    types = {field.encode_name: field.type for field in msgspec.structs.fields(TARGETS[kind])}
    for option, value in options.items():
        others = [other for other, struct in TARGETS.items() if option in struct.__struct_fields__]
        if option not in types and others:
            raise RecipeError(
                f"{file}: {where}.{option}: a target of kind {kind} has no such option, those of kind {' and '.join(others)} "
                f"have. Its options are: {', '.join(types)}."
            )
        if isinstance(value, list) and types.get(option) is int:
            raise RecipeError(
                f"{file}: {where}.{option}: a target of kind {kind} takes one number; make a target of each"
            )
    if isinstance(options.get("allow"), list):
        options["allow"] = [{"layer": item} if isinstance(item, str) else item for item in options["allow"]]
    _check_fields(options, TARGETS[kind], f"{where}.", file)
    return {"kind": kind, **options}


def _check_fields(data: Any, kind: Any, where: str, file: str) -> None:
    """Refuse unknown fields and words with the nearest valid one, which msgspec's own error does not offer."""
    fields = {f.encode_name: f.type for f in msgspec.structs.fields(kind)}
    if not isinstance(data, dict):
        return
    for key, value in data.items():
        if key not in fields:
            place = f"{where}{key}"
            if RENAMED.get(str(key)) in fields:
                raise RecipeError(f"{file}: the field {place!r} is called {RENAMED[str(key)]!r} now")
            raise RecipeError(
                f"{file}: unknown field {place!r}{nearest(str(key), fields) or '.'} The fields here are: {', '.join(fields)}."
            )
        words = _words_of(fields[key])
        if words and isinstance(value, str) and value not in words:
            wanted = ", ".join(words) + (", or a list" if len(_parts_of(fields[key])) > 1 else "")
            raise RecipeError(
                f"{file}: {where}{key}: {value!r} is not possible{nearest(value, words) or '.'} It can be {wanted}"
            )
        for inner in _structs_in(fields[key]):
            for item in value if isinstance(value, list) else [value]:
                _check_fields(item, inner, f"{where}{key}.", file)


def _parts_of(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _words_of(kind: Any) -> list[str]:
    """The words a field can be, if it is a choice of words."""
    return [word for part in _parts_of(kind) if get_origin(part) is Literal for word in get_args(part)]


def _structs_in(kind: Any) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [found for part in getattr(kind, "__args__", ()) for found in _structs_in(part)]
