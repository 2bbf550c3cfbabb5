"""Holds the plain values of a recipe against its structs: every unknown field, wrong type and impossible value, in words.

msgspec stops at the first fault and words it for programmers. What passes here, msgspec converts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

from fluxc.base.errors import nearest
from fluxc.recipe.faults import Fault
from fluxc.recipe.fields import NAMES
from fluxc.recipe.targets import TARGETS, Target
from fluxc.recipe.words import flow, limits, shown, wanted, without_links

RENAMED = {"keep": "exclude", "longest_run": "max_consecutive_skips", "elsewhere": "on_mismatch"}
"""Fields of older recipes by what they are called now."""
BAD = object()
"""In place of a value that cannot be."""


class Conform:
    """Checks values and collects `faults`."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def struct(
        self, kind: type[msgspec.Struct], data: Any, field: str = "", skip: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """`data` as a mapping that msgspec converts to `kind`: what cannot be is replaced by its default, or where it has none
        by an example; fields of `skip` are taken as they are."""
        found: dict[str, Any] = {}
        fields = {each.encode_name: each for each in fields_of(kind)}
        misspelt = ""
        for key, value in data.items():
            place = f"{field}.{key}" if field else key
            if key not in fields:
                if key not in skip:
                    misspelt += self._unknown(key, place, fields)
                continue
            checked = self.value(fields[key].type, value, place)
            if checked is not BAD:
                found[key] = checked
        for name, each in fields.items():
            if each.required and name not in found:
                about = (each.type.extra_json_schema or {}) if isinstance(each.type, inspect.Metadata) else {}
                examples = about.get("examples") or [None]
                found[name] = examples[0]
                if name not in data and repr(name) not in misspelt:
                    what = re.split("[:;(]", without_links(about.get("description", "")), maxsplit=1)[0].strip()
                    self._refuse(
                        f"{field}.{name}" if field else name, f"is missing, and required: {what}; {_example(examples)}"
                    )
        return {key: data[key] for key in skip if key in data} | found

    def _refuse(self, field: str, why: str) -> Any:
        self.faults.append(Fault(field, f"{field}: {why}"))
        return BAD

    def _unknown(self, key: str, place: str, fields: Mapping[str, Any]) -> str:
        """Note the fault; its sentence, which names the fields that may be meant."""
        close = nearest(key, fields)
        if RENAMED.get(key) in fields:
            text = f"the field {place!r} is called {RENAMED[key]!r} now"
        else:
            text = f"unknown field {place!r}{close or '.'} The fields here are: {', '.join(fields)}."
        self.faults.append(Fault(place, text))
        return close

    def value(self, kind: inspect.Type, value: Any, field: str, examples: list[Any] | None = None) -> Any:
        """`value` if it is of `kind`, else BAD, with the fault noted; `examples` are of the list that it is an item of."""
        examples = examples or []
        names: tuple[str, Mapping[str, str]] | None = None
        while isinstance(kind, inspect.Metadata):
            examples = examples or (kind.extra_json_schema or {}).get("examples", [])
            names = (kind.extra or {}).get(NAMES, names)
            kind = kind.type
        members = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
        for member in members:
            inner, named = _bare(member, names)
            if _suits(inner, value):
                return self._member(inner, value, field, named, examples)
        words = [word for member in members for word in _literal(_bare(member)[0])]
        if words and isinstance(value, str):
            others = [wanted(member) for member in members if not _literal(_bare(member)[0]) and wanted(member)]
            can = f"{', '.join(words)}{''.join(f', or {other}' for other in others)}"
            return self._refuse(field, f"{shown(value)} is not possible{nearest(value, words) or '.'} It can be {can}")
        is_text = any(isinstance(_bare(member)[0], inspect.StrType) for member in members)
        quoted = "; write it in quotes" if is_text and isinstance(value, bool | int | float) else ""
        return self._refuse(field, f"must be {wanted(kind)}, got {shown(value)}{quoted}{_for_example(examples)}")

    def _member(
        self,
        kind: inspect.Type,
        value: Any,
        field: str,
        names: tuple[str, Mapping[str, str]] | None,
        examples: list[Any],
    ) -> Any:
        """`value`, whose kind is right: its parts, its limits, or the names it can be."""
        if isinstance(kind, inspect.StructType):
            return self._part(kind.cls, value, field)
        if isinstance(kind, inspect.VarTupleType | inspect.TupleType):
            return self._list(kind, value, field, examples)
        why = limits(kind, value)
        if why:
            return self._refuse(field, f"must be {why}, got {shown(value)}")
        if names and value not in names[1]:
            what, known = names
            close = nearest(value, known) or "."
            return self._refuse(field, f"there is no {what} {shown(value)}{close} It can be {', '.join(known)}")
        return value

    def _part(self, kind: type[msgspec.Struct], value: Any, field: str) -> Any:
        if kind is Target:
            return self._target(value, field)
        short = getattr(kind, "short_form", None)
        return self.struct(kind, {short: value} if isinstance(value, str) else value, field)

    def _list(
        self, kind: inspect.VarTupleType | inspect.TupleType, value: list[Any], field: str, examples: list[Any]
    ) -> Any:
        if isinstance(kind, inspect.VarTupleType):
            if len(value) < (kind.min_length or 0):
                return self._refuse(field, f"give at least one{_for_example(examples)}")
            kinds = (kind.item_type,) * len(value)
        else:
            kinds = kind.item_types
            if len(value) != len(kinds):
                return self._refuse(field, f"must be {wanted(kind)}, got {len(value)} of them{_for_example(examples)}")
        items = [
            self.value(each, item, f"{field}[{at}]", examples)
            for at, (each, item) in enumerate(zip(kinds, value, strict=True))
        ]
        return BAD if any(item is BAD for item in items) else items

    def _target(self, entry: dict[str, Any], field: str) -> Any:
        """An entry of `targets`: the fields of its kind, and for options that only other kinds have, which those are."""
        kind = entry.get("kind")
        if "kind" not in entry:
            return self._refuse(f"{field}.kind", f"say what kind of target it is. It can be {', '.join(TARGETS)}")
        if not isinstance(kind, str) or kind not in TARGETS:
            close = nearest(kind, TARGETS) if isinstance(kind, str) else ""
            return self._refuse(
                f"{field}.kind", f"{shown(kind)} is not possible{close or '.'} It can be {', '.join(TARGETS)}"
            )
        options = {each.encode_name: each.type for each in fields_of(TARGETS[kind])}
        rest = {}
        for option, value in entry.items():
            others = [other for other, struct in TARGETS.items() if option in struct.__struct_fields__]
            if option != "kind" and option not in options and others:
                self._refuse(
                    f"{field}.{option}",
                    f"a target of kind {kind} has no such option, those of kind {' and '.join(others)} have. Its options "
                    f"are: {', '.join(options)}.",
                )
            elif (
                isinstance(value, list) and option in options and isinstance(_bare(options[option])[0], inspect.IntType)
            ):
                self._refuse(f"{field}.{option}", f"a target of kind {kind} takes one number; make a target of each")
            else:
                rest[option] = value
        return self.struct(TARGETS[kind], rest, field, skip=("kind",))


