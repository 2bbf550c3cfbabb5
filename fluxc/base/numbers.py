"""Numbers as reports show them."""

from __future__ import annotations


def significant(value: float, digits: int = 4) -> float:
    """`value` rounded to `digits` significant digits, so that reports do not differ in the last bit of a float."""
    return float(f"{value:.{digits}g}")
