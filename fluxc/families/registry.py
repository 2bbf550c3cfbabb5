"""The families this fluxc compiles; a further one is a file and a line here."""

from __future__ import annotations

from fluxc.families.base import FAMILIES, Family, register
from fluxc.families.dev import DEV
from fluxc.families.klein import KLEIN

__all__ = ["FAMILIES", "Family", "register"]

register(KLEIN)
register(DEV)
