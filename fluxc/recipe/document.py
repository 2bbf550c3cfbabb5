"""Reads YAML 1.2 as plain values, and refuses whatever in it could mean something else than it says."""

from __future__ import annotations

import math
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

LARGEST = 1 << 20
"""Characters of a document."""
DEEPEST = 20
MOST_VALUES = 20_000
"""Of a document with its aliases written out."""


def read_document(text: str, where: str = "", lines: dict[str, int] | None = None) -> Any:
    """`text` as dict, list, str, int, float, bool or None. ValueError says what is wrong and in which line; `where` is the
    field that the document is the value of, for errors that name one. `lines` is given the line of every field and list item,
    under names as "a.b[2].c".

    1. The language is YAML 1.2: yes, on, 1:30 and 2026-01-01 are words, 010 is ten.
    2. Keys are words, and none appears twice in a mapping. There are no merge keys (`<<`) and no tags.
    3. Numbers are finite; words hold no control characters.
    4. An alias stands for the value at its anchor; depth and number of values are bounded with aliases written out.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{len(text):,} characters are too many to be a recipe (at most {LARGEST:,})")
    odd = next((at for at, character in enumerate(text) if is_control(character) and character not in "\t\n\r"), None)
    if odd is not None:
        line = text.count("\n", 0, odd) + 1
        raise ValueError(f"not valid YAML: the character {text[odd]!r} (line {line})")
    try:
        _check_events(text)
        node = _yaml().compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        raise ValueError(f"not valid YAML: {problem}{_place(mark)}") from error
    except YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error
    return _Values({} if lines is None else lines).of(node, where, 0) if node is not None else None


def is_control(character: str) -> bool:
    """Whether no file name, pattern or prompt has reason to hold `character`: a control character, or half a surrogate pair."""
    code = ord(character)
    return code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def _check_events(text: str) -> None:
    """Refuse what the composer must not see: it calls itself for each level, and resolves by the version that a file states."""
    depth = 0
    for event in _yaml().parse(text):
        if isinstance(event, DocumentStartEvent) and event.version and tuple(event.version) != (1, 2):
            raise ValueError(f"recipes are YAML 1.2; leave the %YAML directive out{_place(event.start_mark)}")
        if isinstance(event, MappingEndEvent | SequenceEndEvent):
            depth -= 1
        if isinstance(event, MappingStartEvent | SequenceStartEvent | ScalarEvent) and event.tag:
            raise ValueError(f"a tag ({event.tag}) means nothing in a recipe; leave it out{_place(event.start_mark)}")
        if isinstance(event, MappingStartEvent | SequenceStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} levels deep{_place(event.start_mark)}")


class _Values:
    """Makes values of nodes, counts them, and notes the lines they stand in."""

    def __init__(self, lines: dict[str, int]) -> None:
        self._count = 0
        self._lines = lines

    def of(self, node: Node, where: str, depth: int) -> Any:
        """The value of `node`, the field `where`."""
        self._count += 1
        if self._count > MOST_VALUES or depth > DEEPEST:
            limits = f"{MOST_VALUES:,} values or {DEEPEST} levels"
            raise ValueError(f"with its aliases written out it is more than {limits}{_place(node.start_mark)}")
        if isinstance(node, SequenceNode):
            self._lines |= {f"{where}[{at}]": item.start_mark.line + 1 for at, item in enumerate(node.value)}
            return [self.of(item, f"{where}[{at}]", depth + 1) for at, item in enumerate(node.value)]
        if isinstance(node, MappingNode):
            return self._mapping(node, where, depth)
        assert isinstance(node, ScalarNode)
        return _scalar(node, where)

    def _mapping(self, node: MappingNode, where: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = _place(key_node.start_mark)
            if not isinstance(key_node, ScalarNode):
                what = "list" if isinstance(key_node, SequenceNode) else "mapping"
                raise ValueError(f"a {what} cannot be the name of a field{place}")
            if key_node.value == "<<" and key_node.style is None:
                raise ValueError(f"`<<` (a merge key) is not YAML 1.2; write the fields out{place}")
            key = _scalar(key_node, where)
            if not isinstance(key, str):
                raise ValueError(f"{key_node.value!r} cannot be the name of a field, which is a word{place}")
            if key in found:
                raise ValueError(f"the field {key!r} appears twice{place}")
            name = f"{where}.{key}" if where else key
            self._lines[name] = key_node.start_mark.line + 1
            found[key] = self.of(value_node, name, depth + 1)
        return found


def _scalar(node: ScalarNode, where: str) -> Any:
    text: str = node.value
    kind = str(node.tag).rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind in ("int", "float"):
        value = _number(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: must be a finite number, got {text[:40]}{_place(node.start_mark)}")
        if isinstance(value, int) and abs(value) >= 1 << 64:
            raise ValueError(f"{where}: {text[:40]} has more than 64 bits{_place(node.start_mark)}")
        return text if value is None else value
    if any(map(is_control, text)):
        raise ValueError(f"{where}: {text[:40]!r} holds a control character{_place(node.start_mark)}")
    return text


def _number(text: str) -> int | float | None:
    """The number that `text` is, None if it is too long for one or none after all."""
    plain = text.replace("_", "").lower()
    digits = plain.lstrip("+-")
    try:
        if digits[:2] in ("0x", "0o", "0b"):
            return int(plain, 0)
        return int(plain) if digits.isdigit() else float(plain.replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, OverflowError):
        return None


def _place(mark: Any) -> str:
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
