"""A wheel made in a clone requires the fluxrt beside it; tools/backend.py tells why. pyproject.toml says everything else.

`python -m build` makes wheels from sdists, where there is no clone: they require fluxrt by its version.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup

RUNTIME = Path(__file__).resolve().parent / "runtime"


class FluxcDistribution(Distribution):
    """fluxc, as pyproject.toml describes it."""

    def parse_config_files(self, *args: Any, **kwargs: Any) -> None:
        """Read pyproject.toml, then say where fluxrt is."""
        super().parse_config_files(*args, **kwargs)
        if "FLUXC_WHEEL" in os.environ and RUNTIME.is_dir():
            # In place: setuptools has this very list in its metadata too.
            self.install_requires[:] = [
                f"fluxrt @ {RUNTIME.as_uri()}" if line.startswith("fluxrt") else line for line in self.install_requires
            ]


setup(distclass=FluxcDistribution)
