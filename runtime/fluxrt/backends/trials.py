"""Which graphs ran to their end on this machine before, so that a trial run is made once; losing it costs a trial."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxrt.cuda import Gpu


class Trials:
    """Empty files below XDG_CACHE_HOME, one for each graph that ran: named after its SHA-256, GPU, driver and library.

    What goes wrong with them is a sentence in `notes`.
    """

    def __init__(self, gpu: Gpu, library: str, notes: list[str]) -> None:
        self._machine = "\0".join((gpu.name, gpu.compute_capability, gpu.driver, library))
        self._notes = notes

    def has_run(self, sha256: str) -> bool:
        """Whether the graph file with this SHA-256 ran here before."""
        try:
            return self._file(sha256).is_file()
        except OSError:
            return False

    def remember(self, sha256: str) -> None:
        """Note that it ran."""
        path = self._file(sha256)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            self._notes.append(f"{path}: cannot be written ({error}), so graphs are tried at every start")

    def _file(self, sha256: str) -> Path:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        key = hashlib.sha256(f"{self._machine}\0{sha256}".encode())
        return root / "fluxc" / "trials" / key.hexdigest()[:32]
