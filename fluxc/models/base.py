"""What a model is to a plan: its Linears, with the fusion groups an engine would merge them in."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """One Linear: its module name, [out, in], and the fusion group an engine would merge it in."""

    name: str
    out_features: int
    in_features: int
    group: str | None = None
