"""What is wrong with a recipe, all of it in one report: each fault with its field, and the line or --set it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from fluxc.base.errors import RecipeError

FIELD = re.compile(r"[a-z_]\w*(?:\.\w+|\[\d+\])*")
"""What an error about a recipe begins with."""
SHOWN = 80
"""Characters of a --set that a message repeats."""


@dataclass(frozen=True)
class Fault:
    """A field, and a sentence about it that names it."""

    field: str
    text: str


class Places(msgspec.Struct, frozen=True):
    """Where the fields of a recipe were written: its file, the line of each field there, and the changes of the command line
    as (field, what was typed) in their order."""

    file: str = "recipe"
    lines: dict[str, int] = {}
    changes: tuple[tuple[str, str], ...] = ()

    def change_of(self, field: str) -> str | None:
        """The last --set that wrote `field`, as it was typed, cut to a length that can be read."""
        for changed, typed in reversed(self.changes):
            if is_within(field, changed):
                return told(typed)
        return None

    def line_of(self, field: str) -> int | None:
        """The line of `field`, or of the nearest mapping or list around it; None for the whole file."""
        for name in _outwards(field):
            if name in self.lines:
                return self.lines[name]
        return None

    def locate(self, text: str, in_list: bool = False) -> str:
        """`text`, a message that begins with a field, after the place of that field; as it is where it begins otherwise."""
        found = FIELD.match(text)
        name = found[0] if found else ""
        if not self._is_field(name):
            return text
        return self.entry(Fault(name, text)) if in_list else self.message(Fault(name, text))

    def message(self, fault: Fault) -> str:
        """The fault after its place, for a report of its own."""
        change, line = self.change_of(fault.field), self.line_of(fault.field)
        if change:
            return f"--set {change}: {fault.text}"
        return f"{self.file}{f', line {line}' if line else ''}: {fault.text}"

    def entry(self, fault: Fault) -> str:
        """The fault after its place, for a list that names the file itself."""
        change, line = self.change_of(fault.field), self.line_of(fault.field)
        place = f"--set {change}: " if change else f"line {line}: " if line else ""
        return f"{place}{fault.text}"

    def _is_field(self, name: str) -> bool:
        top = re.split(r"[.\[]", name, maxsplit=1)[0]
        return bool(top) and (top in self.lines or any(is_within(name, changed) for changed, _ in self.changes))


def told(change: str) -> str:
    """A change as it was typed, in one line that is not too long to be read."""
    line = " ".join(change.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"


def is_within(field: str, outer: str) -> bool:
    """Whether `field` is `outer` or a part of it: a.b[0].c is within a.b."""
    return field == outer or field.startswith((f"{outer}.", f"{outer}["))


def overlap(one: str, other: str) -> bool:
    """Whether one field is the other, or a part of it."""
    return is_within(one, other) or is_within(other, one)


def raise_faults(faults: list[Fault], places: Places) -> NoReturn:
    """RecipeError with all of `faults`, those of the file in the order of its lines."""
    faults = sorted(dict.fromkeys(faults), key=lambda fault: _order(places, fault))
    if len(faults) == 1:
        raise RecipeError(places.message(faults[0]))
    listed = "".join(f"\n  {places.entry(fault)}" for fault in faults)
    raise RecipeError(f"{places.file}: {len(faults)} things are wrong:{listed}")


def _order(places: Places, fault: Fault) -> tuple[bool, int]:
    return places.change_of(fault.field) is not None, places.line_of(fault.field) or 0


class RecipeErrors(RecipeError):
    """Several; `texts` has them one by one."""

    def __init__(self, texts: list[str], places: Places) -> None:
        if len(texts) == 1:
            super().__init__(places.locate(texts[0]))
        else:
            listed = "".join(f"\n  {places.locate(text, in_list=True)}" for text in texts)
            super().__init__(f"{places.file}: {len(texts)} things are wrong:{listed}")
        self.texts = texts


class Collected:
    """Errors of checks that do not depend on one another, to be raised together; who knows no `places` leaves them to whoever
    collects again."""

    def __init__(self, places: Places | None = None) -> None:
        self._places = places or Places()
        self._texts: list[str] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep a RecipeError of the body, which ends there."""
        try:
            yield
        except RecipeErrors as error:
            self._texts += error.texts
        except RecipeError as error:
            self._texts.append(str(error))

    @property
    def texts(self) -> tuple[str, ...]:
        """What was collected, each text once."""
        return tuple(dict.fromkeys(self._texts))

    def raise_all(self) -> None:
        """Raise a RecipeError with everything that was collected, each with the place of the field that it begins with."""
        if self._texts:
            raise RecipeErrors(list(self.texts), self._places)


def _outwards(field: str) -> Iterator[str]:
    """`field`, then what it is a part of: a.b[0], a.b, a."""
    while field:
        yield field
        field = re.sub(r"(\.[^.\[]+|\[\d+\]|^[^.\[]+)$", "", field) if re.search(r"[.\[]", field) else ""
