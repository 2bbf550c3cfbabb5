"""What an audit finds in what an engine made of a graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something that is not as it must be: of a `kind`, which each audit has its own of, and of `layers`, or of the whole."""

    kind: str
    layers: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{', '.join(self.layers)}: {self.text}" if self.layers else self.text
