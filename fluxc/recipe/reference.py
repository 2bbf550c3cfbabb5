"""The tables of docs/recipe.md, made of the structs. `python -m fluxc.recipe.reference docs/recipe.md` writes them anew.

A line `<!-- fields: NAME -->` in the page is followed by the table of the struct NAME, up to `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from fluxc.recipe import structs
from fluxc.recipe.conform import fields_of
from fluxc.recipe.fields import LEFT_OUT, NAMES
from fluxc.recipe.structs import Recipe
from fluxc.recipe.targets import TARGETS, Allow
from fluxc.recipe.words import flow, wanted

MARKED = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADER = "| field | type | default | meaning | example |\n|---|---|---|---|---|\n"


def written_anew(page: str) -> str:
    """The page with every table as the structs have it; KeyError for a struct that there is not."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table_of(_struct(found[2]))}\n{found[3]}", page)


def table_of(kind: type[msgspec.Struct]) -> str:
    """A row a field, in the struct's order."""
    return HEADER + "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in map(_row, fields_of(kind)))


def _struct(name: str) -> type[msgspec.Struct]:
    found: dict[str, Any] = {**vars(structs), **TARGETS, Allow.__name__: Allow, Recipe.__name__: Recipe}
    struct: type[msgspec.Struct] = found[name]
    return struct


def _row(field: inspect.Field) -> tuple[str, ...]:
    assert isinstance(field.type, inspect.Metadata)
    about, extra = field.type.extra_json_schema or {}, field.type.extra or {}
    left_out = extra.get(LEFT_OUT)
    default = "**required**" if field.required else left_out or _default(field.default)
    return f"`{field.name}`", type_of(field.type), default, about["description"], f"`{flow(about['examples'][0])}`"


def _default(value: Any) -> str:
    """A default as a recipe would say it; of a struct, the fields that differ from the struct's own."""
    if value is None:
        return "not set"
    if isinstance(value, msgspec.Struct):
        plain = {f.name: getattr(value, f.name) for f in fields_of(type(value)) if getattr(value, f.name) != f.default}
        return f"`{flow(plain)}`" if plain else "defaults of its fields"
    return f"`{flow(msgspec.to_builtins(value))}`"


def type_of(kind: inspect.Type) -> str:
    """A type in words, with its limits: "whole number, 1 to 1000"."""
    if isinstance(kind, inspect.Metadata):
        names = (kind.extra or {}).get(NAMES)
        return " or ".join(f"`{name}`" for name in names[1]) if names else type_of(kind.type)
    if isinstance(kind, inspect.UnionType):
        members = [type_of(member) for member in kind.types if not isinstance(member, inspect.NoneType)]
        return " or ".join(members)
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(f"`{value}`" for value in kind.values)
    if isinstance(kind, inspect.TupleType | inspect.VarTupleType):
        return f"{wanted(kind).removeprefix('a ')}{_range(_innermost(kind))}"
    if isinstance(kind, inspect.StructType):
        return "fields"
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        name = "whole number" if isinstance(kind, inspect.IntType) else "number"
        return f"{name}{_range(kind)}"
    return "text"


def _innermost(kind: inspect.Type) -> inspect.Type:
    """What a list, or a list of lists, holds."""
    while isinstance(kind, inspect.Metadata | inspect.TupleType | inspect.VarTupleType):
        if isinstance(kind, inspect.TupleType):
            kind = kind.item_types[0]
        else:
            kind = kind.type if isinstance(kind, inspect.Metadata) else kind.item_type
    return kind


def _range(kind: inspect.Type) -> str:
    if not isinstance(kind, inspect.IntType | inspect.FloatType):
        return ""
    if kind.ge is not None and kind.le is not None:
        return f", {kind.ge:g} to {kind.le:g}"
    words = (("at least", kind.ge), ("more than", kind.gt), ("at most", kind.le), ("less than", kind.lt))
    given = [f"{word} {limit:g}" for word, limit in words if limit is not None]
    return f", {' and '.join(given)}" if given else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    _page = Path(sys.argv[1])
    _page.write_text(written_anew(_page.read_text(encoding="utf-8")), encoding="utf-8")
