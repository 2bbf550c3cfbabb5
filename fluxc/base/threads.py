"""How many CPU threads a command computes with, and how they wait for one another.

torch, its oneDNN and MKL, and numba's kernels all use OpenMP, GNU's as the wheels ship it; ONNX Runtime has threads of its
own. OpenMP reads what is set here when it is loaded, so a command sets it first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}
"""OpenMP's threads sleep while they wait: GNU's after 3000 looks, in place of 300,000, which docs/performance.md weighs;
those of other makers at once."""
HOW_TO_WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
HOW_MANY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_chosen: int | None = None


def wait_quietly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads wait without keeping a core busy for long, unless the user's environment says how they wait."""
    if not any(name in environment for name in HOW_TO_WAIT):
        environment.update(WAITING)


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Everything that is loaded in the body computes with so many threads."""
    global _chosen
    before, others = _chosen, {name: os.environ.get(name) for name in HOW_MANY}
    _chosen = threads
    os.environ.update(dict.fromkeys(HOW_MANY, str(threads)))
    try:
        yield
    finally:
        _chosen = before
        for name, value in others.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def chosen_threads(ranks: int = 1) -> int | None:
    """Threads for each of `ranks` processes that run at once; None where the library decides."""
    return None if _chosen is None else max(1, _chosen // ranks)
