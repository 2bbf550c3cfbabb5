"""Which form a Linear takes on a target: the target's own for its format, else the format's reference form, else none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from fluxc.base.errors import BuildError
from fluxc.formats.base import Format
from fluxc.formats.registry import FORMATS

Form = TypeVar("Form")
"""What adds a Linear to a graph; each target has a signature of its own."""


@dataclass(frozen=True)
class Forms(Generic[Form]):
    """The forms of a target, `own` by format. `through_reference` makes one of a format's reference form, where those run.

    `takes_rows`: whether they can compute a part of a weight's rows.
    """

    target: str
    own: Mapping[str, Form]
    through_reference: Callable[[Format], Form] | None = None
    takes_rows: bool = False

    def __str__(self) -> str:
        *others, last = self.own
        return f"{', '.join(others)} and {last}"

    def lacking(self, formats: Iterable[str]) -> list[str]:
        """Those of `formats` that have no form here, sorted."""
        return [] if self.through_reference else sorted(set(formats) - set(self.own))

    def of(self, format: str, layer: str) -> Form:
        """The form of `format`; BuildError naming `layer` where there is none."""
        if format in self.own:
            return self.own[format]
        if self.through_reference is None:
            raise BuildError(f"{layer}: {self.target} has no form for {format}; it has {self}")
        return self.through_reference(FORMATS[format])
