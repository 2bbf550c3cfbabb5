"""Types and values of a recipe in words, as errors and docs/recipe.md use them."""

from __future__ import annotations

import json
import re
from typing import Any

from msgspec import inspect

LONGEST = 40
"""Characters of a value that a message repeats."""
PLAIN = re.compile(r"[A-Za-z_./~][\w./~ -]*")
"""Words that YAML reads as they are, in a list too."""
LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
"""Of Markdown."""


def without_links(text: str) -> str:
    """A description without the links that it has on a page."""
    return LINK.sub(r"\1", text)


def shown(value: Any) -> str:
    """A value as a message repeats it."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping of fields" if value else "an empty mapping"
    if isinstance(value, list):
        return _cut(flow(value)) if len(value) <= 4 else f"a list of {len(value)}"
    if isinstance(value, bool):
        return str(value).lower()
    return _cut(repr(value) if isinstance(value, str) else str(value))


def flow(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(flow, value))}]"
    if isinstance(value, str):
        is_word = value.lower() in ("null", "true", "false") or not PLAIN.fullmatch(value)
        return json.dumps(value, ensure_ascii=False) if is_word else value
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def wanted(kind: inspect.Type) -> str:
    """What a value of this type is: "a whole number", "a list of text"."""
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.UnionType):
        return " or ".join(filter(None, map(wanted, kind.types)))
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(map(str, kind.values))
    if isinstance(kind, inspect.VarTupleType):
        return f"a list of {_several(kind.item_type)}"
    if isinstance(kind, inspect.TupleType):
        return f"a list of {len(kind.item_types)} {_several(kind.item_types[0])}"
    singular = {
        inspect.StrType: "text",
        inspect.IntType: "a whole number",
        inspect.FloatType: "a number",
        inspect.StructType: "a mapping of fields",
        inspect.NoneType: "",
    }
    return singular[type(kind)]


def _several(kind: inspect.Type) -> str:
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.TupleType):
        return f"lists of {len(kind.item_types)} {_several(kind.item_types[0])}"
    plural = {
        inspect.StrType: "texts",
        inspect.IntType: "whole numbers",
        inspect.FloatType: "numbers",
        inspect.StructType: "mappings of fields",
    }
    return plural[type(kind)]


def limits(kind: inspect.Type, value: Any = None) -> str:
    """The limits of a number: "at least 1 and at most 5"; the empty string where it has none, or `value` is within them."""
    if not isinstance(kind, inspect.IntType | inspect.FloatType):
        return ""
    bounds = (
        ("at least", kind.ge, lambda limit: value >= limit),
        ("more than", kind.gt, lambda limit: value > limit),
        ("at most", kind.le, lambda limit: value <= limit),
        ("less than", kind.lt, lambda limit: value < limit),
    )
    given = [(words, limit, holds) for words, limit, holds in bounds if limit is not None]
    if value is not None and all(holds(limit) for _, limit, holds in given):
        return ""
    return " and ".join(f"{words} {limit:g}" for words, limit, _ in given)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
