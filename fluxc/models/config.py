"""Reads a model's typed config from the fields of a config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fluxc.base.errors import CheckpointError

Config = TypeVar("Config", bound=msgspec.Struct)


def read_config(kind: type[Config], config: dict[str, Any], where: Path) -> Config:
    """`config` as a `kind`; fields it does not have are left alone.

    Raises CheckpointError naming `where`, the component's folder, and the field that is missing or of another type.
    """
    try:
        return msgspec.convert(config, kind)
    except msgspec.ValidationError as error:
        said = str(error).replace("Object missing required field", "it lacks").replace("$.", "")
        raise CheckpointError(f"{where}/config.json: {said}; use the checkpoint's own config as published") from error
