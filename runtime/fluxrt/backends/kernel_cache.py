"""Kernels that TensorRT-RTX compiled for this GPU, kept beside the user's caches; losing them costs time and nothing else."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxrt.cuda import Gpu


class KernelCaches:
    """The runtime caches of a target's plans, by plan; what goes wrong with them is a sentence in `notes`."""

    def __init__(self, gpu: Gpu, version: str, notes: list[str]) -> None:
        self._gpu, self._version, self._notes = gpu, version, notes
        self._caches: dict[str, tuple[Any, Path, bytes]] = {}

    def attach(self, config: Any, plan: str, sha256: str) -> None:
        """Give the runtime configuration `config` of the plan with this SHA-256 its cache, with what was kept of it."""
        if plan not in self._caches:
            path, known = cache_file(self._gpu, self._version, sha256), b""
            cache = config.create_runtime_cache()
            try:
                known = path.read_bytes() if path.is_file() else b""
            except OSError as error:
                self._notes.append(f"{path}: cannot be read ({error}), kernels are compiled again")
            if known and not cache.deserialize(known):
                self._notes.append(f"{path}: not usable here (another driver, or damaged), kernels are compiled again")
                known = b""
            self._caches[plan] = (cache, path, known)
        if not config.set_runtime_cache(self._caches[plan][0]):
            self._notes.append(
                f"plan {plan}: its cache of compiled kernels was refused, they are compiled at every start"
            )

    def save(self) -> None:
        """Write every cache that has grown, by rename."""
        for plan, (cache, path, known) in self._caches.items():
            now = bytes(cache.serialize() or b"")
            if not now or now == known:
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                    partial = Path(scratch) / path.name
                    partial.write_bytes(now)
                    partial.replace(path)
            except OSError as error:
                self._notes.append(f"{path}: the compiled kernels could not be kept ({error})")
            self._caches[plan] = (cache, path, now)

    def clear(self) -> None:
        """Drop the caches held in memory."""
        self._caches.clear()


def cache_file(gpu: Gpu, version: str, plan_sha256: str) -> Path:
    """Where the kernels compiled for a plan are kept: below XDG_CACHE_HOME, by GPU, library version and plan."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    key = hashlib.sha256(f"{gpu.name}\0{gpu.compute_capability}\0{version}\0{plan_sha256}".encode())
    return root / "fluxc" / "kernels" / f"{key.hexdigest()[:32]}.bin"
