"""Reads a recipe from YAML, changes fields from the command line, and names the field of every error."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
import yaml

from fluxc.base.errors import RecipeError, nearest
from fluxc.recipe.checks import check_values
from fluxc.recipe.structs import TARGET_KINDS, USUAL_CAPABILITIES, Recipe, Target


class LoadedRecipe(msgspec.Struct, frozen=True):
    """A recipe with the folder its relative paths start from."""

    recipe: Recipe
    folder: Path

    def prompts(self, field: str, file: str) -> list[str]:
        """The lines of a prompt file, without empty ones and `#` comments; RecipeError names `field`."""
        path = self.folder / file
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{field}: cannot read {path}: {error}") from error
        prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not prompts:
            raise RecipeError(f"{field}: {path} holds no prompts; write one a line")
        return prompts


def load_recipe(path: str | Path, changes: tuple[str, ...] = ()) -> LoadedRecipe:
    """Read `path`, apply `changes` ("a.b=value", the value in YAML), and check every field.

    Raises RecipeError naming the file, the field and, for a misspelt one, the nearest valid field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields; see recipes/flux2-nano.yaml")
    for change in changes:
        _apply_change(data, change)
    _check_kinds(data, str(path))
    _spell_out(data)
    _check_fields(data, Recipe, "", str(path))
    try:
        recipe = msgspec.convert(data, Recipe, strict=True)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{path}: {str(error).replace('$.', '')}") from error
    check_values(recipe, path)
    if recipe.step_cache and recipe.step_cache.skip is None and recipe.step_cache.max_error is None:
        recipe = msgspec.structs.replace(recipe, step_cache=msgspec.structs.replace(recipe.step_cache, skip="auto"))
    recipe = msgspec.structs.replace(recipe, targets=tuple(_with_defaults(target) for target in recipe.targets))
    return LoadedRecipe(recipe, path.resolve().parent)


RENAMED = {"keep": "exclude", "longest_run": "max_consecutive_skips", "elsewhere": "on_mismatch"}
"""Fields of older recipes by what they are called now."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this loader refuses them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"the field {key!r} appears twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _apply_change(data: dict[str, Any], change: str) -> None:
    where, equals, value = change.partition("=")
    if not equals or not where:
        raise RecipeError(f"--set {change}: write it as field.sub_field=value")
    try:
        parsed = yaml.load(value, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {change}: the value is not valid YAML: {error}") from error
    *parents, last = where.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {change}: {parent!r} is not a mapping, so it has no fields to set")
    data[last] = parsed


def _check_kinds(data: dict[str, Any], file: str) -> None:
    """Refuse a target of a kind that there is not, with the nearest one that there is."""
    targets = data.get("targets")
    for target in targets if isinstance(targets, list) else ():
        kind = target.get("kind") if isinstance(target, dict) else None
        if isinstance(kind, str) and kind not in TARGET_KINDS:
            raise RecipeError(
                f"{file}: targets.kind: {kind!r} is not possible{nearest(kind, TARGET_KINDS) or '.'} It can be "
                f"{', '.join(TARGET_KINDS)}"
            )


def _spell_out(data: dict[str, Any]) -> None:
    """Write short forms in full: a pattern alone in a target's `allow`."""
    targets = data.get("targets")
    for target in targets if isinstance(targets, list) else ():
        allowed = target.get("allow") if isinstance(target, dict) else None
        if isinstance(allowed, list):
            target["allow"] = [{"layer": entry} if isinstance(entry, str) else entry for entry in allowed]


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


def _with_defaults(target: Target) -> Target:
    """`target` with the GPUs that its library is used for most, if it names none."""
    if not target.is_tensorrt or target.compute_capabilities:
        return target
    return msgspec.structs.replace(target, compute_capabilities=USUAL_CAPABILITIES[target.kind])
