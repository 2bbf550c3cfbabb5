"""The JSON schema of a recipe, made of the structs: for editors, and for whoever checks recipes without fluxc."""

from __future__ import annotations

import json
from functools import reduce
from operator import or_
from typing import Any

import msgspec

from fluxc.recipe.structs import Recipe
from fluxc.recipe.targets import TARGETS, Allow
from fluxc.recipe.words import without_links

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FILE = "recipe.schema.json"


def recipe_schema() -> dict[str, Any]:
    """The schema; `targets` is a union by `kind` of all kinds that are registered.

    What a schema cannot say is checked by `fluxc plan`: fields that do not go together, patterns, sizes, files, hashes.
    """
    union: Any = reduce(or_, TARGETS.values())
    (_, targets), parts = msgspec.json.schema_components((Recipe, union), ref_template="#/$defs/{name}")
    parts["Recipe"]["properties"]["targets"]["items"] = targets
    del parts["Target"]
    parts[Allow.__name__] = {"anyOf": [{"type": "string", "description": "a pattern alone"}, parts[Allow.__name__]]}
    recipe = parts.pop("Recipe")
    whole: dict[str, Any] = {"$schema": DIALECT, **recipe, "title": "Recipe of fluxc", "$defs": parts}
    plain: dict[str, Any] = _plain(whole)
    return plain


def schema_text() -> str:
    """The schema as the file that is kept beside recipes."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """The schema with descriptions that an editor shows: without the links of docs/recipe.md."""
    if isinstance(value, dict):
        texts = (
            {"description": without_links(value["description"])} if isinstance(value.get("description"), str) else {}
        )
        return {name: _plain(item) for name, item in value.items()} | texts
    return [_plain(item) for item in value] if isinstance(value, list) else value
