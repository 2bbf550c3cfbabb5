"""How long a program of an engine takes on the GPU here, run as fluxrt runs it, before any bundle holds it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from fluxrt.backends.tensorrt import TensorRTBackend
from fluxrt.bundle import Bundle, sha256_file
from fluxrt.cuda import Driver
from fluxrt.manifest import File, Manifest, TensorRTTarget, dimension_size

WARM_UP, RUNS = 3, 20
"""The first run compiles, the second captures, the third is the first launch."""


class LooseFiles(Bundle):
    """Files that no manifest names yet, by the names they will have, beside those of the bundle `base` if there is one."""

    def __init__(self, root: Path, files: Mapping[str, Path], base: Bundle | None = None) -> None:
        named = {name: File(path.stat().st_size, sha256_file(path)) for name, path in files.items()}
        known = base.manifest.files if base else {}
        super().__init__(root, cast(Manifest, SimpleNamespace(files=known | named)))
        self._files, self._base = dict(files), base

    def path(self, name: str) -> Path:
        """Where it lies."""
        return self._base.path(name) if self._base and name not in self._files else self._files[name]

    def checked_file(self, name: str) -> Path:
        """Where it lies; what no manifest names was made a moment ago."""
        return self._base.checked_file(name) if self._base and name not in self._files else self._files[name]


def time_program(
    bundle: Bundle, target: TensorRTTarget, program: str, sizes: dict[str, int], driver: Driver, library: Any = None
) -> float:
    """The median of RUNS runs of `program`, in seconds, its inputs zeros; `driver` is closed afterwards.

    Raises BackendError when it does not load or run, OutOfMemoryError when it does not fit.
    """
    backend = TensorRTBackend(bundle, target, driver, library)
    try:
        backend.prepare(sizes)
        made: set[str] = set()
        for call in target.engine.programs[program].calls:
            plan = target.engine.plans[call.plan]
            for port in plan.inputs:
                name = call.buffers.get(port.name, port.name)
                if name not in made:
                    shape = [dimension_size(dimension, sizes) for dimension in port.shape]
                    backend.put(name, np.zeros(shape, "float32" if port.dtype == "bfloat16" else port.dtype))
            made |= {call.buffers.get(port.name, port.name) for port in plan.outputs}
        took = []
        for _ in range(WARM_UP + RUNS):
            driver.synchronize()
            began = time.perf_counter()
            backend.run((program,))
            driver.synchronize()
            took.append(time.perf_counter() - began)
        return statistics.median(took[WARM_UP:])
    finally:
        backend.close()
