"""The build backend: setuptools', which for a wheel made in a clone requires the clone's own fluxrt (setup.py).

fluxrt is on no package index, so `pip install .` would find none. An editable installation is left as it is: it goes with
`-e ./runtime`, which pip would not take beside a second place for fluxrt.
"""

from __future__ import annotations

import os
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def build_wheel(*args: Any) -> str:
    """The wheel's file name (PEP 517)."""
    os.environ["FLUXC_WHEEL"] = "1"
    return str(build_meta.build_wheel(*args))


def prepare_metadata_for_build_wheel(*args: Any) -> str:
    """The name of the dist-info folder (PEP 517)."""
    os.environ["FLUXC_WHEEL"] = "1"
    return str(build_meta.prepare_metadata_for_build_wheel(*args))
