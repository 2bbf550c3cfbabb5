"""Numbers as reports and JSON files show them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from fluxc.base.errors import BuildError


def significant(value: float, digits: int = 4) -> float:
    """`value` rounded to `digits` significant digits, so that reports do not differ in the last bit of a float."""
    return float(f"{value:.{digits}g}")


def check_finite(value: Any, what: str) -> None:
    """BuildError naming the first number in the JSON-like `value` that is NaN or infinite: JSON has neither."""
    for place, number in floats(value):
        if not math.isfinite(number):
            raise BuildError(f"{what}: {place or 'it'} came to {number}; the checkpoint or its calibration is wrong")


def as_json(value: Any, what: str, indent: int | None = None) -> str:
    """`value` as JSON, refused where it holds a number that JSON has not; `what` names it in errors."""
    check_finite(value, what)
    return json.dumps(value, indent=indent, allow_nan=False)


def floats(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every float in the JSON-like `value`, with where it is: "a.b[2]"."""
    if isinstance(value, float):
        yield place, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from floats(item, f"{place}.{key}".lstrip("."))
    if isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from floats(item, f"{place}[{at}]")
