"""Runs fluxc's command line in children of its own, each killed in the middle of its work.

It imports once what a build needs, then reads lines of JSON from stdin, [WHEN, ARGUMENTS]; each runs in a forked child, and
the exit status (minus the signal's number, where one ended it) is written to stdout as a line. WHEN is null (not at all), a
stage (SIGKILL), or [SIGNAL, SECONDS] after it was forked.

A stage is killed as soon as its result folder holds a file, or at the latest when its work is done and nothing is sealed yet.
One that traces graphs writes them last, and is killed half a second after it began. "bundle" is killed when the bundle is
complete and not yet in its place.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watched(stage: str, run: Callable[..., Path]) -> Callable[..., Path]:
    """StageCache.run, with a killer in the stage whose name begins so."""

    traces = stage.startswith("export")

    def wrapped(self: Any, folder: Path, title: str, work: Callable[..., None]) -> Path:
        def dying(partial: Path, report: Any) -> None:
            begun = time.monotonic()

            def watch() -> None:
                while not any(partial.iterdir()) and not (traces and time.monotonic() > begun + 0.5):
                    time.sleep(0.001)
                kill()

            threading.Thread(target=watch, daemon=True).start()
            work(partial, report)
            kill()

        return run(self, folder, title, dying if folder.name.startswith(stage) else work)

    return wrapped


def run(stage: str | None, arguments: list[str]) -> None:
    """The command, in this process."""
    from fluxc.entry import main

    # The parent's stdout is the protocol's.
    os.dup2(2, 1)
    if stage == "bundle":
        from fluxc.build import bundle_writer

        bundle_writer.finish = kill
    elif stage:
        from fluxc.base.cache import StageCache

        StageCache.run = watched(stage, StageCache.run)
    main(arguments)


def serve() -> None:
    import diffusers
    import transformers

    # ONNX Runtime starts a thread when it is imported, and so does fluxc for numba: neither passes a fork.
    for _ in (diffusers.Flux2KleinPipeline, diffusers.AutoencoderKLFlux2, transformers.Qwen3ForCausalLM):
        assert len(list(Path("/proc/self/task").iterdir())) == 1
    for line in sys.stdin:
        when, arguments = json.loads(line)
        child = os.fork()
        if not child:
            run(when if isinstance(when, str) else None, arguments)
            raise AssertionError("main ends the process")
        if isinstance(when, list):
            time.sleep(when[1])
            os.kill(child, when[0])
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