@cache
def fields_of(kind: type[msgspec.Struct]) -> tuple[inspect.Field, ...]:
    """The fields of a struct, with what is said about them."""
    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    return found.fields


def _bare(kind: inspect.Type, names: Any = None) -> tuple[inspect.Type, Any]:
    """The type without what is said about it, and the names it can be."""
    while isinstance(kind, inspect.Metadata):
        names = (kind.extra or {}).get(NAMES, names)
        kind = kind.type
    return kind, names


def _literal(kind: inspect.Type) -> Iterable[str]:
    return [str(value) for value in kind.values] if isinstance(kind, inspect.LiteralType) else []


def _suits(kind: inspect.Type, value: Any) -> bool:
    """Whether a plain value can be of this kind at all, whatever its limits."""
    if isinstance(value, bool):
        return isinstance(kind, inspect.BoolType)
    if isinstance(kind, inspect.LiteralType):
        return value in kind.values
    if isinstance(kind, inspect.StructType):
        return isinstance(value, dict) or (isinstance(value, str) and hasattr(kind.cls, "short_form"))
    suited: dict[type[Any], tuple[type[Any], ...]] = {
        inspect.NoneType: (type(None),),
        inspect.StrType: (str,),
        inspect.IntType: (int,),
        inspect.FloatType: (int, float),
        inspect.VarTupleType: (list,),
        inspect.TupleType: (list,),
    }
    return isinstance(value, suited.get(type(kind), ()))


def _example(examples: list[Any]) -> str:
    return f"for example {flow(examples[0])}"


def _for_example(examples: list[Any]) -> str:
    return f"; {_example(examples)}" if examples else ""
