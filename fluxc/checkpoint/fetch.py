"""Downloads the weights that a checkpoint on the hub lacks here, into huggingface_hub's cache.

A file that is complete is kept, whatever happens to the others. A connection that breaks inside of a file is taken up again at
the byte where it broke, as long as the command runs.
"""

from __future__ import annotations

import glob
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxc.base.errors import BuildError
from fluxc.base.memory import bytes_in_words
from fluxc.base.progress import Report, StageProgress
from fluxc.checkpoint.hub import Missing
from fluxc.checkpoint.hub_errors import telling
from fluxc.checkpoint.named import OnHub

AT_ONCE = 4
"""Files that are downloaded side by side: each of them is lost where the command ends before it is complete."""
TITLE = "fetch checkpoint"


def fetch(missing: Sequence[Missing], progress: StageProgress) -> None:
    """Download the files of `missing`. BuildError if the disk has no room for them, CheckpointError if the hub does not give
    them."""
    from huggingface_hub import snapshot_download

    total = sum(entry.size for entry in missing)
    free = free_in_cache()
    if total > free:
        raise BuildError(
            f"{cache_folder()}: {bytes_in_words(free)} of disk is free there, and {len(missing)} files of "
            f"{missing[0].repo} need {bytes_in_words(total)}; free some, or set HF_HUB_CACHE to a larger disk"
        )
    with progress.stage(TITLE) as report:
        done = 0
        for repo, commit in dict.fromkeys((entry.repo, entry.commit) for entry in missing):
            files = [entry for entry in missing if (entry.repo, entry.commit) == (repo, commit)]
            size = sum(entry.size for entry in files)
            with telling(OnHub(repo, commit)):
                snapshot_download(
                    repo,
                    revision=commit,
                    allow_patterns=[glob.escape(entry.path) for entry in files],
                    max_workers=AT_ONCE,
                    tqdm_class=_counted(_plus(report, done, total, f"{len(files)} files of {repo}"), size),
                )
            done += size
            report(done, total)


def cache_folder() -> Path:
    """Where huggingface_hub keeps files."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def free_in_cache() -> int:
    """Bytes that are free on the disk of the cache."""
    folder = cache_folder().absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def silent() -> Any:
    """huggingface_hub's progress bar, never shown."""
    return _counted(lambda *_: None, 0)


def _plus(report: Report, done: int, total: int, detail: str) -> Report:
    return lambda more, *_: report(done + more, total, detail)


def _counted(report: Report, total: int) -> Any:
    """huggingface_hub's progress bar, not shown, whose bytes are told to `report` instead.

    It has several at once that count the same bytes, as they arrive and as they are written: the furthest is told.
    """
    from huggingface_hub.utils import tqdm

    counts: dict[int, float] = {}
    lock = threading.Lock()

    class Counted(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if not self._counts_bytes:
                return
            with lock:
                counts[id(self)] = counts.get(id(self), 0) + (n or 0)
                report(int(min(max(counts.values()), total)), total)

    return Counted
