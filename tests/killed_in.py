"""Runs fluxc's command line and kills the process (SIGKILL) in the middle of one stage: killed_in.py STAGE ARGUMENTS.

A stage is killed as soon as its result folder holds a file, or at the latest when its work is done and nothing is sealed yet;
"bundle" when the bundle is complete and not yet in its place.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxc.base.cache import StageCache
from fluxc.build import bundle_writer
from fluxc.cli.main import main


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watched(stage: str, run: Callable[..., Path]) -> Callable[..., Path]:
    def wrapped(self: StageCache, folder: Path, title: str, work: Callable[..., None]) -> Path:
        def dying(partial: Path, report: Any) -> None:
            def watch() -> None:
                while not any(partial.iterdir()):
                    time.sleep(0.001)
                kill()

            threading.Thread(target=watch, daemon=True).start()
            work(partial, report)
            kill()

        return run(self, folder, title, dying if folder.name.startswith(stage) else work)

    return wrapped


if __name__ == "__main__":
    stage, *arguments = sys.argv[1:]
    if stage == "bundle":
        bundle_writer.finish = kill
    else:
        StageCache.run = watched(stage, StageCache.run)  # type: ignore[method-assign]
    main(arguments)
