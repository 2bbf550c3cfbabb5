"""Reads a model's typed config from the fields of a config.json, and bounds what they may be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from fluxc.base.json_object import as_struct

Config = TypeVar("Config", bound=msgspec.Struct)

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
"""Channels, features, heads, entries of a vocabulary."""
Layers = Annotated[int, msgspec.Meta(ge=0, le=4096)]
Factor = Annotated[float, msgspec.Meta(gt=0, lt=1e9)]


def read_config(kind: type[Config], config: dict[str, Any], where: Path) -> Config:
    """`config` as a `kind`; fields it does not have are left alone.

    Raises CheckpointError naming `where`, the component's folder, and the field that is missing or does not fit.
    """
    return as_struct(kind, config, where / "config.json")
